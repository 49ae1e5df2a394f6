"""A two-layer graph convolutional network with learned node embeddings (Kipf & Welling 2017), in plain PyTorch.

Nothing in this file knows of AdaLoader.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class GCN(nn.Module):
    """Classifies nodes from a batch of `gcn_data.Neighbourhoods`; returns logits [B, num_classes]."""

    def __init__(self, num_nodes: int, dim: int, hidden: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(num_nodes, dim)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.first = nn.Linear(dim, hidden)
        self.second = nn.Linear(hidden, num_classes)
        self.dropout = dropout

    def forward(self, batch: dict[str, object]) -> torch.Tensor:
        outer, inner = batch["hops"]
        features = self.embedding(batch["nodes"])
        hidden = torch.relu(self.first(gather(features, outer)))
        hidden = functional.dropout(hidden, self.dropout, self.training)
        return self.second(gather(hidden, inner))


def gather(features: torch.Tensor, hop: dict[str, object]) -> torch.Tensor:
    """Return each target's weighted sum of its sources' features [n, d], as [num_targets, d]."""
    messages = features[hop["of"]] * hop["weight"][:, None]
    return features.new_zeros(hop["num_targets"], features.shape[1]).index_add(0, hop["to"], messages)
