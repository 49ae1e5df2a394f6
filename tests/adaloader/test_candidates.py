"""Bare parameters: a table if first looked up, a dense parameter if first used otherwise."""

import copy
import io
import textwrap
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader, UnsupportedOptimizerError
from adaloader.tables.candidate import CandidateParameter
from adaloader.tables.table_parameter import TableParameter
from tests.launch import launch

ROWS, DIM = 1200, 6


class Bare(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, DIM))
        self.out = nn.Linear(DIM, 1)
        self.use = use

    def forward(self, ids):
        return self.out(self.use(self.table, ids)).squeeze(-1)


LOOKUPS = {
    "embedding": lambda table, ids: F.embedding(ids, table),
    "embedding with keywords": lambda table, ids: F.embedding(input=ids, weight=table),
    "torch.embedding": lambda table, ids: torch.embedding(table, ids),
    "bag": lambda table, ids: F.embedding_bag(ids.view(-1, 1), table, mode="sum"),
    "index_select": lambda table, ids: torch.index_select(table, 0, ids),
    "index_select method": lambda table, ids: table.index_select(0, ids),
    "tensor index": lambda table, ids: table[ids],
    "list index": lambda table, ids: table[ids.tolist()],
    "array index": lambda table, ids: table[ids.numpy()],
    "tuple index": lambda table, ids: table[ids, :],
}

DENSE = {
    "matmul": lambda table, ids: F.one_hot(ids, ROWS).float() @ table,
    "transpose": lambda table, ids: table.t()[:, ids].t(),
    "slice": lambda table, ids: table[: len(ids)],
    "mask": lambda table, ids: table[torch.arange(ROWS) < len(ids)],
    "sum": lambda table, ids: table.sum(0).expand(len(ids), DIM),
}


def make(use, loader_of, steps=6):
    torch.manual_seed(1)
    model = Bare(use)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    batches = [torch.randint(0, ROWS, (9,), generator=torch.Generator().manual_seed(t)) for t in range(steps)]
    loader = loader_of(batches, model, optimizer)
    losses = []
    for ids in loader:
        loss = model(ids).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses, loader


def managed(batches, model, optimizer):
    return AdaLoader.wrap(batches, model=model, optimizer=optimizer)


