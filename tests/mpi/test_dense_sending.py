"""What dense gradients send, and when."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from adaloader.dense import buckets as buckets_module
from tests.mpi.dense_ranks import MANY_BUCKETS, Net, assert_same_grads


@pytest.fixture
def sent(monkeypatch):
    """The element counts of all all-reduces."""
    counts = []
    real = dist.all_reduce

    def counting(tensor, *args, **options):
        counts.append(tensor.numel())
        return real(tensor, *args, **options)

    monkeypatch.setattr(buckets_module.dist, "all_reduce", counting)
    return counts


def test_no_dense_parameters(ranks, sent):
    reducer = ranks.reducer([])
    x = torch.ones(3, requires_grad=True)
    for known in (True, False):
        sent.clear()
        ranks.weight = (ranks.rank + 1.0, ranks.size * (ranks.size + 1) / 2 if known else None)
        x.register_hook(lambda grad: reducer.touch())
        x.sum().backward()
        assert ranks.scales[-1] == pytest.approx(
            2 * (ranks.rank + 1) / (ranks.size * (ranks.size + 1)) if ranks.size > 1 else 1
        )
        reducer.finish_step()
        assert len(sent) == (ranks.size > 1 and not known)
        assert all(count < 16 for count in sent)
    assert reducer.reductions == 2 == len(ranks.scales)


def test_touch_outside_backward(ranks):
    with pytest.raises(RuntimeError, match="no backward is running"):
        ranks.reducer([]).touch()


@pytest.mark.ranks(2)
def test_frozen_model_sends_no_gradients(ranks, sent):
    model = Net().requires_grad_(False)
    reducer = ranks.reducer(model)
    reducer.finish_step()
    assert sent == []


@pytest.mark.ranks(2)
def test_buckets_leave_while_backward_runs(ranks, sent):
    model = Net()
    ranks.reducer(model, MANY_BUCKETS)
    seen = []
    for _ in range(3):
        sent.clear()
        x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
        x.register_hook(lambda grad: seen.append(len(sent)))
        model.loss(x, 0).backward()
    assert seen[0] == 0, "before anything is known of the model"
    assert seen[1] >= 4 and seen[2] == seen[1], "the last layers' have left before the first's are made"


@pytest.mark.ranks(2)
def test_every_rank_gets_the_same_bits_and_a_run_repeats(ranks, comm):
    import numpy as np

    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        model = Net().float()
        reducer = ranks.reducer(model, 64)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        for step in range(5):
            draw = torch.Generator().manual_seed(100 * step + ranks.rank)
            x = torch.randn(step + ranks.rank, 5, generator=draw)
            ranks.weight = (float(len(x)), None)
            model.loss(x, 0).backward()
            reducer.finish_step()
            optimizer.step()
            optimizer.zero_grad()
        reducer.close()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
    everyone = np.empty((ranks.size, runs[0].size), dtype=np.float32)
    comm.Allgather(runs[0], everyone)
    assert (everyone == everyone[0]).all()
    assert (runs[0] == runs[1]).all() and np.isfinite(runs[0]).all()


def test_close_lets_go(ranks):
    model = Net()
    reducer = ranks.reducer(model)
    reducer.close()
    x = torch.full((2, 5), float(ranks.rank), dtype=torch.float64)
    model.loss(x, 0).backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain.loss(x, 0).backward()
    assert_same_grads(model, plain)
    assert reducer.reductions == 0
