"""Models of one table, and batches of ids for every way to look it up."""

from __future__ import annotations

import torch
from torch import nn

ROWS, DIM = 40, 3


class Weight(nn.Module):
    """One table, looked up by a function of (module, batch)."""

    def __init__(self, **options):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM, **options)

    @property
    def table(self):
        return self.emb.weight


class Bag(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, DIM, **options)


def batches(seed: int, count: int = 4) -> list[dict]:
    """Ids with many duplicates, the row 7 (used as padding) among them; bags that start and end with empty ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(0, 12, shape, generator=generator) * 3 % ROWS

    made = []
    for _ in range(count):
        ids = draw(5, 4)
        ids[0, 0] = ids[2, 1] = 7
        lengths = torch.randint(0, 5, (6,), generator=generator)
        lengths[0] = 0
        flat = draw(int(lengths.sum()))
        made.append(
            {
                "ids": ids,
                "flat": flat,
                "offsets": torch.cumsum(lengths, 0) - lengths,
                "ends": torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(lengths, 0)]),
                "weights": torch.rand(5, 4, generator=generator, dtype=torch.float64),
                "flat_weights": torch.rand(len(flat), generator=generator, dtype=torch.float64),
            }
        )
    return made
