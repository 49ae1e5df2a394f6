"""An optimizer whose state is thrown away, to begin a stage anew: tables begin anew too."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaloader import AdaLoader, full_state_dict

ROWS = 50


def replace(optimizer):
    optimizer.state = collections.defaultdict(dict)


def clear(optimizer):
    optimizer.state.clear()


def pop(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)


def empty(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {}


def keep(optimizer):
    """Replace every entry by an equal one, as trainers do that move state to a device."""
    optimizer.state = collections.defaultdict(dict, {key: dict(entry) for key, entry in optimizer.state.items()})


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
}


def trained(make_loader, make_optimizer, between, seed, tables_alone):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(ROWS, 4), nn.Linear(4, 1)).double()
    if tables_alone:
        model[1].requires_grad_(False)
    optimizer = make_optimizer(p for p in model.parameters() if p.requires_grad)
    loader = make_loader(TensorDataset(torch.randint(ROWS, (48,))), model, optimizer)
    for _ in range(3):
        for (ids,) in loader:
            optimizer.zero_grad()
            (model(ids) ** 2).mean().backward()
            optimizer.step()
        between(optimizer)
    return model, loader


@pytest.mark.parametrize("between", [replace, clear, pop, empty, keep])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tables_alone", [False, True])
def test_a_state_that_is_thrown_away_is_that_of_tables_too(between, optimizer, tables_alone, seed):
    if tables_alone and between is not replace:
        pytest.skip("nothing is in the state of an optimizer of tables alone, so that only another object tells")
    plain, _ = trained(lambda d, m, o: DataLoader(d, 8), OPTIMIZERS[optimizer], between, seed, tables_alone)
    model, loader = trained(
        lambda d, m, o: AdaLoader(d, 8, model=m, optimizer=o, min_rows=1),
        OPTIMIZERS[optimizer],
        between,
        seed,
        tables_alone,
    )
    for name, value in full_state_dict(model).items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-9, atol=1e-12)
    loader.close()
