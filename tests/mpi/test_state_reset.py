"""An optimizer's state that is thrown away on several ranks: an error that says how to begin anew, and that way."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaloader import AdaLoader, full_state_dict, load_full_optimizer_state_dict
from tests.training import close

ROWS = 50


def train(loader, model, optimizer):
    for (ids,) in loader:
        optimizer.zero_grad()
        (model(ids) ** 2).mean().backward()
        optimizer.step()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("staleness", [0, None])
def test_a_state_that_is_emptied_is_loaded_on_all_ranks(comm, seed, staleness):
    def made():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(ROWS, 4), nn.Linear(4, 1)).double()
        return model, torch.optim.Adam(model.parameters(), lr=0.05), TensorDataset(torch.randint(ROWS, (48,)))

    plain, plain_optimizer, data = made()
    for _ in range(2):
        train(DataLoader(data, 4 * comm.size), plain, plain_optimizer)
        plain_optimizer.state = collections.defaultdict(dict)
    model, optimizer, data = made()
    loader = AdaLoader(data, 4, model=model, optimizer=optimizer, min_rows=1, staleness=staleness)
    train(loader, model, optimizer)
    optimizer.state.clear()
    with pytest.raises(RuntimeError, match=r"Adam was emptied.*load_full_optimizer_state_dict.*on all ranks"):
        train(loader, model, optimizer)
    fresh = torch.optim.Adam(model.parameters(), lr=0.05).state_dict()
    load_full_optimizer_state_dict(model, optimizer, fresh)
    optimizer.zero_grad()
    train(loader, model, optimizer)
    whole = full_state_dict(model)
    if comm.rank == 0 and staleness == 0:
        for name, value in whole.items():
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-9, atol=1e-12)
    close(comm, loader)
