"""Dense gradients on several ranks against one process that has all ranks' samples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.mpi.dense_ranks import (
    MANY_BUCKETS,
    ONE_BUCKET,
    Net,
    assert_same_grads,
    called_by_method,
    reentrant_whole,
    whole_loss,
)

# --- losses: how a model may be reached ---


def used_by_one_rank(model, x, rank):
    loss = model.loss(x, rank)
    return loss + model.side(x).square().mean() if rank == 0 else loss


def used_twice(model, x, rank):
    return model.loss(x, rank) + model.loss(x.sin(), rank)


def reentrant(model, x, rank):
    return model.loss(x, rank, lambda h: checkpoint(model.middle, h, use_reentrant=True).tanh())


def reentrant_twice(model, x, rank):
    """One parameter in two nested backwards and in the outer one: its gradient comes in three parts."""

    def middle(h):
        h = checkpoint(model.middle, h, use_reentrant=True).tanh()
        return model.middle(checkpoint(model.middle, h, use_reentrant=True))

    return model.loss(x, rank, middle)


def reentrant_nested(model, x, rank):
    def inner(h):
        return checkpoint(model.middle, h, use_reentrant=True).tanh()

    return model.loss(x, rank, lambda h: checkpoint(inner, h, use_reentrant=True))


def checkpointed(model, x, rank):
    return model.loss(x, rank, lambda h: checkpoint(model.middle, h, use_reentrant=False).tanh())


LOSSES = [
    called_by_method,
    used_by_one_rank,
    used_twice,
    reentrant,
    reentrant_twice,
    reentrant_whole,
    reentrant_nested,
    checkpointed,
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("bucket_bytes", [ONE_BUCKET, MANY_BUCKETS], ids=["one", "many"])
def test_gradients_are_those_of_one_process(ranks, loss, known, bucket_bytes):
    model = Net()
    plain = copy.deepcopy(model)
    reducer = ranks.reducer(model, bucket_bytes)
    for step in range(4):
        batch = ranks.batch(empty_rank=step if step % 2 else None)
        share = ranks.weigh(batch, known)
        before = reducer.reductions
        loss(model, batch[ranks.rank], ranks.rank).backward()
        if ranks.size > 1:
            assert reducer.reductions == before + 1, "complete when backward() returns"
            assert ranks.scales[-1] == pytest.approx(share, rel=1e-12)
        reducer.finish_step()
        whole_loss(plain, batch, loss).backward()
        assert_same_grads(model, plain)
        assert model.never.grad is None
        for each in (model, plain):
            torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9).step()
            each.zero_grad(set_to_none=step != 1)
            each.never.grad = None


def test_equal_shares_match_the_concatenated_batch(ranks):
    model = Net()
    plain = copy.deepcopy(model)
    ranks.reducer(model)
    batch = [torch.randn(4, 5, dtype=torch.float64, generator=ranks.random) for _ in range(ranks.size)]
    ranks.weigh(batch)
    model.loss(batch[ranks.rank], ranks.rank).backward()
    plain.loss(torch.cat(batch), 0).backward()
    assert_same_grads(model, plain)


# --- loops: how backward may be called ---


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("bucket_bytes", [ONE_BUCKET, MANY_BUCKETS], ids=["one", "many"])
@pytest.mark.parametrize("loop", ["accumulate", "retain_graph", "two_losses"])
def test_several_backwards_per_step(ranks, loop, known, bucket_bytes):
    model = Net()
    plain = copy.deepcopy(model)
    reducer = ranks.reducer(model, bucket_bytes)
    for _ in range(2):
        for number in range(3):
            batch = ranks.batch(empty_rank=1 if number == 2 else None)
            ranks.weigh(batch, known)
            for each, value in (
                (model, lambda f, b=batch: f(model, b[ranks.rank], ranks.rank)),
                (plain, lambda f, b=batch: whole_loss(plain, b, f)),
            ):
                if loop == "accumulate":
                    (value(used_by_one_rank) / 3).backward()
                elif loop == "retain_graph":
                    loss = value(called_by_method)
                    loss.backward(retain_graph=True)
                    loss.backward()
                else:
                    value(called_by_method).backward()
                    value(lambda m, x, r: m.side(x).abs().mean()).backward()
                assert each.first.weight.grad is not None
            assert_same_grads(model, plain)
        reducer.finish_step()
        model.zero_grad()
        plain.zero_grad()
    if ranks.size > 1:
        assert reducer.reductions == 2 * 3 * (1 if loop == "accumulate" else 2)


def test_step_without_a_backward_here(ranks):
    """Backward reaches dense parameters on rank 0 alone: the others take part when they step."""
    model = Net()
    reducer = ranks.reducer(model)
    x = torch.randn(3, 5, dtype=torch.float64, generator=ranks.random)
    for _ in range(2):
        if ranks.rank == 0:
            model.loss(x, 0).backward()
        reducer.finish_step()
        plain = copy.deepcopy(model)
        plain.zero_grad()
        (plain.loss(x, 0) / ranks.size).backward()
        assert_same_grads(model, plain)
        model.zero_grad()
    assert reducer.reductions == 2


@pytest.mark.ranks(2)
def test_rank_that_ran_out_joins(ranks):
    model = Net()
    reducer = ranks.reducer(model)
    x = torch.randn(ranks.size, 3, 5, dtype=torch.float64, generator=ranks.random)
    for step in range(3):  # the last rank has one batch, the others three
        with_data = ranks.size if step == 0 else ranks.size - 1
        ranks.weight = (1.0, None)
        if ranks.rank < with_data:
            model.loss(x[ranks.rank], 0).backward()
        else:
            assert reducer.join() == with_data
            assert ranks.scales[-1] == 0.0
        reducer.finish_step()
        plain = copy.deepcopy(model)
        plain.zero_grad()
        (sum(plain.loss(x[rank], 0) for rank in range(with_data)) / with_data).backward()
        assert_same_grads(model, plain)
        model.zero_grad()
    calls = len(ranks.scales)
    assert reducer.join() == 0
    assert len(ranks.scales) == calls and model.first.weight.grad is None


@pytest.mark.ranks(2)
def test_join_with_gradients_of_its_own(ranks):
    model = Net()
    reducer = ranks.reducer(model)
    model.first.bias.grad = torch.full_like(model.first.bias, float(ranks.rank))
    assert reducer.join(zero=False) == ranks.size
    assert torch.equal(model.first.bias.grad, torch.full_like(model.first.bias, (ranks.size - 1) / 2))


def test_zero_weight_contributes_nothing_not_even_nan(ranks):
    model = Net()
    ranks.reducer(model)
    ranks.weight = (0.0 if ranks.rank else 2.0, None)
    x = torch.randn(2, 5, dtype=torch.float64, generator=ranks.random)
    model.loss(x[: 0 if ranks.rank else 2], 0).backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain.loss(x, 0).backward()
    assert_same_grads(model, plain)


@pytest.mark.ranks(2)
def test_what_no_sample_used_has_no_gradient(ranks):
    model = Net()
    reducer = ranks.reducer(model)
    ranks.weight = (float(ranks.rank == 0), 1.0)
    x = torch.ones(2, 5, dtype=torch.float64)
    (model.side(x) if ranks.rank else model.last(torch.ones(2, 8, dtype=torch.float64))).sum().backward()
    reducer.finish_step()
    assert model.side.weight.grad is None and model.side.bias.grad is None
    assert torch.equal(model.last.bias.grad, torch.full((1,), 2.0, dtype=torch.float64))


def test_autograd_grad_begins_nothing(ranks):
    model = Net()
    reducer = ranks.reducer(model)
    x = torch.randn(2, 5, dtype=torch.float64, generator=ranks.random)
    torch.autograd.grad(model.loss(x, 0), model.first.weight)
    assert reducer.reductions == 0 and model.first.weight.grad is None


def test_hooks_see_the_user_s_grad_identity(ranks):
    """A gradient that exists is overwritten in place: the user may hold it."""
    model = Net()
    ranks.reducer(model)
    x = torch.randn(2, 5, dtype=torch.float64, generator=ranks.random)
    model.loss(x, 0).backward()
    held = model.first.weight.grad
    model.loss(x, 0).backward()
    assert model.first.weight.grad is held
