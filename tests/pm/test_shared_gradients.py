"""Where a step's gradients are left for neighbours: never where some of an earlier step may still be read."""

from __future__ import annotations

import numpy as np

from pm.colocated.machine import Machine
from pm.colocated.shared_gradients import SharedGradients


def areas(ranks: int, size: int) -> Machine:
    return Machine({}, {rank: np.zeros(size, np.uint8) for rank in range(ranks)}, {})


def test_what_neighbours_may_still_read_is_not_written(rng):
    for _ in range(30):
        ranks = int(rng.integers(2, 5))
        ready = [0] * ranks
        machine = areas(ranks, 4096)
        gradients = SharedGradients(machine, 0, ready)
        left: dict[int, list[tuple[int, int, int]]] = {}
        for step in range(40):
            for part in range(int(rng.integers(0, 5))):
                rows, dim = int(rng.integers(1, 12)), int(rng.integers(1, 20))
                dtype = np.dtype(rng.choice(["float32", "float64"]))
                place = gradients.reserve(step, rows * dim * dtype.itemsize)
                if place is not None:
                    mark = 1 + (step * 5 + part) % 250
                    gradients.values(0, place, rows, dim, dtype).reshape(-1).view(np.uint8)[:] = mark
                    left.setdefault(step, []).append((place, rows * dim * dtype.itemsize, mark))
            for peer in range(1, ranks):  # each is anywhere between where it was and here
                ready[peer] = int(rng.integers(max(ready[peer], step - 3), step + 2))
            for earlier, parts in left.items():
                if min(ready[1:]) <= earlier:
                    for place, size, mark in parts:
                        assert (machine.areas[0][place : place + size] == mark).all(), (step, earlier)


def test_a_half_is_free_again_when_all_have_applied_its_step():
    ready = [0, 0, 0]
    gradients = SharedGradients(areas(3, 1024), 0, ready)
    assert gradients.reserve(0, 512) == 0
    assert gradients.reserve(0, 1) is None, "it is full"
    assert gradients.reserve(1, 400) == 512
    assert gradients.reserve(2, 100) is None, "step 0 may still be read"
    ready[:] = [0, 1, 0]
    assert gradients.reserve(2, 100) is None
    ready[:] = [0, 1, 1]
    assert gradients.reserve(2, 100) == 0
    assert gradients.reserve(2, 100) == 128, "aligned"
    assert gradients.reserve(4, 513) is None
    assert gradients.reserve(3, 513) is None


def test_without_neighbours_there_is_no_room():
    assert SharedGradients(Machine({}, {}, {}), 0, [0, 0]).reserve(0, 8) is None
