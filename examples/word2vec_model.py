"""Skip-gram with negative sampling (Mikolov et al. 2013), in plain PyTorch.

Nothing in this file knows of AdaLoader.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class SkipGram(nn.Module):
    """Tells words that occur near a centre word from others.

    Args:
        num_words: rows of both tables.
        dim: numbers in a vector.
        sparse: whether the gradients of the tables are sparse tensors.
    """

    def __init__(self, num_words: int, dim: int, sparse: bool = False):
        super().__init__()
        self.centre = nn.Embedding(num_words, dim, sparse=sparse)
        self.context = nn.Embedding(num_words, dim, sparse=sparse)
        for table in (self.centre, self.context):
            nn.init.normal_(table.weight, std=0.5 / dim**0.5)

    def forward(self, batch: dict[str, object]) -> torch.Tensor:
        """Return each pair's logistic loss [pairs], against its negatives, for a batch of `word2vec_data.Positions`."""
        centres = self.centre(batch["centre"])
        near = (centres * self.context(batch["context"])).sum(1)
        others = torch.einsum("pd,pkd->pk", centres, self.context(batch["negatives"]))
        return functional.softplus(-near) + functional.softplus(others).sum(1)
