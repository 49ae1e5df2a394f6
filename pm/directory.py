"""The directory: which rank owns a key's main copy. Always asked, so that owners can move without touching callers."""

from __future__ import annotations

import numpy as np

import cuda_ops


class Directory:
    """Maps keys to owners over `ranks` ranks.

    Every key has a fixed home, a hash of the key; here the home is also the owner.
    """

    def __init__(self, ranks: int):
        self.ranks = ranks

    def home_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the home rank of each key: int64 `[n]` -> int64 `[n]`."""
        return cuda_ops.owners(keys, self.ranks)

    def owner_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the rank that holds each key's main copy: int64 `[n]` -> int64 `[n]`."""
        return self.home_of(keys)
