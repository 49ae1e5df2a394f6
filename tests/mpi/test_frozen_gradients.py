"""Clipping reads the gradients of all parameters: a frozen table among them has none, before and after, so that no
weight decay moves it.
"""

import math

import pytest
import torch
from torch import nn

from adaloader import AdaLoader, full_state_dict

ROWS, DIM, STEPS = 30, 2, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Embedding(ROWS, DIM)
        self.trained = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(DIM, 1)
        self.double()

    def forward(self, ids):
        return self.out(self.frozen(ids) + self.trained(ids)).square().mean()


def train(batches, wrap, norm_type):
    torch.manual_seed(7)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    loader = wrap(batches, model, optimizer)
    norms = []
    for epoch in range(2):
        model.frozen.weight.requires_grad_(epoch > 0)
        for ids in loader:
            model(ids).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type=norm_type))
            assert (model.frozen.weight.grad is not None) == (epoch > 0)
            optimizer.step()
            optimizer.zero_grad()
    weights = model.state_dict() if loader is batches else full_state_dict(model)
    if loader is not batches:
        loader.close()
    return torch.stack(norms), weights  # rank 0 has them all


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_equals_plain(comm, norm_type):
    everything = torch.randint(0, ROWS, (STEPS, comm.size, 3), generator=torch.Generator().manual_seed(3))
    mine = [ids[comm.rank] for ids in everything]

    def managed(batches, model, optimizer):
        return AdaLoader.wrap(batches, model=model, optimizer=optimizer, min_rows=1)

    norms, weights = train(mine, managed, norm_type)
    norms_expected, expected = train([ids.flatten() for ids in everything], lambda batches, *_: batches, norm_type)
    torch.testing.assert_close(norms, norms_expected, rtol=1e-9, atol=1e-11)
    if comm.rank == 0:
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-11)
