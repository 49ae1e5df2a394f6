"""The keywords of a loader: their defaults, and what they may be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaloader.model.strategy import check_strategy
from pm.asynchronous.eventual import DEFAULT_ROUNDS_PER_SECOND
from pm.decision import check_techniques

DEFAULT_LOOKAHEAD = 5
DEFAULT_LOOKAHEAD_WITH_STALENESS = 16
"""Rows come with rounds there, one a step: a question that is sent on to a row's owner takes some steps."""
DEFAULT_MIN_ROWS = 1000
DEFAULT_TIMEOUT_SECONDS = 300.0
_MOST_SECONDS = 10**9  # what waits for ranks takes no infinite time


@dataclass(frozen=True)
class Settings:
    """The keywords of a loader; see `AdaLoader`."""

    lookahead: int | str | None
    staleness: int | None
    keys: str | None | Mapping[object, Callable[[Any], Any]]
    min_rows: int
    comm: object
    batch_weight: Callable[[Any], float] | None
    timeout_seconds: float
    strategy: Mapping[str, str] | None = None
    techniques: str = "all"
    update_threshold: float | None = None
    max_rounds_per_second: float = DEFAULT_ROUNDS_PER_SECOND
    shared_memory: bool | int = True
    device_cache_bytes: int | None = None
    record: str | os.PathLike | None = None

    def __post_init__(self):
        check_strategy(self.strategy)
        if self.lookahead is None:
            lookahead = DEFAULT_LOOKAHEAD if self.staleness == 0 else DEFAULT_LOOKAHEAD_WITH_STALENESS
            object.__setattr__(self, "lookahead", lookahead)
        if self.lookahead != "auto" and (not _is_int(self.lookahead) or self.lookahead < 0):
            raise ValueError(f'lookahead must be a number of batches, 0 or more, or "auto"; got {self.lookahead!r}')
        if self.staleness is not None and (not _is_int(self.staleness) or self.staleness < 0):
            raise ValueError(
                f"staleness must be 0 (synchronous, exact), a number of steps, or None (no bound); got "
                f"{self.staleness!r}"
            )
        check_techniques(self.techniques)
        if self.update_threshold is not None and not (_is_number(self.update_threshold) and self.update_threshold >= 0):
            raise ValueError(f"update_threshold must be 0 or more; got {self.update_threshold!r}")
        if self.update_threshold and self.staleness == 0:
            raise ValueError(
                f"update_threshold={self.update_threshold!r} holds changes back, which staleness=0 does not allow; "
                "leave one of them out"
            )
        if not _is_number(self.max_rounds_per_second) or not self.max_rounds_per_second > 0:
            raise ValueError(f"max_rounds_per_second must be positive; got {self.max_rounds_per_second!r}")
        if not isinstance(self.shared_memory, bool) and not (_is_int(self.shared_memory) and self.shared_memory > 1):
            raise ValueError(
                "shared_memory must be True, False, or how many ranks (2 or more) count as one machine; got "
                f"{self.shared_memory!r}"
            )
        if self.device_cache_bytes is not None and not (
            _is_int(self.device_cache_bytes) and self.device_cache_bytes >= 0
        ):
            raise ValueError(f"device_cache_bytes must be a number of bytes, or None; got {self.device_cache_bytes!r}")
        if self.record is not None and not (isinstance(self.record, (str, os.PathLike)) and Path(self.record).name):
            raise ValueError(f"record must be the path of a file, or None; got {self.record!r}")
        if not _is_int(self.min_rows) or self.min_rows < 1:
            raise ValueError(f"min_rows must be a number of rows, 1 or more; got {self.min_rows!r}")
        if not _is_number(self.timeout_seconds) or not 0 < self.timeout_seconds <= _MOST_SECONDS:
            raise ValueError(
                f"timeout_seconds must be positive, and {_MOST_SECONDS:,} at most; got {self.timeout_seconds!r}"
            )
        if not (self.keys is None or self.keys == "auto" or isinstance(self.keys, Mapping)):
            raise ValueError(f'keys must be "auto", None or a mapping of tables to functions; got {self.keys!r}')
        if self.batch_weight is not None and not callable(self.batch_weight):
            raise TypeError(f"batch_weight must be a function of a batch, got {self.batch_weight!r}")
        if self.comm is not None and not hasattr(self.comm, "Dup"):
            raise TypeError(f"comm must be an mpi4py communicator, got {type(self.comm).__name__}")

    def shared(self) -> dict[str, object]:
        """What all loaders of one model must agree on."""
        names = (
            "min_rows",
            "staleness",
            "comm",
            "techniques",
            "update_threshold",
            "max_rounds_per_second",
            "shared_memory",
            "device_cache_bytes",
        )
        return {name: getattr(self, name) for name in names}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
