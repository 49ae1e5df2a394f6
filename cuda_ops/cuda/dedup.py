"""Unique ids and the inverse index, by torch's own sort-based `unique`: one radix sort of the ids.

A hash table would save the sort, but its order would be that in which threads come; this one is the same every time.
"""

from __future__ import annotations

import torch

from cuda_ops.cuda.checks import int_vector


def dedup(ids, scratch=None):
    """Return (unique, inverse) with unique[inverse] == ids and `unique` in order of first occurrence.

    As cuda_ops.cpu.dedup.dedup. `scratch` is not used: torch's allocator keeps the memory. Waits for the device, to
    learn the number of unique ids. Moves some 300 * n bytes.
    """
    return _dedup(int_vector(ids, "ids"))[:2]


def dedup_counts(ids, scratch=None):
    """Return (unique, inverse, counts): as dedup, and how often each unique id occurs, int64 [U]."""
    return _dedup(int_vector(ids, "ids"))


def _dedup(ids):
    ascending, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    first = torch.full_like(ascending, ids.numel())
    first.scatter_reduce_(0, inverse, torch.arange(ids.numel(), device=ids.device), "amin")
    by_first = torch.argsort(first)
    rank = torch.empty_like(by_first)
    rank[by_first] = torch.arange(len(by_first), device=ids.device)
    return ascending[by_first], rank[inverse], counts[by_first]
