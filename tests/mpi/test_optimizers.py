"""Every optimizer on several ranks against plain PyTorch on one process: batches of N ranks are one batch there."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn, optim

from adaloader import (
    AdaLoader,
    RowwiseAdagrad,
    full_optimizer_state_dict,
    full_state_dict,
    load_full_optimizer_state_dict,
    load_full_state_dict,
)
from tests.training import close

ROWS, DIM, STEPS, SHARE = 60, 3, 30, 2
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5}

DENSE = {
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.02, momentum=0.9),
    "SGD, Nesterov": lambda p: optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, dampening": lambda p: optim.SGD(p, lr=0.002, momentum=0.8, dampening=0.3, maximize=True),
    "SGD, weight decay": lambda p: optim.SGD(p, lr=0.05, weight_decay=0.05),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.05, weight_decay=0.05, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam, weight decay": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.05, maximize=True),
    "AdamW, AMSGrad": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.002, momentum=0.5, centered=True, weight_decay=0.05, eps=1e-3),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "rowwise Adagrad": lambda p: RowwiseAdagrad(p, lr=0.05, initial_accumulator_value=0.05),
}
SPARSE = {
    "SGD, momentum": lambda tables, dense: [optim.SGD([*tables, *dense], lr=0.02, momentum=0.9)],
    "SparseAdam": lambda tables, dense: [optim.SparseAdam(tables, lr=0.01), optim.Adam(dense, lr=0.01)],
    "Adagrad": lambda tables, dense: [optim.Adagrad([*tables, *dense], lr=0.05)],
}


class Model(nn.Module):
    """A table and a bag looked up in most batches, and one that only some batches reach."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM, padding_idx=0, sparse=sparse)
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="sum", sparse=sparse)
        self.rare = nn.Embedding(ROWS, DIM, sparse=sparse)
        self.linear = nn.Linear(DIM, 1)

    def tables(self) -> list[nn.Parameter]:
        return [self.emb.weight, self.bag.weight, self.rare.weight]

    def forward(self, ids):
        out = self.emb(ids).sum(1) + self.bag(ids % 7)
        chosen = ids[:, 0] % 8 == 3
        if bool(chosen.any()):
            out = out.index_add(0, chosen.nonzero()[:, 0], self.rare(ids[chosen, 1]))
        return self.linear(torch.tanh(out)).squeeze(1)


def batches(seed: int, ranks: int, count: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Whole batches of (ids, target), of which each rank has a part; most ids of most batches are few."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for at in range(count):
        high = ROWS if at % 10 == 0 else 9
        ids = torch.randint(0, high, (ranks * SHARE, 3), generator=generator)
        made.append((ids, torch.randn(ranks * SHARE, generator=generator)))
    return made


def step(model, optimizers, ids, target, *, number: int) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 + (number % 5)) / 3
            if "betas" in group:
                group["betas"] = (0.9 - 0.02 * (number % 3), group["betas"][1])
        optimizer.zero_grad(set_to_none=number % 4 != 0)
    nn.functional.mse_loss(model(ids), target).backward()
    for optimizer in optimizers:
        optimizer.step()


def train(model, optimizers, loader, *, start: int = 0, dtype=torch.float64) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
    for number, (ids, target) in enumerate(loader):
        step(model, optimizers, ids, target.to(dtype), number=start + number)


def own_part(whole, comm):
    mine = slice(comm.rank * SHARE, (comm.rank + 1) * SHARE)
    return [(ids[mine], target[mine]) for ids, target in whole]


def make(seed, build, dtype, sparse):
    torch.manual_seed(seed)
    model = Model(sparse).to(dtype)
    return model, build(model)


def assert_same_state(ours: dict, theirs: dict, limit: float) -> None:
    assert sorted(ours["state"]) == sorted(theirs["state"])
    for index, entry in theirs["state"].items():
        assert list(ours["state"][index]) == list(entry)
        for name, value in entry.items():
            value = torch.as_tensor(value)
            value = value.to_dense() if value.layout != torch.strided else value
            torch.testing.assert_close(
                torch.as_tensor(ours["state"][index][name]), value, rtol=limit, atol=limit, msg=f"{name} of {index}"
            )


