"""A small model of two tables and a layer, its batches, and the usual way to train it."""

import torch
from torch import nn

from tests.adaloader.against_plain import train, weigh

ROWS, DIM = 30, 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM, padding_idx=0)
        self.other = nn.Embedding(ROWS + 5, DIM)
        self.linear = nn.Linear(DIM, 1)

    def forward(self, ids):
        return self.linear(self.emb(ids).sum(1) * self.other(ids).mean(1))


class Sparse(Model):
    """Tables with sparse gradients, looked up twice, of which one lookup does not train."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM, padding_idx=0, sparse=True)
        self.other = nn.EmbeddingBag(ROWS + 5, DIM, mode="mean", padding_idx=2, sparse=True)

    def forward(self, ids):
        constant = self.emb((ids + 7) % ROWS).detach() + self.other((ids + 3) % ROWS).detach()[:, None]
        return self.linear((self.emb(ids) * constant).sum(1) * self.other(ids).relu())


def batches(seed: int, count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (4, 3), generator=generator) for _ in range(count)]


USUAL = train(lambda model, batch: weigh(model(batch)))
