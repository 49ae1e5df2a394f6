"""With staleness, on one machine: tables whose records all ranks update, beside tables for which that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

import adaloader
import pm.colocated.neighbours
import pm.colocated.shared_tables
from adaloader import AdaLoader
from adaloader.model.managed_model import managed_models

pytestmark = pytest.mark.ranks(2)
ROWS, DIM = 90, 4
OF_ROWS = {"request", "copies", "records", "deltas", "refresh", "fetched", "push", "keep"}
"""Kinds of messages that would be about rows."""


class TwoTables(nn.Module):
    """A score per sample: linear in the rows of both tables, so that plain SGD does not depend on when it happens."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Embedding(ROWS, DIM)
        self.second = nn.Embedding(ROWS // 2, DIM)
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.first(ids).sum((1, 2)) + self.second(ids // 2).sum((1, 2))


def sample_set(seed: int, samples: int = 360) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ROWS, (samples, 3), generator=generator)
    return torch.utils.data.TensorDataset(ids, torch.randn(samples, dtype=torch.float64, generator=generator))


def train(loader, model, optimizers) -> None:
    for ids, coefficients in loader:
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(ids) * coefficients).mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def plainly_trained(model: nn.Module, data, ranks: int, lr: float, epochs: int = 1) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(epochs):
        train(torch.utils.data.DataLoader(data, 6 * ranks), model, [optimizer])
    return model.state_dict()


def is_shared(model: nn.Module) -> dict[str, bool]:
    return {table.name.removesuffix(".weight"): table.table.store.is_shared for table in managed_models[model].tables}


