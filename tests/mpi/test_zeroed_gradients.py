"""Gradients that a loop sets to zero, not to None, before a pass ends are zeros in the next pass too: an optimizer with
momentum moves what they belong to, though it be frozen or unused there.
"""

import pytest
import torch
from torch import nn

from adaloader import AdaLoader, full_state_dict

ROWS, DIM, STEPS = 30, 2, 4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(DIM, 1)
        self.double()

    def forward(self, ids):
        return self.out(self.rows(ids)).square().mean()


def train(batches, wrap, set_to_none):
    torch.manual_seed(7)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = wrap(batches, model, optimizer)
    for epoch in range(2):
        for number, ids in enumerate(loader):
            for parameter in (model.rows.weight, model.out.weight):
                parameter.requires_grad_((epoch, number) != (1, 0))
            model(ids).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none)
    weights = model.state_dict() if loader is batches else full_state_dict(model)
    if loader is not batches:
        loader.close()
    return weights  # rank 0 has them all


@pytest.mark.parametrize("set_to_none", [False, True], ids=["to zero", "to None"])
def test_equals_plain(comm, set_to_none):
    everything = torch.randint(0, ROWS, (STEPS, comm.size, 3), generator=torch.Generator().manual_seed(3))
    mine = [ids[comm.rank] for ids in everything]

    def managed(batches, model, optimizer):
        return AdaLoader.wrap(batches, model=model, optimizer=optimizer, min_rows=1)

    found = train(mine, managed, set_to_none)
    expected = train([ids.flatten() for ids in everything], lambda batches, model, optimizer: batches, set_to_none)
    if comm.rank == 0:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
