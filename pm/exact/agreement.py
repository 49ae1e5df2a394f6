"""Whether ranks took the same step: the same optimizer with the same hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pm.waiting import PeerError


def check_same_step(
    step: int,
    rank: int,
    optimizers: Mapping[int, int],
    vectors: Mapping[int, np.ndarray],
    describe: Callable[[int, int], str] | None,
) -> None:
    """Raise PeerError, naming value and ranks, unless all stepped the same optimizer with the same hyperparameters.

    Args:
        step: number of the step.
        rank: this rank.
        optimizers: by rank, the number of the optimizer that it stepped.
        vectors: by rank, that optimizer's hyperparameters as float64; nan equals nan.
        describe: names the hyperparameter (optimizer, position in the vector).
    """
    if len(set(optimizers.values())) > 1:
        stepped = ", ".join(f"rank {r}: optimizer {o}" for r, o in sorted(optimizers.items()))
        raise PeerError(f"step {step}: ranks stepped different optimizers: {stepped}")
    mine = vectors[rank]
    as_bytes = mine.tobytes()
    for other, vector in sorted(vectors.items()):
        if vector.tobytes() == as_bytes:  # nearly always, in a sixth of the time
            continue
        if np.array_equal(vector, mine, equal_nan=True):
            continue
        if len(vector) != len(mine):
            raise PeerError(f"step {step}: ranks {rank} and {other} step an optimizer with different groups")
        at = int(np.flatnonzero(~((vector == mine) | (np.isnan(vector) & np.isnan(mine))))[0])
        name = f"hyperparameter {at}" if describe is None else describe(optimizers[rank], at)
        raise PeerError(f"step {step}: ranks disagree on {name}: {_by_value(vectors, at)}")


def _by_value(vectors: Mapping[int, np.ndarray], at: int) -> str:
    ranks: dict[float, list[int]] = {}
    for rank, vector in sorted(vectors.items()):
        ranks.setdefault(float(vector[at]), []).append(rank)
    return ", ".join(f"{value!r} on rank {', '.join(map(str, of))}" for value, of in ranks.items())
