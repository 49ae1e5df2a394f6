"""Arrays in parts, one for each rank."""

from __future__ import annotations

import numpy as np

import cuda_ops


def each_rank(ranks: np.ndarray, count: int) -> list[tuple[int, np.ndarray]]:
    """Return (rank, positions at which it is) for each rank that is in `ranks` (int64 `[n]`, below `count`)."""
    if not len(ranks):
        return []
    order, counts = cuda_ops.partition(ranks, count)
    ends = np.cumsum(counts).tolist()
    return [(rank, order[end - n : end]) for rank, (end, n) in enumerate(zip(ends, counts.tolist(), strict=True)) if n]
