"""One start on all ranks, and one process group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaloader.dense.process_group import process_group
from adaloader.ranks.agreement import broadcast


def test_broadcast_gives_rank_0_s_values(ranks):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    shapes = [(), (0,), (3, 4), (5,)]
    want = [(torch.randn(s, generator=ranks.random) * 9).to(d) for d in dtypes for s in shapes]
    mine = [t.clone() if ranks.rank == 0 else torch.zeros_like(t) for t in want]
    base = torch.zeros(6, 8)
    view = base.t()[::2]
    view += 1.0 if ranks.rank == 0 else 2.0
    parameter = nn.Parameter(torch.full((3,), float(ranks.rank)))
    broadcast([*mine, view, parameter, parameter], ranks.group)
    for got, value in zip(mine, want, strict=True):
        assert torch.equal(got, value)
    assert torch.equal(base[:, ::2], torch.ones(6, 4)) and not base[:, 1::2].any()
    assert torch.equal(parameter.detach(), torch.zeros(3))


@pytest.mark.ranks(2)
def test_broadcast_of_different_models_is_told(ranks):
    with pytest.raises(ValueError, match=r"on ranks \[1\]"):
        broadcast([torch.zeros(2 + (ranks.rank == 1))], ranks.group)


def test_group_is_made_once(comm):
    first = process_group(comm)
    assert process_group(comm) is first
    assert process_group(None) is None
    if comm.size == 1:
        assert first is None
    else:
        assert (first.rank(), first.size()) == (comm.rank, comm.size)


@pytest.mark.ranks(2)
def test_group_that_does_not_fit_the_communicator(comm):
    process_group(comm)
    reverse = comm.Split(0, comm.size - comm.rank)
    with pytest.raises(ValueError, match=rf"torch\.distributed says rank {comm.size - 1} of {comm.size}.*rank 0 of"):
        process_group(reverse)
    reverse.Free()
