"""Ranks that do not do the same: what is allowed gives exact results, what is not an error that names ranks."""

from __future__ import annotations

import copy
import gc
import time
import weakref

import pytest
import torch
from torch import nn

from adaloader import AdaLoader, PeerError, deferred_init, full_state_dict
from tests.idleness import measured_idleness

ROWS, DIM = 1300, 4
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.2),
}


class Net(nn.Module):
    def __init__(self, rows=ROWS, dim=DIM, dense=True, dtype=torch.float64):
        super().__init__()
        self.table = nn.Embedding(rows, dim, dtype=dtype)
        self.top = nn.Linear(dim, 1, dtype=dtype) if dense else nn.Identity()

    def forward(self, ids):
        return self.top(self.table(ids)).square().mean()


def ids_of(random, *shape):
    """Few distinct ids, so that ranks and steps share rows."""
    return torch.randint(0, 30, shape, generator=random) * 43


def train(model, optimizer, batches):
    for ids in batches:
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_plain(model, optimizer, batches_of_ranks):
    """One process: every step averages over the ranks that still have a batch."""
    for step in range(max(map(len, batches_of_ranks))):
        losses = [model(batches[step]) for batches in batches_of_ranks if step < len(batches)]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(model, plain, rank):
    found = full_state_dict(model)
    assert bool(found) == (rank == 0)
    for name, value in found.items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=1e-10)


# --- allowed: exact ---


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_with_different_numbers_of_batches(comm, seed, name, dense, lookahead):
    """All finish, over several epochs; who runs out first changes, and one rank has nothing at all."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    plain = Net(dense=dense)
    model = copy.deepcopy(plain)
    counts = torch.randint(1, 6, (comm.size,), generator=random).tolist()
    counts[int(torch.randint(comm.size, (1,), generator=random))] = 0 if comm.size > 1 else 2
    batches = [[ids_of(random, 3, 2) for _ in range(count)] for count in counts]
    plain_optimizer, optimizer = (OPTIMIZERS[name](m.parameters()) for m in (plain, model))
    loader = AdaLoader.wrap(batches[comm.rank], model=model, optimizer=optimizer, lookahead=lookahead)
    for _ in range(3):
        train(model, optimizer, loader)
        train_plain(plain, plain_optimizer, batches)
    assert_same(model, plain, comm.rank)
    assert loader.stats()["steps"] == 3 * max(counts)
    loader.close()


@pytest.mark.ranks(2)
def test_rank_that_left_its_loop_serves_the_others(comm, seed):
    """Rank 1 breaks off and evaluates any rows alone, while the others sleep or evaluate others; then all train on."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    plain = Net()
    model = copy.deepcopy(plain)
    batches = [[ids_of(random, 3, 2) for _ in range(8)] for _ in range(comm.size)]
    plain_optimizer, optimizer = (OPTIMIZERS["adagrad"](m.parameters()) for m in (plain, model))
    loader = AdaLoader.wrap(batches[comm.rank], model=model, optimizer=optimizer)
    for _ in range(3):
        taken = 0
        for ids in loader:
            train(model, optimizer, [ids])
            taken += 1
            if taken == 3:
                break
        train_plain(plain, plain_optimizer, [b[:3] for b in batches])
        if comm.rank == 0:
            time.sleep(0.3)
        with torch.no_grad():
            for _ in range(5 * comm.rank):
                ids = torch.randint(0, ROWS, (40,))
                torch.testing.assert_close(model.table(ids), plain.table(ids), rtol=0, atol=1e-10)
    train(model, optimizer, loader)
    train_plain(plain, plain_optimizer, batches)
    assert_same(model, plain, comm.rank)
    loader.close()


def test_loop_that_skips_a_bad_batch_on_all_ranks(comm, seed):
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    plain = Net()
    model = copy.deepcopy(plain)
    batches = [[ids_of(random, 3, 2) for _ in range(6)] for _ in range(comm.size)]
    plain_optimizer, optimizer = (OPTIMIZERS["sgd"](m.parameters()) for m in (plain, model))
    mine = list(batches[comm.rank])
    for at, bad in ((4, ROWS), (1, -1), (0, 2**40)):
        mine.insert(at, torch.full((3, 2), bad))
    loader = AdaLoader.wrap(mine, model=model, optimizer=optimizer)
    refused = 0
    for ids in loader:
        try:
            train(model, optimizer, [ids])
        except IndexError as error:
            refused += 1
            assert "'table.weight'" in str(error) and f"0 to {ROWS - 1}" in str(error)
    assert refused == 3
    train_plain(plain, plain_optimizer, batches)
    assert_same(model, plain, comm.rank)
    loader.close()


