"""Dense gradients on several ranks against one process that has all ranks' samples."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaloader import buckets as buckets_module
from adaloader.agreement import broadcast
from adaloader.dense import DenseReducer
from adaloader.process_group import process_group

EXACT = {"rtol": 1e-12, "atol": 1e-12}
ONE_BUCKET, MANY_BUCKETS = 1 << 20, 1


class Net(nn.Module):
    """A small model that is called in every way but `model(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8, dtype=torch.float64)
        self.middle = nn.Linear(8, 8, dtype=torch.float64)
        self.last = nn.Linear(8, 1, dtype=torch.float64)
        self.side = nn.Linear(5, 1, dtype=torch.float64)
        self.never = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def loss(self, x, rank, middle=None):
        middle = middle or (lambda h: self.middle(h).tanh())
        return self.last(middle(self.first(x).tanh())).square().mean()


class Ranks:
    """What a test needs of its ranks: data for all of them, drawn alike everywhere, and a reducer for this
    one.
    """

    def __init__(self, comm, seed) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.group = process_group(comm)
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.weight: tuple[float, float | None] = (1.0, float(self.size))
        self.scales: list[float] = []
        self.reducers: list[DenseReducer] = []

    def batch(self, empty_rank=None):
        """One batch: a share per rank, ragged."""
        sizes = torch.randint(1, 6, (self.size,), generator=self.random)
        if empty_rank is not None and self.size > 1:
            sizes[empty_rank % self.size] = 0
        return [torch.randn(int(n), 5, dtype=torch.float64, generator=self.random) for n in sizes]

    def reducer(self, model, bucket_bytes=ONE_BUCKET, **options):
        named = model.named_parameters() if isinstance(model, nn.Module) else model
        made = DenseReducer(
            named,
            self.group,
            weights=lambda: self.weight,
            on_reduced=self.scales.append,
            bucket_bytes=bucket_bytes,
            first_bucket_bytes=bucket_bytes,
            timeout_seconds=300,  # the harness ends a test before, and shows what every rank was doing
            **options,
        )
        self.reducers.append(made)  # what nobody holds ends when a rank's garbage is collected, and not on all at once
        return made

    def weigh(self, batch, known=True):
        total = float(sum(len(share) for share in batch))
        self.weight = (float(len(batch[self.rank])), total if known else None)
        return len(batch[self.rank]) / total


@pytest.fixture
def ranks(comm, seed):
    return Ranks(comm, seed)


def whole_loss(model, batch, loss):
    """The mean over all samples, where each share's loss is a mean over that share."""
    total = sum(len(share) for share in batch)
    return sum(len(s) / total * loss(model, s, rank) for rank, s in enumerate(batch) if len(s))


def assert_same_grads(model, reference, **tolerance):
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, f"{name}: the plain model has no gradient"
        else:
            assert p.grad is not None, f"{name}: the plain model has a gradient"
            torch.testing.assert_close(p.grad, q.grad, **(tolerance or EXACT), msg=lambda text, n=name: f"{n}: {text}")


# --- losses: how a model may be reached ---


def called_by_method(model, x, rank):
    return model.loss(x, rank)


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


def reentrant_whole(model, x, rank):
    """All parameters are inside: the outer backward reaches none of them."""
    whole = checkpoint(lambda x: model.loss(x, rank), x.clone().requires_grad_(), use_reentrant=True)
    return whole + 0.0


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


# --- failures ---


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
        reducer._index += ranks.rank == 0
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
    with pytest.raises(RuntimeError, match="weights sum to"):
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


# --- parameters of all kinds ---


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


# --- what is sent, and when ---


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


# --- one start, one group ---


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
