"""The steps of a table whose optimizer moves every row at every step: with which scalars each was made."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

import cuda_ops

_FIRST_ROOM = 64
_SMALLEST_LOG = -800.0  # its exponential is zero in float64; sums of it stay finite


@dataclass(frozen=True)
class Entry:
    """One step.

    Args:
        scalars: as the kernel of the optimizer wants them, in the order of its columns.
        factors: by which a step without gradient multiplies the value, and up to three parts of the state.
        coefficient: factor of the first moment in the update, at most.
        eps: what the optimizer adds to a root.
        weight_decay: that which makes a gradient of the value (not the decoupled one).
        dies_out: whether what is left of a gradient moves the value less at each later step, also in parts of a value
            that decays.
        slow: whether rows may still move a thousand steps after their last gradient.
    """

    scalars: tuple[float, ...]
    factors: tuple[float, ...]
    coefficient: float = 0.0
    eps: float = math.inf
    weight_decay: float = 0.0
    dies_out: bool = True
    slow: bool = False


class History:
    """Entries by number, from when the table was adopted on; in lockstep the same on every rank.

    Memory: 80 to 120 bytes a step, kept as long as the table. `mu_product` is NAdam's, one number for the whole table,
    in the dtype in which PyTorch keeps it.

    Args:
        kind: of optimizer, as `cuda_ops.advance` names it.
        dtype: of the table's values, to which the kernel rounds scalars.
    """

    def __init__(self, kind: str, dtype: str):
        self.kind = kind
        self.mu_product: np.floating = np.float32(1.0)
        self.slow = False
        self._bounds = [(0.0, math.inf, 0.0, 1.0)]
        self._dtype = np.dtype(dtype).type
        self._scalars, columns = cuda_ops.history_columns(kind)
        self._steps = np.zeros((_FIRST_ROOM, columns))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def steps(self) -> np.ndarray:
        """The entries, float64 `[steps, columns]`."""
        return self._steps[: self._count]

    @property
    def bounds(self) -> np.ndarray:
        """Bounds of all steps up to one, by its regime: float64 `[regimes, 4]` (see `cuda_ops.advance`)."""
        return np.array(self._bounds)

    @property
    def memory_bytes(self) -> int:
        return self._steps.nbytes

    def append(self, entry: Entry) -> None:
        """Note that the table takes one more step."""
        if self._count == len(self._steps):
            self._steps = np.concatenate([self._steps, np.zeros_like(self._steps)])
        row = self._steps[self._count]
        row[: len(entry.scalars)] = entry.scalars
        logs = row[self._scalars : -1]
        for at, factor in enumerate(entry.factors):
            logs[at] = self._log(factor)
        if self._count:
            logs += self._steps[self._count - 1, self._scalars : -1]
        self._widen_bounds(entry)
        row[-1] = len(self._bounds) - 1
        self.slow = self.slow or entry.slow or not entry.dies_out
        self._count += 1

    def _widen_bounds(self, entry: Entry) -> None:
        coefficient, least_eps, most_decay, dies_out = self._bounds[-1]
        if abs(entry.coefficient) > coefficient:
            coefficient = 2.0 ** math.ceil(math.log2(abs(entry.coefficient)))  # few regimes while a rate warms up
        widened = (
            coefficient,
            min(least_eps, entry.eps),
            max(most_decay, abs(entry.weight_decay)),
            min(dies_out, float(entry.dies_out)),
        )
        if widened != self._bounds[-1]:
            self._bounds.append(widened)

    def restore(self, steps: np.ndarray, bounds: np.ndarray, slow: bool, mu_product: np.floating) -> None:
        """Be the history whose `steps` (float64 `[steps, columns]`), `bounds` (float64 `[regimes, 4]`) and rest these
        are.

        Raises:
            ValueError: if they are not those of a history of this kind.
        """
        if steps.dtype != np.float64 or steps.ndim != 2 or steps.shape[1] != self._steps.shape[1]:
            raise ValueError(
                f"a history of {self.kind} has float64 steps of {self._steps.shape[1]} numbers, got {steps.dtype} "
                f"{list(steps.shape)}"
            )
        if bounds.dtype != np.float64 or bounds.ndim != 2 or bounds.shape[1] != len(self._bounds[0]):
            raise ValueError(f"a history has float64 bounds [regimes, 4], got {bounds.dtype} {list(bounds.shape)}")
        regimes = steps[:, -1]
        if not ((regimes >= 0) & (regimes < len(bounds))).all():
            raise ValueError(f"a step of the history is in none of its {len(bounds)} regimes")
        self._count = len(steps)
        self._steps = np.zeros((max(_FIRST_ROOM, len(steps)), steps.shape[1]))
        self._steps[: len(steps)] = steps
        self._bounds = [tuple(of_regime) for of_regime in bounds.tolist()]
        self.slow, self.mu_product = bool(slow), mu_product

    def _log(self, factor: float) -> float:
        rounded = abs(float(self._dtype(factor)))
        return max(_SMALLEST_LOG, math.log(rounded)) if rounded else _SMALLEST_LOG