def assert_equal(comm, seed, build, dtype, sparse=False):
    """Train both ways; compare weights and the first optimizer's state on rank 0."""
    whole = batches(seed, comm.size)
    model, optimizers = make(seed, build, dtype, sparse)
    loader = AdaLoader.wrap(own_part(whole, comm), model=model, optimizer=optimizers, min_rows=1)
    train(model, optimizers, loader, dtype=dtype)
    weights, state = full_state_dict(model), full_optimizer_state_dict(model, optimizers[0])
    close(comm, loader)
    if comm.rank:
        return
    plain, plain_optimizers = make(seed, build, dtype, sparse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about sparse tensors
        train(plain, plain_optimizers, whole, dtype=dtype)
    limit = LIMITS[dtype]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=limit, atol=limit, msg=lambda t, n=name: f"{n}: {t}")
    assert_same_state(state, plain_optimizers[0].state_dict(), limit * 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", DENSE)
def test_dense_gradients(comm, seed, kind, dtype):
    assert_equal(comm, seed, lambda model: [DENSE[kind](model.parameters())], dtype)


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_gradients(comm, seed, kind):
    assert_equal(
        comm,
        seed,
        lambda model: SPARSE[kind](model.tables(), model.linear.parameters()),
        torch.float64,
        sparse=True,
    )


@pytest.mark.parametrize("kind", ["SGD, Nesterov", "Adam, weight decay", "NAdam", "rowwise Adagrad", "RMSprop"])
def test_from_plain_to_managed_and_back(comm, seed, kind):
    """Ten steps in plain PyTorch, ten managed, saved, ten more from the file, and on in plain PyTorch."""

    def build(model):
        return [DENSE[kind](model.parameters())]

    whole = batches(seed, comm.size, 40)
    plain, (plain_optimizer,) = make(seed, build, torch.float64, False)
    train(plain, [plain_optimizer], whole[:10])
    model, (optimizer,) = make(seed, build, torch.float64, False)
    train(model, [optimizer], whole[:10])
    loader = AdaLoader.wrap(own_part(whole[10:20], comm), model=model, optimizer=optimizer, min_rows=1)
    train(model, [optimizer], loader, start=10)
    saved = deepcopy((full_state_dict(model), full_optimizer_state_dict(model, optimizer)))
    close(comm, loader)

    model, (optimizer,) = make(seed + 1, build, torch.float64, False)
    for group in optimizer.param_groups:
        group["initial_lr"] = plain_optimizer.param_groups[0]["initial_lr"]
    loader = AdaLoader.wrap(own_part(whole[20:30], comm), model=model, optimizer=optimizer, min_rows=1)
    load_full_state_dict(model, saved[0])
    load_full_optimizer_state_dict(model, optimizer, saved[1])
    train(model, [optimizer], loader, start=20)
    saved = full_state_dict(model), full_optimizer_state_dict(model, optimizer)
    close(comm, loader)
    if comm.rank:
        return
    train(plain, [plain_optimizer], whole[10:20], start=10)
    plain_optimizer.load_state_dict(plain_optimizer.state_dict())  # which rounds NAdam's product otherwise from then on
    plain_optimizer.zero_grad()  # the model that is loaded into has no gradients
    train(plain, [plain_optimizer], whole[20:30], start=20)
    assert_same_state(saved[1], plain_optimizer.state_dict(), 1e-9)
    plain_optimizer.load_state_dict(plain_optimizer.state_dict())
    again, (again_optimizer,) = make(seed + 2, build, torch.float64, False)
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    for each, its in ((plain, plain_optimizer), (again, again_optimizer)):
        train(each, [its], whole[30:], start=30)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_one_rank_reads_rows_that_nobody_touched_between_steps(comm, seed):
    """Under AdamW and momentum they have moved; one rank alone evaluates, also twice between two steps."""
    whole = batches(seed, comm.size)

    def build(model):
        return [optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)]

    model, (optimizer,) = make(seed, build, torch.float64, False)
    plain, (plain_optimizer,) = make(seed, build, torch.float64, False)
    loader = AdaLoader.wrap(own_part(whole, comm), model=model, optimizer=optimizer, min_rows=1)
    generator = torch.Generator().manual_seed(seed)
    for number, (ids, target) in enumerate(loader):
        every = torch.randint(0, ROWS, (11, 3), generator=generator)
        if number % comm.size == comm.rank:
            with torch.no_grad():
                for _ in range(1 + number % 2):
                    torch.testing.assert_close(model(every), plain(every), rtol=1e-9, atol=1e-9)
        for each, its, part in ((model, optimizer, (ids, target)), (plain, plain_optimizer, whole[number])):
            its.zero_grad()
            nn.functional.mse_loss(each(part[0]), part[1].double()).backward()
            its.step()
    close(comm, loader)


@pytest.mark.ranks(2)
def test_a_rank_with_fewer_batches_follows(comm, seed):
    """It takes part in the others' steps, as an owner, with an own history of the table."""
    whole = batches(seed, comm.size, 12)
    share = own_part(whole, comm)[: 12 if comm.rank else 7]

    def build(model):
        return [optim.Adam(model.parameters(), lr=0.02)]

    model, (optimizer,) = make(seed, build, torch.float64, False)
    loader = AdaLoader.wrap(share, model=model, optimizer=optimizer, min_rows=1)
    for ids, target in loader:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(ids), target.double()).backward()
        optimizer.step()
    weights = full_state_dict(model)
    close(comm, loader)
    if comm.rank:
        return
    plain, (plain_optimizer,) = make(seed, build, torch.float64, False)
    for number, (ids, target) in enumerate(whole):
        first = 0 if number < 7 else SHARE
        plain_optimizer.zero_grad()
        nn.functional.mse_loss(plain(ids[first:]), target[first:].double()).backward()
        plain_optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-9)
