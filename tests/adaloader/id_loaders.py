"""Loaders over small data sets of (number, ids), and a model of one table that looks the ids up."""

from __future__ import annotations

import io

import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from adaloader import AdaLoader

ROWS = 60


class Pairs(TensorDataset):
    """Samples of a number and two ids."""

    def __init__(self, samples=23):
        super().__init__(torch.arange(samples), torch.arange(samples * 2).view(samples, 2) % ROWS)


class Stream(IterableDataset):
    """Each worker gives its own part."""

    def __init__(self, samples=23):
        self.samples = samples

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(first, self.samples, step):
            yield torch.tensor(number), torch.tensor([number % ROWS, 1])


class Lookup(nn.Module):
    """The sum of the rows of some ids."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(ROWS, 4)

    def forward(self, ids):
        return self.table(ids).sum()


def managed(*args, wrap=False, **keywords):
    """Return a loader, the model whose table it manages, and the optimizer."""
    model = Lookup()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    build = AdaLoader.wrap if wrap else AdaLoader
    loader = build(*args, model=model, optimizer=optimizer, min_rows=1, **keywords)
    return loader, model, optimizer


def train(model, optimizer, batch):
    """Make one step with a batch."""
    optimizer.zero_grad()
    model(batch[1]).backward()
    optimizer.step()


def numbers(batches):
    """Return the numbers of the samples of each batch."""
    return [batch[0].tolist() for batch in batches]


def save_and_load(state):
    """Through a file: what a checkpoint does to a state."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)
