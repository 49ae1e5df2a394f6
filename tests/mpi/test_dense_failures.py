"""Dense gradients where a backward raises, ranks disagree, or what is asked for cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
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


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("midway")


@pytest.mark.parametrize("bucket_bytes", [ONE_BUCKET, MANY_BUCKETS], ids=["one", "many"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_backward_that_raises_on_all_ranks_leaves_nothing_behind(ranks, bucket_bytes, nested):
    model = Net()
    plain = copy.deepcopy(model)
    reducer = ranks.reducer(model, bucket_bytes)

    def broken(h):
        return Raises.apply(checkpoint(model.middle, h, use_reentrant=True) if nested else model.middle(h))

    for step in range(4):
        if step in (1, 2):
            batch = ranks.batch()
            ranks.weigh(batch)
            with pytest.raises(ValueError, match="midway"):
                model.loss(batch[ranks.rank], 0, broken).backward()
            model.zero_grad()
        batch = ranks.batch()  # of other weights than the one that failed
        ranks.weigh(batch)
        next_loss = reentrant_whole if step == 2 else called_by_method
        next_loss(model, batch[ranks.rank], ranks.rank).backward()
        reducer.finish_step()
        whole_loss(plain, batch, called_by_method).backward()
        assert_same_grads(model, plain)
        model.zero_grad()
        plain.zero_grad()


class RunsInside(torch.autograd.Function):
    """Calls a function in its backward, where reentrant checkpointing calls backward."""

    @staticmethod
    def forward(ctx, x, inside):
        ctx.inside = inside
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            ctx.inside()
        return grad, None


@pytest.mark.parametrize("bucket_bytes", [ONE_BUCKET, MANY_BUCKETS], ids=["one", "many"])
def test_outer_backward_that_raises_after_its_inner_one(ranks, bucket_bytes):
    model = Net()
    plain = copy.deepcopy(model)
    reducer = ranks.reducer(model, bucket_bytes)

    def inside():
        called_by_method(model, batch[ranks.rank], 0).backward()
        raise ValueError("midway")

    for _ in range(2):
        batch = ranks.batch()
        ranks.weigh(batch)
        with pytest.raises(ValueError, match="midway"):
            RunsInside.apply(torch.ones(3, requires_grad=True), inside).sum().backward()
        model.zero_grad()
        batch = ranks.batch()  # of other weights than the one that failed
        ranks.weigh(batch)
        called_by_method(model, batch[ranks.rank], 0).backward()
        reducer.finish_step()
        whole_loss(plain, batch, called_by_method).backward()
        assert_same_grads(model, plain)
        model.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("bucket_bytes", [ONE_BUCKET, MANY_BUCKETS], ids=["one", "many"])
def test_outer_backward_that_outlives_its_inner_one(ranks, bucket_bytes):
    model = Net()
    plain = copy.deepcopy(model)
    reducer = ranks.reducer(model, bucket_bytes)
    x = torch.randn(3, 5, dtype=torch.float64, generator=ranks.random)

    def run(model):
        def inside():
            h = torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
            if ranks.rank == 0:
                with pytest.raises(ValueError, match="midway"):
                    model.last(Raises.apply(h)).sum().backward()
            else:
                model.last(h).sum().backward()

        h = RunsInside.apply(model.first(x).tanh(), inside)
        model.last(h).square().mean().backward()

    for step in range(2):
        run(model)
        assert reducer.reductions == (step + 1 if ranks.size > 1 else step)
        run(plain)
        assert_same_grads(model, plain)
        reducer.finish_step()


@pytest.mark.ranks(2)
def test_one_rank_may_try_again_if_nothing_was_sent(ranks):
    model = Net()
    plain = copy.deepcopy(model)
    reducer = ranks.reducer(model, ONE_BUCKET)
    for _ in range(2):
        batch = ranks.batch()
        ranks.weigh(batch)
        if ranks.rank == 1:
            with pytest.raises(ValueError, match="midway"):
                model.loss(batch[1], 1, lambda h: Raises.apply(model.middle(h))).backward()
            model.zero_grad()
        model.loss(batch[ranks.rank], ranks.rank).backward()
        reducer.finish_step()
        whole_loss(plain, batch, called_by_method).backward()
        assert_same_grads(model, plain)
        model.zero_grad()
        plain.zero_grad()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("what", ["index", "step"])
def test_ranks_in_different_reductions_are_told(ranks, what):
    model = Net()
    reducer = ranks.reducer(model)
    x = torch.randn(2, 5, dtype=torch.float64, generator=ranks.random)
    model.loss(x, 0).backward()
    if what == "index":
        reducer._exchange.index += ranks.rank == 0
    elif ranks.rank == 0:
        reducer.finish_step()
    with pytest.raises(RuntimeError, match=rf"(?s)reduction \d of step \d.*mean {what}.*equally often"):
        model.loss(x, 0).backward()
    assert reducer._current is None


@pytest.mark.ranks(2)
def test_weights_that_disagree(ranks):
    model = Net()
    ranks.reducer(model)
    x = torch.randn(2, 5, dtype=torch.float64, generator=ranks.random)
    ranks.weight = (1.0, float(ranks.size) if ranks.rank else None)
    with pytest.raises(RuntimeError, match="ranks know the sum of weights"):
        model.loss(x, 0).backward()
    ranks.weight = (1.0, ranks.size + 1.0)
    with pytest.raises(RuntimeError, match="weigh .* ranks are at different batches"):
        model.loss(x, 0).backward()
    ranks.weight = (0.0, None)
    with pytest.raises(ValueError, match=r"sum to 0\.0"):
        model.loss(x, 0).backward()


@pytest.mark.parametrize("weight", [(-1.0, None), (float("nan"), 3.0), (1.0, 0.0), (1.0, float("inf"))])
def test_impossible_weights(ranks, weight):
    reducer = ranks.reducer(Net())
    ranks.weight = weight
    with pytest.raises(ValueError, match="it must be"):
        reducer.finish_step()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("difference", ["shape", "name", "dtype", "number"])
def test_ranks_with_different_models_are_told(ranks, difference):
    model = nn.Linear(3, 4 + (difference == "shape" and ranks.rank == 1))
    if difference == "dtype" and ranks.rank == 1:
        model.double()
    named = list(model.named_parameters())
    if difference == "name" and ranks.rank == 1:
        named = [("other." + name, p) for name, p in named]
    if difference == "number" and ranks.rank == 1:
        named = named[:1]
    with pytest.raises(ValueError, match=r"on ranks \[1\] are not those on rank 0"):
        ranks.reducer(named)


def test_unsupported_layout_is_named(ranks):
    if ranks.size == 1:
        pytest.skip("at one rank gradients are left alone")
    weight = nn.Parameter(torch.ones(2, 3))
    reducer = ranks.reducer([("odd.weight", weight)])
    weight.grad = torch.ones(2, 3).to_sparse()
    with pytest.raises(TypeError, match=r"odd\.weight has layout"):
        reducer.finish_step()
