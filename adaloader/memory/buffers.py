"""Memory for what batches work on, used again from batch to batch."""

from __future__ import annotations

import sys

import numpy as np

# Fresh memory costs a page fault per 4 KiB; sizes are rounded so that a buffer fits the next batch's slab as well.
_BUFFER_ROWS = 1024
_MOST_BUFFERS = 16


def _references(arrays: list[np.ndarray]) -> list[int]:
    """Return how often each array of the list is referred to, the list and this count itself included."""
    counts = []
    for array in arrays:
        counts.append(sys.getrefcount(array))  # a loop's variable: versions of Python count these differently
    return counts


_REFERENCES_OF_UNUSED = _references([np.empty(1)])[0]


class Buffers:
    """Memory for slabs, used again once nothing refers to it any more (a graph may keep a slab beyond its batch)."""

    def __init__(self):
        self._kept: list[np.ndarray] = []

    def take(self, rows: int, dim: int, dtype: str) -> np.ndarray:
        """Return an array `[rows, dim]` with unspecified contents."""
        wanted = max(1, -(-rows // _BUFFER_ROWS)) * _BUFFER_ROWS * dim
        unused = [count == _REFERENCES_OF_UNUSED for count in _references(self._kept)]
        for kept, free in zip(self._kept, unused, strict=True):
            if free and kept.dtype == dtype and wanted <= kept.size <= 2 * wanted:
                return kept[: rows * dim].reshape(rows, dim)
        made = np.empty(wanted, dtype)
        still = zip(self._kept, unused, strict=True)
        self._kept = [k for k, free in still if not free or k.dtype != dtype or k.size >= wanted][-_MOST_BUFFERS:]
        self._kept.append(made)
        return made[: rows * dim].reshape(rows, dim)