# --- not allowed: an error that says who ---


def build(model, make=OPTIMIZERS["sgd"], **options):
    optimizer = make(model.parameters())
    AdaLoader.wrap([torch.zeros(1, 1, dtype=torch.int64)], model=model, optimizer=optimizer, **options).close()


def frozen(model):
    model.table.requires_grad_(False)
    return model


def under_deferred_init(seed):
    with deferred_init(min_rows=100, seed=seed):
        return Net()


@pytest.mark.ranks(2)
def test_ranks_with_different_models_or_settings(comm):
    """Every rank raises, while the model is built, and none waits."""
    odd = comm.rank == comm.size - 1
    cases = [
        lambda: build(Net(rows=ROWS + odd)),
        lambda: build(Net(dim=DIM + odd)),
        lambda: build(Net(dtype=torch.float32 if odd else torch.float64)),
        lambda: build(Net(dense=odd)),
        lambda: build(frozen(Net()) if odd else Net()),
        lambda: build(Net(), min_rows=5000 if odd else 1000),
        lambda: build(Net(), min_rows=1001 if odd else 1000),
        lambda: build(Net(), OPTIMIZERS["adagrad" if odd else "sgd"]),
        lambda: build(under_deferred_init(1) if odd else Net()),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=rf"ranks \[{comm.size - 1}\] have other .* than rank 0") as raised:
            case()
        assert f"this is rank {comm.rank}" in str(raised.value)
    build(Net())


@pytest.mark.ranks(2)
def test_what_differs_is_shown_however_long_the_rest_is(comm):
    """Here it is the last of 40 parameters; on every rank two ranks' texts are shown, one of them its own if it can."""
    odd = comm.rank > 0
    model = Net()
    model.tower = nn.ModuleList([nn.Linear(8, 8) for _ in range(20)])
    model.last = nn.Linear(8, 3 + comm.rank)
    with pytest.raises(ValueError) as raised:
        build(model)
    text, other = str(raised.value), comm.rank or 1
    assert f"this is rank {comm.rank}" in text and len(text) < 1000
    ours, theirs = text.split("rank 0 has ")[1].split(f"and rank {other} has ")
    assert "('last.weight', (3, 8)" in ours and f"('last.weight', ({3 + other}, 8)" in theirs
    with pytest.raises(ValueError, match="'shared_memory': True.* has .*'shared_memory': False"):
        build(Net(), shared_memory=not odd)
    build(Net())


@pytest.mark.ranks(2)
def test_ranks_with_different_datasets(comm):
    """Every rank must see the whole data: one that was given its share by hand would train on a share of that."""
    odd = comm.rank == comm.size - 1
    for samples, batch_size, drop_last in ((50 + odd, 4, False), (50, 4 + odd, False), (50, 4, odd)):
        model = Net()
        with pytest.raises(ValueError, match=rf"ranks \[{comm.size - 1}\] have other dataset"):
            AdaLoader(
                range(samples),
                batch_size=batch_size,
                drop_last=drop_last,
                model=model,
                optimizer=OPTIMIZERS["sgd"](model.parameters()),
            )


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["lr", "lr_decay", "eps"])
def test_ranks_with_different_hyperparameters(comm, name):
    """Every rank is told which group, which values and which ranks."""
    model = Net(dense=False)
    groups = [
        {"params": list(model.top.parameters()) or [nn.Parameter(torch.zeros(1))]},
        {"params": model.table.parameters()},
    ]
    optimizer = torch.optim.Adagrad(groups, lr=0.5, lr_decay=0.25, eps=0.125)
    loader = AdaLoader.wrap([torch.tensor([[1, 2]])] * 6, model=model, optimizer=optimizer)
    seen = 0
    with pytest.raises(PeerError) as raised:
        for ids in loader:
            if seen == 3 and comm.rank == 1:
                optimizer.param_groups[1][name] *= 2
            train(model, optimizer, [ids])
            seen += 1
    value = optimizer.param_groups[1][name]
    mine, others = (value, value / 2) if comm.rank == 1 else (value * 2, value)
    text = str(raised.value)
    assert f"{name} of parameter group 1 (Adagrad)" in text
    assert f"{mine!r} on rank 1" in text
    assert f"{others!r} on rank {', '.join(str(r) for r in range(comm.size) if r != 1)}" in text
    assert seen in (3, 4, 5)  # in that very step, or at the next lookup
    loader.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("what", ["leaves the loop", "passes over a batch"])
