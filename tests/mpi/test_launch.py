"""Ranks that come late."""

from __future__ import annotations

import time

import pytest
from torch import nn

import pm
from adaloader import AdaLoader


def by_loader(comm):
    return AdaLoader.wrap([1], model=nn.Embedding(20, 2), min_rows=1)


def by_hand(comm):
    return pm.ParameterManager(20, 2, comm=comm)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("build", [by_loader, by_hand])
def test_a_rank_that_comes_late_is_waited_for_with_a_word(comm, monkeypatch, caplog, build):
    monkeypatch.setattr("pm.launch._SECONDS_TO_SAY", 0.2)
    if comm.rank == 1:
        time.sleep(1.5)
    built = build(comm)
    said = [record.getMessage() for record in caplog.records if "for other ranks" in record.getMessage()]
    if comm.rank == 0:
        assert said and said[0].startswith("rank 0 has waited") and "every rank must build" in said[0]
        assert len(said) <= 3
    comm.Barrier()
    built.close()
