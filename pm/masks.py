"""Sets of ranks, one per row of an array: bit r of the words says whether rank r is in the set."""

from __future__ import annotations

import numpy as np

_BITS = 64


def words_for(ranks: int) -> int:
    """Return how many uint64 words a set over `ranks` ranks takes."""
    return -(-ranks // _BITS)


def only(rank: int, ranks: int) -> np.ndarray:
    """Return the set of `rank` alone, uint64 `[words]`."""
    mask = np.zeros(words_for(ranks), np.uint64)
    mask[rank // _BITS] = np.uint64(1) << np.uint64(rank % _BITS)
    return mask


def count(masks: np.ndarray) -> np.ndarray:
    """Return the number of members of each set: uint64 `[n, words]` -> int64 `[n]`."""
    if masks.shape[1] == 1:  # a sum of one addend costs many times as much as none
        return np.bitwise_count(masks[:, 0]).astype(np.int64)
    return np.bitwise_count(masks).sum(axis=1, dtype=np.int64)


def are_empty(masks: np.ndarray) -> np.ndarray:
    """Return which sets have no member: uint64 `[n, words]` -> bool `[n]`."""
    if masks.shape[1] == 1:
        return masks[:, 0] == 0
    return (masks == 0).all(axis=1)


def contains(masks: np.ndarray, rank: int) -> np.ndarray:
    """Return whether `rank` is in each set: uint64 `[n, words]` -> bool `[n]`."""
    return (masks[:, rank // _BITS] >> np.uint64(rank % _BITS)) & np.uint64(1) != 0


def first(masks: np.ndarray) -> np.ndarray:
    """Return the lowest rank in each set: uint64 `[n, words]` -> int64 `[n]`, -1 where it is empty."""
    found = np.full(len(masks), -1, np.int64)
    for word in reversed(range(masks.shape[1])):
        bits = masks[:, word]
        lowest = bits & (~bits + np.uint64(1))
        exponent = np.bitwise_count(lowest - np.uint64(1)).astype(np.int64)
        found = np.where(bits != 0, word * _BITS + exponent, found)
    return found
