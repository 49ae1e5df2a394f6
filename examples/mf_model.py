"""Matrix factorisation by stochastic gradients (Koren, Bell & Volinsky 2009), in plain PyTorch.

Nothing in this file knows of AdaLoader.
"""

from __future__ import annotations

import torch
from torch import nn


class Factors(nn.Module):
    """Predicts an entry as the dot product of its row's and its column's factors.

    Args:
        shape: (rows, columns).
        dim: numbers in a factor.
        penalty: weight of the squared factors of each known entry in the loss.
        sparse: whether the gradients of the tables are sparse tensors.
    """

    def __init__(self, shape: tuple[int, int], dim: int, penalty: float = 0.0, sparse: bool = False):
        super().__init__()
        self.row = nn.Embedding(shape[0], dim, sparse=sparse)
        self.column = nn.Embedding(shape[1], dim, sparse=sparse)
        self.penalty = penalty
        for table in (self.row, self.column):
            nn.init.normal_(table.weight, std=dim**-0.5)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (errors [B], squared lengths of both factors [B]) of a batch of `mf_data.Entries`."""
        rows, columns = self.row(batch["row"]), self.column(batch["column"])
        return (rows * columns).sum(1) - batch["value"], (rows**2).sum(1) + (columns**2).sum(1)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        errors, lengths = self(batch)
        return (errors**2 + self.penalty * lengths).mean()
