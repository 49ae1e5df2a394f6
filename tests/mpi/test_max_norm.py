"""A table with `max_norm` and few rows: what one rank's lookups scale down is scaled down on all."""

import torch
from torch import nn

from adaloader import AdaLoader, full_state_dict

ROWS, DIM, STEPS = 24, 5, 4


def train(batches, wrap):
    torch.manual_seed(7)
    model = nn.Embedding(ROWS, DIM, max_norm=0.5).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = wrap(batches, model, optimizer)
    for ids in loader:
        model(ids).sum(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = model.state_dict() if loader is batches else full_state_dict(model)
    if loader is not batches:
        loader.close()
    return weights  # rank 0 has them all


def test_a_small_table_equals_plain(comm):
    everything = torch.randint(0, ROWS, (STEPS, comm.size, 3), generator=torch.Generator().manual_seed(3))
    mine = [ids[comm.rank] for ids in everything]
    found = train(mine, lambda batches, model, optimizer: AdaLoader.wrap(batches, model=model, optimizer=optimizer))
    expected = train([ids.flatten() for ids in everything], lambda batches, model, optimizer: batches)
    if comm.rank == 0:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
