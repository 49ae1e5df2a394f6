"""A loader's counters, for examples that also run with plain PyTorch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.utils.data import DataLoader


def stats_of(loader: Iterable) -> Mapping[str, float]:
    """The loader's counters; zeros for a plain loader."""
    if isinstance(loader, DataLoader) and not hasattr(loader, "stats"):
        return {"lookups": 0, "intent_coverage": 0.0, "wait_seconds": 0.0, "memory_bytes": 0}
    return loader.stats()


def intended_lookups(stats: Mapping[str, float]) -> float:
    """How many lookups found their row here because it had been intended."""
    return stats["lookups"] * stats["intent_coverage"] if stats["lookups"] else 0.0
