"""Training in stages: each has an optimizer of its own, over the same model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

ROWS, DIM, SAMPLES = 40, 3, 48
OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], optim.Optimizer]] = {
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.1),
    "SGD, momentum": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9),
    "SGD, decay": lambda parameters: optim.SGD(parameters, lr=0.1, weight_decay=0.05),
    "Adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.1),
    "Adagrad again": lambda parameters: optim.Adagrad(parameters, lr=0.03),
    "Adam": lambda parameters: optim.Adam(parameters, lr=0.02),
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "NAdam": lambda parameters: optim.NAdam(parameters, lr=0.01),
    "RMSprop": lambda parameters: optim.RMSprop(parameters, lr=0.01),
}


class Layers(nn.Module):
    """Tables of three makes, the second of which a stage may leave out, and a linear layer. float64."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(ROWS, DIM, padding_idx=0)
        self.second = nn.EmbeddingBag(ROWS, DIM, mode="mean")
        self.third = nn.Parameter(torch.randn(ROWS, DIM))
        self.out = nn.Linear(DIM, 1)
        self.double()

    def forward(self, ids):
        rows = self.first(ids).sum(1) + self.second(ids) + self.third[ids[:, 0]]
        return self.out(rows.tanh()).squeeze(1)


def data(seed: int) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ROWS, (SAMPLES, 3), generator=random)
    return TensorDataset(ids, torch.randn(SAMPLES, generator=random, dtype=torch.float64))


def train(model: nn.Module, optimizer: optim.Optimizer, loader, most_steps: int | None = None) -> list[float]:
    """Return the losses of a pass; one that is left early leaves its last gradient to the next stage."""
    losses = []
    for step, (ids, target) in enumerate(loader):
        if step == most_steps:
            break
        loss = nn.functional.mse_loss(model(ids), target)
        loss.backward()
        losses.append(loss.item())
        if step + 1 == most_steps:
            continue
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run(seed: int, kinds: Sequence[str], make_loader, *, frozen: int = -1, most_steps: int | None = None):
    """Train a model stage by stage, each with the optimizer of its kind, and a loader `make_loader(data, model,
    optimizer)`. In stage `frozen` the second table is left out. Return (model, the last optimizer, losses)."""
    torch.manual_seed(seed)
    model, losses = Layers(), []
    for stage, kind in enumerate(kinds):
        model.second.weight.requires_grad_(stage != frozen)
        optimizer = OPTIMIZERS[kind]([parameter for parameter in model.parameters() if parameter.requires_grad])
        loader = make_loader(data(seed + stage), model, optimizer)
        losses += train(model, optimizer, loader, most_steps)
    return model, optimizer, losses


def run_plain(seed: int, kinds: Sequence[str], batch_size: int, **options):
    """`run` in plain PyTorch."""
    return run(seed, kinds, lambda data, model, optimizer: DataLoader(data, batch_size), **options)