@pytest.mark.parametrize(
    "options",
    [{}, {"shared_memory": False}, {"staleness": 2}, {"lookahead": 0}],
    ids=["shared", "apart", "stale", "blind"],
)
def test_rank_that_alone_goes_to_another_batch(comm, seed, what, options):
    """Gradients of different batches would be averaged: every rank is told who is where."""
    random = torch.Generator().manual_seed(seed)
    model = Net(dense=False)  # with dense parameters see tests/test_failing_jobs.py
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    samples = ids_of(random, 20 * 5 * comm.size, 2)
    loader = AdaLoader(samples, batch_size=5, model=model, optimizer=optimizer, timeout_seconds=30.0, **options)
    odd, at = comm.size - 1, int(torch.randint(1, 8, (1,), generator=random))
    leaves = what == "leaves the loop"
    steps = 0
    with pytest.raises(PeerError) as raised:
        for _ in range(2):
            for number, ids in enumerate(loader):
                if number == at and comm.rank == odd and steps == at:
                    if leaves:
                        break
                    continue
                train(model, optimizer, [ids])
                steps += 1
    others = ", ".join(str(rank) for rank in range(odd))
    seen = at if leaves else at + 1  # until then the loop may still work on the batch that it passed over
    text = f"number {seen} on rank {others}, number {0 if leaves else seen + 1} on rank {odd}"
    assert f"step {seen}: ranks train on different batches: {text}" in str(raised.value)
    assert steps <= seen + (2 if "staleness" not in options else 4)
    loader.close()


@pytest.mark.ranks(2)
def test_rank_that_is_late_is_named_and_waited_for_again(comm, seed):
    """Rows of step 3 that do not come in time: an error, after which the loop may still go on."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    plain = Net(dense=False)
    model = copy.deepcopy(plain)
    samples = ids_of(random, 6 * 5 * comm.size, 2)
    plain_optimizer, optimizer = (OPTIMIZERS["sgd"](m.parameters()) for m in (plain, model))
    loader = AdaLoader(samples, batch_size=5, model=model, optimizer=optimizer, timeout_seconds=2.0)
    for number, ids in enumerate(loader):
        if number == 3 and comm.rank == 1:
            time.sleep(3.0)
        if number == 4 and comm.rank != 1:
            with pytest.raises(PeerError, match=r"waited .* s \(timeout_seconds=2\) for rank 1 to take step 3"):
                model(ids)
        train(model, optimizer, [ids])
    train(plain, plain_optimizer, samples.split(5 * comm.size))
    assert_same(model, plain, comm.rank)
    loader.close()


@pytest.mark.ranks(2)
def test_rank_that_closes_early_is_named(comm, seed):
    samples = ids_of(torch.Generator().manual_seed(seed), 6 * 5 * comm.size, 2)
    model = Net(dense=False)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = AdaLoader(samples, batch_size=5, model=model, optimizer=optimizer)
    last = comm.size - 1
    if comm.rank == last:
        batches = iter(loader)
        train(model, optimizer, [next(batches), next(batches)])
        loader.close()
        return
    with pytest.raises(PeerError, match=rf"rank {last}, which has closed its loader or ended"):
        train(model, optimizer, loader)
    loader.close()


# --- at rest ---


@pytest.mark.ranks(2)
def test_idle_background_threads_take_little(comm):
    gc.collect()  # process groups of earlier tests: each has threads that wake up too
    model = Net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = AdaLoader.wrap([torch.tensor([[1, 2]])] * 6, model=model, optimizer=optimizer)
    train(model, optimizer, loader)
    full_state_dict(model)
    time.sleep(0.2)
    with measured_idleness() as idle:
        time.sleep(2.0)
    assert idle.share < 0.1 and idle.wakes_per_second < 400, idle
    loader.close()


def test_what_closed_loaders_held_is_freed_with_their_models(comm):
    managers = []
    for _ in range(3):
        model = Net()
        optimizer = OPTIMIZERS["adagrad"](model.parameters())
        loader = AdaLoader.wrap([torch.tensor([[1, 2]])] * 3, model=model, optimizer=optimizer)
        train(model, optimizer, loader)
        managers.append(weakref.ref(loader._session.managed.manager))
        loader.close()
        del model, optimizer, loader
    deadline = time.monotonic() + 20  # each rank's background thread goes on until the others have closed too
    while any(manager() is not None for manager in managers) and time.monotonic() < deadline:
        time.sleep(0.05)
        gc.collect()
    assert [manager() for manager in managers] == [None] * 3
