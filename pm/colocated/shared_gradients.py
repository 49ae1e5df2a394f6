"""Memory in which a rank leaves gradients for the others of its machine, until they have applied the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pm.colocated.machine import Machine

_ALIGNED_BYTES = 64


class SharedGradients:
    """The two halves of each rank's area that all ranks of its machine see: one for even steps and one for odd.

    Invariant: a half holds gradients of one step, and is used for another when all neighbours have applied that. Its
    memory is what the largest step so far has taken.

    Args:
        machine: the ranks, and their areas.
        rank: this one.
        ready: by rank, the number of steps that it has applied, as far as is known.
    """

    def __init__(self, machine: Machine, rank: int, ready: Sequence[int]):
        self._areas = machine.areas
        self._neighbours = sorted(set(machine.areas) - {rank})
        self._ready = ready
        area_bytes = len(machine.areas[rank]) if rank in machine.areas else 0
        self._half_bytes = area_bytes // 2 // _ALIGNED_BYTES * _ALIGNED_BYTES
        self._step_of = [-1, -1]
        self._used = [0, 0]

    def reserve(self, step: int, size: int) -> int | None:
        """Return where `size` bytes are free for `step`; None if there are none, and it must be a message."""
        half = step % 2
        if self._step_of[half] != step:
            if any(self._ready[peer] <= self._step_of[half] for peer in self._neighbours):
                return None
            self._step_of[half], self._used[half] = step, 0
        used = self._used[half]
        if used + size > self._half_bytes:
            return None
        self._used[half] = -(-(used + size) // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return half * self._half_bytes + used

    def values(self, rank: int, place: int, rows: int, dim: int, dtype: np.dtype) -> np.ndarray:
        """Return the gradient `[rows, dim]` at `place` in the area of `rank`."""
        size = rows * dim * np.dtype(dtype).itemsize
        return self._areas[rank][place : place + size].view(dtype).reshape(rows, dim)
