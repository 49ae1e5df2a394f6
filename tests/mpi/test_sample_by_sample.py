"""Loops that look up sample by sample: a few ids say little of which batch they are of, and ranks' last batches have
different sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaloader import AdaLoader, full_state_dict
from tests.training import assert_same_tensors, close

ROWS, BATCH = 12, 8


def neighbours(node: int) -> torch.Tensor:
    return torch.tensor([(3 * node + 1) % ROWS, (5 * node + 2) % ROWS])


def by_rows(model, ids, others):
    rows = [model.table.weight[node] for node in ids.tolist()]
    return torch.stack(rows) + torch.stack([model.table(node) for node in others])


def by_neighbours(model, ids, others):
    rows = [model.table(neighbours(node)).mean(0) for node in ids.tolist()]
    return torch.stack(rows) + model.table(others)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(ROWS, 4)
        self.out = nn.Linear(4, 1)
        self.double()


@pytest.mark.parametrize("look_up", [by_rows, by_neighbours])
@pytest.mark.parametrize("draw", range(3))
def test_exact_whatever_the_ids(comm, seed, look_up, draw):
    torch.manual_seed(seed + draw)
    samples = (2 * BATCH + 3) * comm.size + 1  # the last batches have three samples, but for one of four
    ids = torch.randint(ROWS, (2, samples))
    data = TensorDataset(*ids, torch.randn(samples, dtype=torch.float64))

    def train(make_loader):
        torch.manual_seed(seed)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loader = make_loader(model, optimizer)
        for _ in range(4):
            for first, second, target in loader:
                optimizer.zero_grad()
                nn.functional.mse_loss(model.out(look_up(model, first, second)).squeeze(-1), target).backward()
                optimizer.step()
        return model, loader

    plain, _ = train(lambda model, optimizer: DataLoader(data, BATCH * comm.size, shuffle=True))
    model, loader = train(
        lambda model, optimizer: AdaLoader(data, BATCH, shuffle=True, model=model, optimizer=optimizer, min_rows=1)
    )
    weights = full_state_dict(model)
    close(comm, loader)
    if comm.rank == 0:
        assert_same_tensors(weights, plain.state_dict(), 1e-9)