def assert_state(comm, model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = adaloader.full_state_dict(model)
    if comm.rank == 0:
        for name, values in expected.items():
            torch.testing.assert_close(state[name], values, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("staleness", [None, 1])
def test_tables_of_one_kind_share_a_store_and_no_message_is_about_their_rows(comm, seed, staleness):
    model, data = TwoTables(seed), sample_set(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    loader = AdaLoader(data, 6, model=model, optimizer=optimizer, min_rows=1, staleness=staleness)
    train(loader, model, [optimizer])
    train(loader, model, [optimizer])
    assert is_shared(model) == {"first": True, "second": True}
    tables = managed_models[model].tables
    assert tables[0].table.store is tables[1].table.store
    stats = loader.stats()
    assert stats["neighbour_rows"] > 0 and stats["relocations"] == stats["replications"] == 0
    assert not OF_ROWS & {kind for kind, sent in stats["bytes_by_kind"].items() if sent}
    assert_state(comm, model, plainly_trained(TwoTables(seed), data, comm.size, 0.3, epochs=2))
    loader.close()


def test_an_update_is_seen_by_the_others_at_once(comm, seed):
    model = nn.Embedding(ROWS, DIM).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [torch.tensor([7, 8 + comm.rank])] * 6
    loader = AdaLoader.wrap(batches, model=model, optimizer=optimizer, min_rows=1, staleness=None)
    for step, ids in enumerate(loader):
        comm.Barrier()
        out = model(ids)
        if step > 1:  # before, the table's first step is being watched
            assert (out[0] == step * comm.size).all() and (out[1] == step).all()
        comm.Barrier()
        optimizer.zero_grad()
        (-comm.size * out.sum()).backward()
        optimizer.step()
    loader.close()


def test_rows_that_are_scaled_down_lose_no_update(comm, seed):
    """Lookups with max_norm scale rows that others update."""
    torch.manual_seed(seed)
    model = nn.Embedding(ROWS, DIM, max_norm=1.0).double()
    with torch.no_grad():
        model.weight *= 3
    batches = [torch.randint(0, ROWS, (20,)) for _ in range(12)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = AdaLoader.wrap(batches, model=model, optimizer=optimizer, min_rows=1, staleness=None)
    for ids in loader:
        optimizer.zero_grad()
        out = model(ids)
        assert (out.norm(dim=1) < 1.1).all()  # a step of another may come between
        out.sum().backward()
        optimizer.step()
    comm.Barrier()
    norms = model(torch.cat(batches)).detach().norm(dim=1)
    assert (norms <= 1 + 1e-6).all() and (norms > 0.5).any()
    loader.close()


def test_adam_and_frozen_tables_beside_it(comm, seed):
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Embedding(ROWS, DIM) for name in ("sgd", "adam", "frozen")}).double()
    model["frozen"].requires_grad_(False)
    before = {name: table.weight.detach().clone() for name, table in model.items()}
    optimizers = [torch.optim.SGD(model["sgd"].parameters(), 0.3), torch.optim.Adam(model["adam"].parameters(), 0.01)]
    data = sample_set(seed)
    loader = AdaLoader(data, 6, model=model, optimizer=optimizers, min_rows=1, staleness=None)

    def score(ids):
        return sum(table(ids).sum((1, 2)) for table in model.values())

    for ids, coefficients in loader:
        for optimizer in optimizers:
            optimizer.zero_grad()
        (score(ids) * coefficients).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert is_shared(model) == {"sgd": True, "adam": False, "frozen": False}
    state = adaloader.full_state_dict(model)
    if comm.rank == 0:
        plain = nn.Embedding(ROWS, DIM).double()
        plain.weight.data.copy_(before["sgd"])
        optimizer = torch.optim.SGD(plain.parameters(), 0.3)
        for ids, coefficients in torch.utils.data.DataLoader(data, 6 * comm.size):
            optimizer.zero_grad()
            (plain(ids).sum((1, 2)) * coefficients).mean().backward()
            optimizer.step()
        torch.testing.assert_close(state["sgd.weight"], plain.weight.detach(), rtol=1e-11, atol=1e-12)
        assert torch.equal(state["frozen.weight"], before["frozen"])
        assert not torch.equal(state["adam.weight"], before["adam"])
    loader.close()


@pytest.mark.parametrize("why", ["one rank cannot map it", "no room", "apart"])
def test_where_memory_cannot_be_shared_rows_are_moved_and_copied(comm, seed, monkeypatch, why):
    options = {}
    if why == "one rank cannot map it":
        original = pm.colocated.neighbours.map_block

        def cannot(process, file, size):
            if comm.rank == comm.size - 1:
                raise OSError("no such file")
            return original(process, file, size)

        monkeypatch.setattr(pm.colocated.neighbours, "map_block", cannot)
    elif why == "no room":
        monkeypatch.setattr(pm.colocated.shared_tables, "most_keys", lambda: 10 if comm.rank == 0 else 1 << 40)
    else:
        options["shared_memory"] = False
    model, data = TwoTables(seed), sample_set(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    loader = AdaLoader(data, 6, model=model, optimizer=optimizer, min_rows=1, staleness=None, **options)
    train(loader, model, [optimizer])
    assert is_shared(model) == {"first": False, "second": False}
    assert_state(comm, model, plainly_trained(TwoTables(seed), data, comm.size, 0.3))
    loader.close()


def test_rows_of_a_deferred_table_start_as_on_one_process(comm, seed):
    def build():
        with adaloader.deferred_init(min_rows=2, seed=seed):
            return nn.Embedding(5000, DIM)

    model, alone = build(), build()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed + comm.rank)
    batches = [torch.randint(0, 5000, (10,), generator=generator) for _ in range(8)]
    loader = AdaLoader.wrap(batches, model=model, optimizer=optimizer, staleness=None)
    for ids in loader:
        optimizer.zero_grad()
        (model(ids) * 0).sum().backward()
        optimizer.step()
    plain_loader = AdaLoader.wrap([torch.arange(3)], model=alone, comm=MPI.COMM_SELF)
    everyones = comm.allgather(torch.cat(batches).numpy())
    ids = torch.from_numpy(np.concatenate(everyones))
    assert torch.equal(model(ids).detach(), alone(ids).detach())
    assert is_shared(model) == {"weight": True}
    held = sum(comm.allgather(len(managed_models[model].tables[0].table.store)))
    assert held == len(ids.unique())
    loader.close()
    plain_loader.close()


def test_another_loader_brings_the_optimizer(comm, seed):
    """Until then no optimizer holds the table, and its rows are moved and copied; so they are from then on."""
    model, data = TwoTables(seed), sample_set(seed)
    first = AdaLoader(data, 6, model=model, min_rows=1, staleness=None)
    for ids, _ in first:
        model(ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    second = AdaLoader(data, 6, model=model, optimizer=optimizer, min_rows=1, staleness=None)
    train(second, model, [optimizer])
    assert_state(comm, model, plainly_trained(TwoTables(seed), data, comm.size, 0.3))
    first.close()
    second.close()
