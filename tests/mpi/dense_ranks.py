"""What the tests of dense gradients on several ranks have in common: a model, data of all ranks, and a reducer."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaloader.dense.parameters import DenseReducer
from adaloader.dense.process_group import process_group

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


def called_by_method(model, x, rank):
    return model.loss(x, rank)


def reentrant_whole(model, x, rank):
    """All parameters are inside: the outer backward reaches none of them."""
    whole = checkpoint(lambda x: model.loss(x, rank), x.clone().requires_grad_(), use_reentrant=True)
    return whole + 0.0
