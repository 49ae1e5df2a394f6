"""Dense gradients of parameters of all kinds: dtypes, layouts, frozen, cast, sparse, shared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.mpi.dense_ranks import EXACT, MANY_BUCKETS, ONE_BUCKET, Net, assert_same_grads, called_by_method, whole_loss


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128],
    ids=str,
)
def test_dtypes_and_shapes(ranks, dtype):
    shapes = [(), (0,), (3,), (2, 0, 4), (4, 5), (2, 3, 4)]
    parameters = [(str(n), nn.Parameter(torch.zeros(shape, dtype=dtype))) for n, shape in enumerate(shapes)]
    parameters.append(("double", nn.Parameter(torch.zeros(7, dtype=torch.float64))))
    reducer = ranks.reducer(parameters, bucket_bytes=32)
    values = [torch.randn(ranks.size, *p.shape, dtype=p.dtype, generator=ranks.random) for _, p in parameters]
    for (_, p), value in zip(parameters, values, strict=True):
        p.grad = value[ranks.rank].clone()
    reducer.finish_step()
    for (_, p), value in zip(parameters, values, strict=True):
        wide = value.to(torch.complex128 if value.is_complex() else torch.float64)
        torch.testing.assert_close(p.grad, wide.mean(0).to(p.dtype))
        assert p.grad.dtype == p.dtype and p.grad.shape == p.shape


def test_strange_gradients(ranks):
    """Transposed, expanded, overlapping with nothing of ours: each is reduced, and written where it can be."""
    a, b, c = (nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in range(3))
    reducer = ranks.reducer([("a", a), ("b", b), ("c", c)])
    values = torch.randn(ranks.size, 4, 6, dtype=torch.float64, generator=ranks.random)
    a.grad = values[ranks.rank].t().contiguous().t()
    b.grad = values[ranks.rank, :, :1].expand(4, 6)
    big = torch.zeros(8, 12, dtype=torch.float64)
    c.grad = big[::2, ::2]
    c.grad.copy_(values[ranks.rank])
    reducer.finish_step()
    torch.testing.assert_close(a.grad, values.mean(0), **EXACT)
    torch.testing.assert_close(b.grad, values[:, :, :1].mean(0).expand(4, 6), **EXACT)
    torch.testing.assert_close(c.grad, values.mean(0), **EXACT)
    assert torch.equal(big[1::2], torch.zeros(4, 12, dtype=torch.float64))


@pytest.mark.parametrize("bucket_bytes", [ONE_BUCKET, MANY_BUCKETS], ids=["one", "many"])
def test_freeze_thaw_and_cast(ranks, bucket_bytes):
    model = Net()
    model.middle.requires_grad_(False)
    plain = copy.deepcopy(model)
    reducer = ranks.reducer(model, bucket_bytes)
    changes = [
        lambda m: None,
        lambda m: m.middle.requires_grad_(True),
        lambda m: m.first.requires_grad_(False),
        lambda m: m.requires_grad_(False).middle.requires_grad_(True),
        lambda m: m.requires_grad_(True),
    ]
    for change in changes:
        change(model)
        change(plain)
        for _ in range(2):
            batch = ranks.batch()
            ranks.weigh(batch)
            model.loss(batch[ranks.rank], 0).backward()
            whole_loss(plain, batch, called_by_method).backward()
            assert_same_grads(model, plain)
            reducer.finish_step()
            model.zero_grad()
            plain.zero_grad()
    model.float()
    plain.float()
    batch = [share.float() for share in batch]
    model.loss(batch[ranks.rank], 0).backward()
    whole_loss(plain, batch, called_by_method).backward()
    assert_same_grads(model, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("used_by", ["all", "rank 0", "none", "mixed"])
def test_sparse_gradients_stay_sparse(ranks, used_by):
    table = nn.Embedding(9, 3, sparse=True, padding_idx=2, dtype=torch.float64)
    plain = copy.deepcopy(table)
    reducer = ranks.reducer(table)
    ids = [torch.randint(0, 9, (n + 1,), generator=ranks.random) for n in range(ranks.size)]
    for _ in range(2):
        if used_by in ("all", "mixed") or (used_by == "rank 0" and ranks.rank == 0):
            table(ids[ranks.rank]).square().sum().backward()
            if used_by == "mixed":
                table.weight.grad = table.weight.grad.to_dense() if ranks.rank == 0 else table.weight.grad
                reducer.join(zero=False)
        reducer.finish_step()
        users = {"all": ids, "mixed": ids, "rank 0": ids[:1], "none": []}[used_by]
        if not users:
            assert table.weight.grad is None
            return
        (sum(plain(i).square().sum() for i in users) / ranks.size).backward()
        got, want = table.weight.grad, plain.weight.grad.coalesce()
        assert got.is_sparse == (used_by != "mixed")
        if used_by != "mixed":
            got = got.coalesce()
            assert torch.equal(got.indices(), want.indices())
        torch.testing.assert_close(got.to_dense(), want.to_dense(), **EXACT)
        table.zero_grad()
        plain.zero_grad()


def test_shared_and_repeated_parameters(ranks):
    layer = nn.Linear(3, 3, dtype=torch.float64)
    reducer = ranks.reducer([("a.weight", layer.weight), ("b.weight", layer.weight), ("bias", layer.bias)])
    layer(torch.full((2, 3), float(ranks.rank + 1), dtype=torch.float64)).sum().backward()
    reducer.finish_step()
    mean = 2 * (ranks.size + 1) / 2
    torch.testing.assert_close(layer.weight.grad, torch.full((3, 3), mean, dtype=torch.float64), **EXACT)
