"""ComplEx (Trouillon et al. 2016) with negative sampling, in plain PyTorch.

Nothing in this file knows of AdaLoader.
"""

from __future__ import annotations

import torch
from torch import nn


class ComplEx(nn.Module):
    """Scores a triple by Re(sum(head * relation * conj(tail))) over complex vectors `[dim]`.

    A row of a table holds the real parts, then the imaginary ones.

    Args:
        num_entities, num_relations: rows of the tables.
        dim: complex numbers in a vector.
        penalty: weight of the cubed moduli of a triple's vectors in the loss (N3, Lacroix, Usunier & Obozinski 2018).
        sparse: whether the gradients of the tables are sparse tensors.
    """

    def __init__(self, num_entities: int, num_relations: int, dim: int, penalty: float = 0.0, sparse: bool = False):
        super().__init__()
        self.entity = nn.Embedding(num_entities, 2 * dim, sparse=sparse)
        self.relation = nn.Embedding(num_relations, 2 * dim, sparse=sparse)
        self.penalty = penalty
        for table in (self.entity, self.relation):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (heads, tails, queries for the tail, queries for the head), each `[B, 2 dim]`, of a batch of triples.

        A triple's score is the dot product of the query for its tail with the tail, and as well of that for its head
        with the head.
        """
        heads, tails = self.entity(batch["head"]), self.entity(batch["tail"])
        relations = self.relation(batch["relation"])
        return heads, tails, product(heads, relations), product(tails, conjugate(relations))

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of each triple among those with its `other_heads` in place of its head, and likewise of tails.

        Others are int64 `[B, K]`. The mean over triples, with the penalty.
        """
        heads, tails, tail_queries, head_queries = self(batch)
        answers = (tail_queries * tails).sum(1, keepdim=True)
        other_tails = torch.einsum("bd,bkd->bk", tail_queries, self.entity(batch["other_tails"]))
        other_heads = torch.einsum("bd,bkd->bk", head_queries, self.entity(batch["other_heads"]))
        loss = sum(torch.cat([answers, others], dim=1).logsumexp(1) for others in (other_tails, other_heads))
        loss = loss - 2 * answers[:, 0]
        if self.penalty:
            cubes = [modulus(rows) ** 3 for rows in (heads, tails, self.relation(batch["relation"]))]
            loss = loss + self.penalty * sum(cube.sum(1) for cube in cubes)
        return loss.mean()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The complex product of rows `[n, 2 dim]`."""
    (a_real, a_imaginary), (b_real, b_imaginary) = a.chunk(2, dim=1), b.chunk(2, dim=1)
    return torch.cat([a_real * b_real - a_imaginary * b_imaginary, a_real * b_imaginary + a_imaginary * b_real], dim=1)


def conjugate(a: torch.Tensor) -> torch.Tensor:
    """The complex conjugate of rows `[n, 2 dim]`."""
    real, imaginary = a.chunk(2, dim=1)
    return torch.cat([real, -imaginary], dim=1)


def modulus(a: torch.Tensor) -> torch.Tensor:
    """The moduli `[n, dim]` of the complex numbers in rows `[n, 2 dim]`, with a gradient at 0."""
    real, imaginary = a.chunk(2, dim=1)
    return (real**2 + imaginary**2 + 1e-12).sqrt()
