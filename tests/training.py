"""A small model with tables of every make, and its training, for tests of what is left behind and picked up again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.data import Dataset

USERS, WORDS, ITEMS, SHELVES = 41, 30, 53, 37
OPTIMIZERS = {
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, lr=0.02, **options),
    "adagrad": lambda parameters, **options: torch.optim.Adagrad(
        parameters, **{"lr": 0.2, "lr_decay": 0.05, "initial_accumulator_value": 0.1, **options}
    ),
}


class Shop(nn.Module):
    """Tables: with a padding row, as a bag, under two names, bare; a linear layer, and buffers. float64."""

    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(USERS, 4, padding_idx=0)
        self.words = nn.EmbeddingBag(WORDS, 3, mode="mean")
        self.item = nn.Embedding(ITEMS, 4)
        self.related = nn.Embedding(ITEMS, 4)
        self.related.weight = self.item.weight
        self.shelf = nn.Parameter(torch.randn(SHELVES, 2))
        self.out = nn.Linear(17, 1)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.double()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [self.user(batch["user"]), self.words(batch["words"]), self.item(batch["item"])]
        parts += [self.related(batch["related"]), self.shelf[batch["item"] % SHELVES]]
        return self.scale * self.out(torch.cat(parts, dim=1)).squeeze(1)


class Visits(Dataset):
    """Samples for `Shop`: ids uniform over its tables, except that popular users come often."""

    def __init__(self, samples: int, seed: int):
        generator = torch.Generator().manual_seed(seed)

        def ids(high, *shape):
            return torch.randint(0, high, shape, generator=generator)

        self.columns = {
            "user": torch.minimum(ids(USERS, samples), ids(USERS, samples)),
            "words": ids(WORDS, samples, 3),
            "item": ids(ITEMS, samples),
            "related": ids(ITEMS, samples),
            "label": torch.randn(samples, generator=generator, dtype=torch.float64),
        }

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    optimizer.zero_grad()
    nn.functional.mse_loss(model(batch), batch["label"]).backward()
    optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable) -> None:
    for batch in loader:
        step(model, optimizer, batch)


def close(comm, loader) -> None:
    """Close a loader once all ranks are done: one that is closed serves no rows to others (collective)."""
    comm.Barrier()
    loader.close()


def assert_same_tensors(ours: dict, theirs: dict, tolerance: float = 1e-10) -> None:
    """Two state_dicts have the same names, and values that are equal up to `tolerance`."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert type(ours[name]) is torch.Tensor and ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")


def assert_same_optimizer_state(ours: dict, theirs: dict, tolerance: float = 1e-10) -> None:
    """Two state_dicts of optimizers are equal, tensors up to `tolerance`."""
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for index, entry in theirs["state"].items():
        assert_same_tensors(ours["state"][index], entry, tolerance)
