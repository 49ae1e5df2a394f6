"""On several ranks: gradients of autograd functions, and rows that are written through views, are plain PyTorch's."""

import pytest
import torch
from torch import nn

from adaloader import AdaLoader, full_state_dict

ROWS, DIM, STEPS = 60, 3, 6


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        return weight[ids]

    @staticmethod
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        return gradient.new_zeros(ROWS, DIM).index_add_(0, ids, gradient), None


def by_function(model, ids):
    return _Rows.apply(model.weight, ids)


def with_a_row_that_is_set(model, ids):
    model.weight.data[3].zero_()
    with torch.no_grad():
        model.weight[5:8].mul_(0.5)
        model.weight.data[:-1].clamp_(-1.0, 1.0)
    return model(ids)


def train(rows_of, optimizer_class, batches, wrap):
    torch.manual_seed(7)
    model = nn.Embedding(ROWS, DIM).double()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    loader = wrap(batches, model, optimizer)
    for ids in loader:
        optimizer.zero_grad()
        rows_of(model, ids).square().sum(1).mean().backward()
        optimizer.step()
    weights = full_state_dict(model) if loader is not batches else model.state_dict()
    if loader is not batches:
        loader.close()
    return weights.get("weight")  # rank 0 has them all


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("rows_of", [by_function, with_a_row_that_is_set])
def test_equals_plain(comm, rows_of, optimizer):
    per_rank = 8
    everything = torch.randint(0, ROWS, (STEPS, comm.size * per_rank), generator=torch.Generator().manual_seed(3))
    mine = [ids[comm.rank * per_rank : (comm.rank + 1) * per_rank] for ids in everything]

    def managed(batches, model, optimizer):
        return AdaLoader.wrap(batches, model=model, optimizer=optimizer, min_rows=1)

    found = train(rows_of, optimizer, mine, managed)
    expected = train(rows_of, optimizer, list(everything), lambda batches, model, optimizer: batches)
    if comm.rank == 0:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
