"""The oracle of these tests: plain PyTorch, with the whole model on the same device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaloader import AdaLoader, full_optimizer_state_dict, full_state_dict

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


def clicks(rows: int, fields: int, samples: int, seed: int, *, skew: float, dtype=torch.float64) -> TensorDataset:
    """Samples of `fields` ids below `rows`, id r with a chance of (r + 1) ** -skew, and a target."""
    random = torch.Generator().manual_seed(seed)
    chances = (torch.arange(rows) + 1.0) ** -skew
    ids = torch.multinomial(chances[torch.randperm(rows, generator=random)], samples * fields, True, generator=random)
    return TensorDataset(ids.view(samples, fields), torch.randn(samples, generator=random, dtype=dtype))


class Clicks(nn.Module):
    """Two tables, one as a bag with a padding row, and a linear layer; ids are moved to where the model is."""

    def __init__(self, rows: int, dim: int, dtype=torch.float64):
        super().__init__()
        self.table = nn.Embedding(rows, dim, padding_idx=1)
        self.bag = nn.EmbeddingBag(max(2, rows // 2), 3, mode="mean")
        self.out = nn.Linear(2 * dim + 3, 1)
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(self.out.weight.device)
        rows = self.table(ids[:, :2]).flatten(1)
        return self.out(torch.cat([rows, self.bag(ids[:, 2:] % self.bag.num_embeddings)], 1)).squeeze(1)


def plain_and_managed(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable,
    data: TensorDataset,
    loop: Callable,
    device: torch.device,
    *,
    batch_size: int = 16,
    **keywords,
):
    """Run `loop(model, optimizer, loader)`, which returns losses, both ways; compare all that is left.

    Return the managed loader's statistics.
    """
    torch.manual_seed(5)
    plain = make_model().to(device)
    plain_optimizer = make_optimizer(plain.parameters())
    expected = loop(plain, plain_optimizer, DataLoader(data, batch_size))
    torch.manual_seed(5)
    model = make_model().to(device)
    optimizer = make_optimizer(model.parameters())
    loader = AdaLoader(data, batch_size, model=model, optimizer=optimizer, min_rows=1, **keywords)
    with closing(loader):
        losses = loop(model, optimizer, loader)
        limit = TOLERANCE[next(model.parameters()).dtype]
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=limit, atol=limit)
        weights, state = full_state_dict(model), full_optimizer_state_dict(model, optimizer)
        assert weights.keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(weights[name], value.cpu(), rtol=limit, atol=limit, msg=lambda m, n=name: n + m)
        compare_state(state, plain_optimizer.state_dict(), limit)
        return loader.stats()


def compare_state(ours: dict, theirs: dict, limit: float) -> None:
    assert list(ours["state"]) == list(theirs["state"])
    for index, entry in theirs["state"].items():
        for name, value in entry.items():
            if torch.is_tensor(value):
                mine = ours["state"][index][name]
                torch.testing.assert_close(mine.cpu(), value.cpu(), rtol=limit, atol=limit)


def train(passes: int = 2, before_step: Callable[[nn.Module], None] = lambda model: None) -> Callable:
    """The usual loop, which returns its losses."""

    def loop(model, optimizer, loader) -> list[float]:
        losses = []
        for _ in range(passes):
            for ids, target in loader:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(ids), target.to(model.out.weight.device))
                loss.backward()
                before_step(model)
                optimizer.step()
                losses.append(loss.item())
        return losses

    return loop
