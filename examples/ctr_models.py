"""Two click-through models in plain PyTorch: Wide & Deep and DLRM, each with one table for all 26 fields.

Both take dense features float32 [B, 13] and ids int64 [B, 26] and return logits float32 [B].
Nothing in this file knows of AdaLoader.
"""

from __future__ import annotations

import torch
from ctr_data import DENSE_FEATURES, FIELDS
from torch import nn


def make_table(rows: int, dim: int, sparse: bool) -> nn.Embedding:
    """A table [rows, dim] with small random values; `sparse` as in `nn.Embedding`."""
    table = nn.Embedding(rows, dim, sparse=sparse)
    nn.init.normal_(table.weight, std=0.01)
    return table


def perceptron(sizes: list[int], dropout: float, last_relu: bool = True) -> nn.Sequential:
    """Linear layers of the given sizes with relu, and dropout where it is above 0, between them."""
    layers: list[nn.Module] = []
    for i, (width, next_width) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers.append(nn.Linear(width, next_width))
        if last_relu or i < len(sizes) - 2:
            layers.append(nn.ReLU())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


class WideAndDeep(nn.Module):
    """Wide & Deep (Cheng et al. 2016) in the form common to click-through benchmarks on Criteo.

    The deep part sees the dense features; its output and the embeddings of all fields go to one linear layer.
    """

    def __init__(self, rows: int, dim: int, dropout: float = 0.0, sparse: bool = False):
        super().__init__()
        self.embedding = make_table(rows, dim, sparse)
        self.deep = perceptron([DENSE_FEATURES, 256, 256, 256], dropout)
        self.out = nn.Linear(256 + FIELDS * dim, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        wide = self.embedding(ids).flatten(1)
        return self.out(torch.cat([wide, self.deep(dense)], dim=1)).squeeze(1)


class DLRM(nn.Module):
    """DLRM (Naumov et al. 2019): dot products of all pairs of embeddings and of the dense part's output."""

    def __init__(self, rows: int, dim: int, dropout: float = 0.0, sparse: bool = False):
        super().__init__()
        self.embedding = make_table(rows, dim, sparse)
        self.bottom = perceptron([DENSE_FEATURES, 256, 128, dim], dropout)
        pairs = torch.triu_indices(FIELDS + 1, FIELDS + 1, offset=1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.top = perceptron([dim + pairs.shape[1], 256, 128, 1], dropout, last_relu=False)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        bottom = self.bottom(dense)
        vectors = torch.cat([bottom.unsqueeze(1), self.embedding(ids)], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([bottom, products], dim=1)).squeeze(1)


MODELS = {"wdl": WideAndDeep, "dlrm": DLRM}
