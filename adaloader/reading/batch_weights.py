"""What each rank's batch counts in the average over ranks: (its weight, that of all ranks, None if to be asked)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adaloader.reading.sampling import Shares


def own_weight(
    batch_weight: Callable[[Any], float] | None, lengths: list[int] | None
) -> Callable[[int, Any], tuple[float, float | None]]:
    """Weights where each rank has batches of its own: they count equally, or by `batch_weight`.

    With the ranks' `lengths`, the sum of weights is known without asking: it is the number of ranks that have the
    batch.
    """
    if lengths is not None:
        return lambda number, batch: (1.0, float(sum(length > number for length in lengths)))
    return lambda number, batch: (1.0 if batch_weight is None else float(batch_weight(batch)), None)


def shared_weight(
    shares: Shares, batch_weight: Callable[[Any], float] | None
) -> Callable[[int, Any], tuple[float, float | None]]:
    """Weights where ranks have shares of one batch: by samples, or by `batch_weight`."""

    def weight_of(number: int, batch: Any) -> tuple[float, float | None]:
        if batch_weight is not None:
            return float(batch_weight(batch)), None
        mine, all_ranks = shares.share(number)
        return float(mine), float(all_ranks)

    return weight_of
