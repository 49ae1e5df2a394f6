"""When batches are planned: several in a row, and each well before the loop has it."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from adaloader.reading import feed
from tests.adaloader.id_loaders import Pairs, managed, train


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("batches", [1, 4, 40])
def test_batches_are_planned_in_groups_before_they_are_needed(lookahead, batches, monkeypatch):
    """Neither the buffer that fills, nor the end of the pass, leaves a batch to be planned while the loop waits."""
    planned: list[list[int]] = []
    awaited: list[int] = []

    class Planner(feed.Planner):
        def begin(self):
            if self._given:
                planned.append([batch.number for batch in self._given])
            super().begin()

    def await_planned(self, batch):
        if batch in self.planner._given:
            awaited.append(batch.number)
        own(self, batch)

    own = feed.Feed.await_planned
    monkeypatch.setattr(feed, "Planner", Planner)
    monkeypatch.setattr(feed.Feed, "await_planned", await_planned)
    loader, model, optimizer = managed(Pairs(4 * batches), 4, lookahead=lookahead)
    for batch in loader:
        train(model, optimizer, batch)  # the first step makes programs
    planned.clear()
    awaited.clear()
    handed_out = []
    for number, batch in enumerate(loader):
        handed_out.append((number, sum(map(len, planned))))
        train(model, optimizer, batch)
    assert list(itertools.chain(*planned)) == list(range(batches))
    assert not awaited
    for number, begun in handed_out:
        assert begun >= min(batches, number + 1 + min(2, lookahead, number + 1))
    if batches == 40 and lookahead > 2:
        steady = [len(group) for group in planned if 2 * lookahead + 2 < group[0] < 40 - lookahead]
        assert not steady or min(steady) >= 2
        assert len(planned) < 3 / 4 * batches
    loader.close()


def test_a_loop_that_ends_early_leaves_no_batch_waiting(seed):
    torch.manual_seed(seed)
    loader, model, optimizer = managed(Pairs(64), 4, lookahead=8)
    for _ in range(3):
        for batch in itertools.islice(loader, 5):
            train(model, optimizer, batch)
    gc.collect()
    assert not loader._session.feed.planner._given
    loader.close()
