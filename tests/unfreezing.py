"""Gradual unfreezing: layers, tables among them, that an optimizer is given in mid-training."""

from __future__ import annotations

import torch
from torch import nn, optim

ROWS, DIM = 40, 3
OPTIMIZERS = {
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.1),
    "SGD, momentum": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.1),
    "Adam": lambda parameters: optim.Adam(parameters, lr=0.02),
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
}


class Layers(nn.Module):
    """All tables but the last are frozen at first; the third is a bare parameter, which is looked up."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(ROWS, DIM)
        self.second = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.third = nn.Parameter(torch.randn(ROWS, DIM))
        self.last = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(DIM, 1)
        for frozen in self.frozen():
            frozen.requires_grad_(False)
        self.double()

    def frozen(self) -> list[nn.Parameter]:
        return [self.first.weight, self.second.weight, self.third]

    def forward(self, ids):
        rows = self.first(ids).sum(1) + self.second(ids) + self.third[ids[:, 0]] + self.last(ids).sum(1)
        return self.out(rows.tanh()).squeeze(1)


def batches(seed: int, samples: int, count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, ROWS, (samples, 3), generator=random),
            torch.randn(samples, generator=random, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def train(model: Layers, optimizer: optim.Optimizer, loader) -> list[float]:
    """Unfreeze one more table every third batch, with a learning rate of its own; return the losses."""
    losses, waiting = [], model.frozen()
    for number, (ids, target) in enumerate(loader):
        if number % 3 == 2 and waiting:
            table = waiting.pop(0)
            table.requires_grad_(True)
            optimizer.add_param_group({"params": [table], "lr": 0.01 * (1 + number)})
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(ids), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
