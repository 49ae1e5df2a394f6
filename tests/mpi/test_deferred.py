"""Declared tables on 1 to 4 ranks: the same initial values, plain training from them, memory for touched rows only."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import adaloader
from adaloader import AdaLoader, DeferredInitError
from adaloader.deferred.deferred_tensor import program_of
from tests.training import OPTIMIZERS, Shop, Visits, assert_same_optimizer_state, assert_same_tensors, close, train

BATCH = 4  # a rank

INITIALISERS = {
    "as constructed": lambda model: None,
    "scaled": lambda model: model.item.weight.data.mul_(0.01).add_(1.0),
    "uniform": lambda model: nn.init.xavier_uniform_(model.item.weight),
    "truncated": lambda model: nn.init.trunc_normal_(model.item.weight, std=0.02),
    "constant": lambda model: nn.init.constant_(model.item.weight, 0.25),
    "ranges": lambda model: (model.item.weight.data[:9].zero_(), model.item.weight.data[20:].uniform_(-1, 1)),
}


def declare(seed, initialise="as constructed", min_rows=2, **options):
    with adaloader.deferred_init(min_rows=min_rows, seed=seed):
        model = Shop()
        INITIALISERS[initialise](model)
    return model


def values_of(model, seed) -> dict[str, torch.Tensor]:
    """What declared tables start from, made here without any rank: what any number of ranks must give."""
    values = {}
    for name, parameter in model.named_parameters():
        program = program_of(parameter)
        if program is not None:
            out = np.empty(program.shape, program.dtype)
            program.fill(np.arange(program.shape[0]), out, seed=seed, name=name)
            values[name] = torch.from_numpy(out)
    return values


@pytest.mark.parametrize("initialise", sorted(INITIALISERS))
def test_initial_values_are_the_same_at_any_number_of_ranks(comm, seed, initialise):
    expected = values_of(declare(seed, initialise), seed)
    model = declare(seed + comm.rank, initialise)  # the seed of rank 0 wins
    loader = AdaLoader(Visits(9, seed), batch_size=BATCH, model=model, min_rows=1)
    ids = torch.randint(0, 53, (3, 5))
    assert torch.equal(model.item(ids), expected["item.weight"][ids])  # on demand, other ids on each rank
    exported = adaloader.full_state_dict(model)
    if comm.rank == 0:
        assert_same_tensors({name: exported[name] for name in expected}, expected, 0)
        assert torch.equal(exported["related.weight"], exported["item.weight"])
    close(comm, loader)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("built", ["inside the context", "after it"])
def test_training_equals_a_plain_model_with_the_same_start(comm, seed, kind, built):
    data, make_optimizer = Visits(61, seed), OPTIMIZERS[kind]
    with adaloader.deferred_init(min_rows=2, seed=seed + comm.rank):
        model = Shop()
        optimizer = make_optimizer(model.parameters()) if built == "inside the context" else None
    optimizer = optimizer or make_optimizer(model.parameters())
    loader = AdaLoader(data, batch_size=BATCH, model=model, optimizer=optimizer)
    untouched = adaloader.full_state_dict(model)
    train(model, optimizer, loader), train(model, optimizer, loader)
    weights, state = adaloader.full_state_dict(model), adaloader.full_optimizer_state_dict(model, optimizer)
    if comm.rank == 0:
        twin = Shop()
        twin.load_state_dict(untouched)
        twin_optimizer = make_optimizer(twin.parameters())
        for _ in range(2):
            train(twin, twin_optimizer, DataLoader(data, batch_size=BATCH * comm.size))
        assert_same_tensors(weights, twin.state_dict())
        assert_same_optimizer_state(state, twin_optimizer.state_dict())
    close(comm, loader)


def test_a_declared_model_takes_a_checkpoint(comm, seed):
    """What rank 0 loads replaces initial values everywhere, those of rows not touched so far included."""
    torch.manual_seed(seed)
    saved = Shop().state_dict()
    model = declare(seed)
    loader = AdaLoader(Visits(9, seed), batch_size=BATCH, model=model)
    adaloader.load_full_state_dict(model, saved if comm.rank == 0 else None)
    assert torch.equal(model.item(torch.arange(53)), saved["item.weight"])
    exported = adaloader.full_state_dict(model)
    if comm.rank == 0:
        assert_same_tensors(exported, saved, 0)
    close(comm, loader)


def test_declared_and_built_tables_live_side_by_side(comm, seed):
    data = Visits(61, seed)
    model = declare(seed, min_rows=50)  # the items alone
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    loader = AdaLoader(data, batch_size=BATCH, model=model, optimizer=optimizer, min_rows=40)  # and users, not words
    assert type(model.words.weight) is nn.Parameter
    untouched = adaloader.full_state_dict(model)
    train(model, optimizer, loader)
    weights = adaloader.full_state_dict(model)
    if comm.rank == 0:
        twin = Shop()
        twin.load_state_dict(untouched)
        train(twin, OPTIMIZERS["adagrad"](twin.parameters()), DataLoader(data, batch_size=BATCH * comm.size))
        assert_same_tensors(weights, twin.state_dict())
    close(comm, loader)


class Vast(nn.Module):
    """Two tables of 4 TB each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(1 << 34, 64)
        self.second = nn.EmbeddingBag(1 << 34, 64, padding_idx=7)

    def forward(self, ids):
        return self.first(ids).sum() + self.second(ids).pow(2).sum()


class Ids(torch.utils.data.Dataset):
    """Five rows a sample, over the whole table; each sample has its own."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return (torch.arange(5) * 64 + index) * 53_687_091


def test_memory_is_that_of_touched_rows(comm):
    """Tables of 4 TB each: what is held grows in proportion to rows touched, and what needs it whole says so."""
    with adaloader.deferred_init(seed=3):
        model = Vast()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    loader = AdaLoader(Ids(), batch_size=4, model=model, optimizer=optimizer)
    before, sizes = resident_bytes(), []
    for number, ids in enumerate(loader):
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number in (0, 16 // comm.size - 1):
            sizes.append(loader.stats()["memory_bytes"])
    grown = resident_bytes() - before
    record_bytes = 2 * 64 * 4 + 8
    held = np.array([loader.stats()["memory_bytes"]], dtype=np.int64)
    total = held.copy()
    comm.Allreduce(held, total)
    touched = 2 * 5 * len(Ids())
    assert touched * record_bytes <= total[0] <= 2 * touched * record_bytes + comm.size * (1 << 16)
    assert sizes[0] <= sizes[1]
    assert grown < 200 << 20
    with pytest.raises(MemoryError, match="8,796,093,022,208 bytes on rank 0"):
        adaloader.full_state_dict(model)
    with pytest.raises(IndexError, match="17179869184 is out of range for table 'first.weight'"):
        model.first(torch.tensor([1 << 34]))
    close(comm, loader)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def test_rows_without_an_initial_value_are_refused_on_every_rank(comm):
    with adaloader.deferred_init(min_rows=2):
        model = Shop()
        model.bare = nn.Parameter(torch.empty(30, 4, dtype=torch.float64))
    with pytest.raises(DeferredInitError, match=r"rows 0 to 29 of table 'bare'"):
        AdaLoader(Visits(5, 0), model=model)


@pytest.mark.ranks(2)
def test_ranks_that_declare_differently_are_told(comm, seed):
    model = declare(seed, "constant" if comm.rank == 0 else "uniform")
    with pytest.raises(ValueError, match="have other tables or settings than rank 0"):
        AdaLoader(Visits(5, 0), model=model)
