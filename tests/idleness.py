"""How little a process does while its main thread sleeps.

What a wake-up costs differs by a factor of several between machines, and on one by what else it does; how many there
are does not.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Idleness:
    """`share` of a core that all threads used, and how often they woke up."""

    share: float = 0.0
    wakes_per_second: float = 0.0


@contextmanager
def measured_idleness() -> Iterator[Idleness]:
    """Measure the block."""
    measured = Idleness()
    started, cpu, wakes = time.perf_counter(), time.process_time(), _voluntary_switches()
    yield measured
    seconds = time.perf_counter() - started
    measured.share = (time.process_time() - cpu) / seconds
    measured.wakes_per_second = (_voluntary_switches() - wakes) / seconds


def _voluntary_switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