@pytest.mark.parametrize("name", LOOKUPS)
def test_first_lookup_makes_a_table(name):
    model, losses, loader = make(LOOKUPS[name], managed)
    plain, expected, _ = make(LOOKUPS[name], lambda batches, *_: batches)
    assert type(model.table) is TableParameter, loader.explain()
    assert loader.stats()["lookups"] > 0
    np.testing.assert_allclose(losses, expected, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("first", ["adaloader", "the other"])
def test_functions_that_another_library_has_replaced_are_lookups(first):
    """As torch_geometric replaces `torch.index_select`, by a function that calls it."""
    replacing = """
        import torch
        plain = torch.index_select
        def other(input, dim, index, out=None):
            return plain(input, dim, index)
        other.__module__ = "torch_other.library"
        torch.index_select = other
    """
    training = """
        import torch
        from adaloader import AdaLoader
        class Bare(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Parameter(torch.zeros(1200, 2))
                self.declared = torch.nn.Embedding(1200, 2)
            def forward(self, ids):
                return torch.index_select(self.table, 0, ids) + torch.index_select(self.declared.weight, 0, ids)
        model = Bare()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loader = AdaLoader.wrap([torch.tensor([3, 5])] * 3, model=model, optimizer=optimizer)
        for ids in loader:
            model(ids).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        print(loader.stats()["lookups"], type(model.table).__name__, type(model.declared.weight).__name__)
    """
    parts = ["import adaloader", replacing] if first == "adaloader" else [replacing]
    result = launch(0, "\n".join(textwrap.dedent(part) for part in (*parts, training)))
    assert result.stdout.split() == ["12", "TableParameter", "TableParameter"], result.stderr


@pytest.mark.parametrize("name", DENSE)
def test_first_dense_use_keeps_it_dense(name):
    model, losses, loader = make(DENSE[name], managed)
    plain, expected, _ = make(DENSE[name], lambda batches, *_: batches)
    assert type(model.table) is nn.Parameter
    assert losses == expected
    assert loader.stats()["lookups"] == 0


def test_waits_for_its_first_use():
    model = Bare(LOOKUPS["embedding"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaLoader.wrap([torch.tensor([1])], model=model, optimizer=optimizer)
    table = model.table
    assert type(table) is CandidateParameter and isinstance(table, nn.Parameter)
    assert table.shape == (ROWS, DIM) and table.requires_grad and len(table) == ROWS
    assert "Parameter" in repr(table)
    model.state_dict()
    assert type(table) is CandidateParameter
    table.sum()
    assert type(table) is nn.Parameter


def test_named_in_keys_it_is_a_table_at_once():
    model = Bare(LOOKUPS["embedding"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader.wrap(
        [torch.tensor([1, 2])], model=model, optimizer=optimizer, keys={model.table: lambda ids: ids}
    )
    assert type(model.table) is TableParameter, loader.explain()
    for ids in loader:
        model(ids)
    assert loader.stats()["intent_coverage"] == 1.0


def test_unsupported_optimizer_matters_only_for_tables():
    dense, _, _ = make_with_rprop(DENSE["sum"])
    assert type(dense.table) is nn.Parameter
    with pytest.raises(UnsupportedOptimizerError, match="table 'table' is trained by .*Rprop"):
        make_with_rprop(LOOKUPS["embedding"])


def make_with_rprop(use):
    torch.manual_seed(1)
    model = Bare(use)
    optimizer = torch.optim.Rprop(model.parameters())
    loader = AdaLoader.wrap([torch.tensor([1, 2])], model=model, optimizer=optimizer)
    for ids in loader:
        model(ids).sum().backward()
        optimizer.step()
    return model, None, loader


def test_weights_of_torch_modules_and_small_ones_are_left_alone():
    model = nn.Sequential(nn.Linear(4, ROWS), nn.Linear(ROWS, 4))
    model.small = nn.Parameter(torch.zeros(10, 3))
    kinds = [type(p) for p in model.parameters()]
    AdaLoader.wrap([1], model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert [type(p) for p in model.parameters()] == kinds


def test_optimizer_state_goes_along():
    def after_plain_steps(loader_of):
        torch.manual_seed(2)
        model = Bare(LOOKUPS["tensor index"])
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, lr_decay=0.1)
        for t in range(8):
            if t == 3:
                loader_of(model, optimizer)
            ids = torch.randint(0, ROWS, (30,), generator=torch.Generator().manual_seed(t))
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = after_plain_steps(lambda model, optimizer: AdaLoader.wrap([1], model=model, optimizer=optimizer))
    plain, plain_optimizer = after_plain_steps(lambda model, optimizer: None)
    assert type(model.table) is TableParameter
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        optimizer.state_dict()["state"], plain_optimizer.state_dict()["state"], atol=1e-6, rtol=1e-6
    )


def test_a_row_that_is_made_for_another_rank_while_the_candidate_becomes_a_table_has_its_value():
    """Other ranks may ask for rows before this one's first lookup, which takes the memory that rows are made of."""
    model = Bare(LOOKUPS["embedding"])
    values = model.table.detach().clone()
    loader = AdaLoader.wrap([torch.arange(9)], model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    manager = loader._session.managed.manager
    (table,) = manager.tables
    fill, is_making = table.spec.fill, threading.Event()

    def slow_fill(rows, out):
        is_making.set()
        time.sleep(0.2)
        fill(rows, out)

    table.spec = replace(table.spec, fill=slow_fill)
    rows = np.arange(20, 40)
    other = threading.Thread(target=manager.touch, args=(table, rows))
    other.start()
    assert is_making.wait(60)
    for ids in loader:
        model(ids).sum().backward()
    other.join()
    np.testing.assert_array_equal(manager.pull(table, rows, np.empty((20, DIM), np.float32)), values[20:40].numpy())
    loader.close()


def test_copies_and_pickles_are_plain():
    """Of a model whose parameter has not been used yet, as of an average that begins with the loop."""
    torch.manual_seed(1)
    model = Bare(LOOKUPS["tensor index"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = managed([torch.arange(9)], model, optimizer)
    model.table.note = "of the user's own"
    with io.BytesIO() as file:
        torch.save(model.table, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    copied = copy.deepcopy(model)
    before = model.state_dict()["table"].clone()
    assert type(model.table) is CandidateParameter
    for plain in (copied.table, loaded):
        assert type(plain) is nn.Parameter
        assert torch.equal(plain.mul(1.0), before)
    assert loaded.note == model.table.note
    with torch.no_grad():
        copied.table.zero_()
    assert torch.equal(model.state_dict()["table"], before)
    loader.close()
