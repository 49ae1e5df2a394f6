"""A loop that takes all batches of a pass before it works on any, and several steps for each: no lookup of it is
foreseen, and each gradient counts as that of the batch that it is of, though ranks' last batches differ in size."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaloader import AdaLoader, full_state_dict

BATCH, ROWS = 8, 30


class Model(nn.Module):
    def __init__(self, column):
        super().__init__()
        self.table, self.other = nn.Embedding(ROWS, 2), nn.Embedding(ROWS, 2)
        self.out = nn.Linear(2, 1)
        self.column = column
        self.double()

    def forward(self, ids):
        first = self.table(ids[:, 1] if self.column else ids)
        return self.out((first if self.column else first.sum(1)) + self.other(ids[:, 0])).squeeze(1)


def train(loader, model, optimizer, steps):
    for _ in range(3):
        for ids, label in list(loader):
            for _ in range(steps):
                optimizer.zero_grad()
                (model(ids) - label).square().mean().backward()
                optimizer.step()


def make(column):
    torch.manual_seed(7)
    model = Model(column)
    return model, torch.optim.Adagrad(model.parameters(), lr=0.1)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equals_plain(comm, seed, steps, column, dtype):
    drawn = torch.Generator().manual_seed(seed)
    samples = BATCH * comm.size * 2 + comm.size + 1 + seed % 3 * comm.size  # in the last batch every rank has some
    ids = torch.randint(0, ROWS, (samples, 3), generator=drawn).to(dtype)
    data = TensorDataset(ids, torch.randn(samples, generator=drawn, dtype=torch.float64))
    model, optimizer = make(column)
    loader = AdaLoader(data, BATCH, model=model, optimizer=optimizer, min_rows=1)
    train(loader, model, optimizer, steps)
    weights = full_state_dict(model)
    loader.close()
    twin, twin_optimizer = make(column)
    train(DataLoader(data, BATCH * comm.size), twin, twin_optimizer, steps)
    if comm.rank == 0:
        torch.testing.assert_close(weights, twin.state_dict(), rtol=1e-9, atol=1e-11)


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(ROWS, 2, mode="sum"), nn.Linear(2, 1)
        self.double()

    def forward(self, ids, offsets):
        return self.out(self.table(ids * 3 % ROWS, offsets)).squeeze(1)


def ragged(samples):
    ids = [torch.tensor(ids) for ids, _ in samples]
    offsets = torch.tensor([0, *(len(some) for some in ids[:-1])]).cumsum(0)
    return torch.cat(ids), offsets, torch.tensor([label for _, label in samples], dtype=torch.float64)


def test_bags_of_different_lengths(comm, seed):
    """Their ids are computed, and of how many samples they are only the offsets say. Ranks' batches differ in size, and
    the last has one or two samples, as any number of ids might be."""
    rng = np.random.default_rng(seed)
    sizes = [[BATCH - 3 * (rank % 2) for rank in range(comm.size)]] * 3 + [[1 + rank % 2 for rank in range(comm.size)]]
    data = [
        [
            [(rng.integers(0, ROWS, rng.integers(1, 6)).tolist(), float(rng.normal())) for _ in range(samples)]
            for samples in of_ranks
        ]
        for of_ranks in sizes
    ]
    weights = []
    for is_managed in (True, False):
        torch.manual_seed(7)
        model = Bags()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = [ragged(sum(shares, [])) for shares in data]
        if is_managed:
            mine = [ragged(shares[comm.rank]) for shares in data]
            weighed = {"batch_weight": lambda batch: len(batch[2])}
            loader = AdaLoader.wrap(mine, model=model, optimizer=optimizer, min_rows=1, **weighed)
        for _ in range(2):
            for ids, offsets, label in list(loader):
                optimizer.zero_grad()
                (model(ids, offsets) - label).square().mean().backward()
                optimizer.step()
        weights.append(full_state_dict(model) if is_managed else model.state_dict())
        if is_managed:
            loader.close()
    if comm.rank == 0:
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-11)
