"""The file to which a rank writes what it intends, and how rows come and go there: one JSON object per line."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import numpy as np

log = logging.getLogger("adaloader")


class Recorder:
    """Writes events to a file. Any thread.

    The first line of a run is `{"what": "begins", "rank": ..., "ranks": ...}` and what else `begin` was given. Others
    have `what`, `group` (number of the table, or group of keys) and `keys`, and:

    - "intends": `start`, `end` (clocks; null: until it is said to be over): this rank is going to use the keys;
    - "moved away", "moved here", "copied": `round` (of exchanges; with lockstep the number of steps), `other` (rank).

    An event is in the file when it has happened. A file that can no longer be written (a full disk) is said in the log,
    and the run goes on without.

    Args:
        path: of the file.
        append: whether what is there stays (a run that is started again goes on in the file); else it is overwritten.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: str | Path, *, append: bool = False):
        self._path = Path(path)
        self._file = self._path.open("ab" if append else "wb", buffering=0)  # a line is there whole, or not at all
        self._lock = threading.Lock()

    def begin(self, rank: int, ranks: int, **more: object) -> None:
        """Say who writes."""
        self._write({"what": "begins", "rank": rank, "ranks": ranks, **more})

    def note(self, what: str, group: int, keys: np.ndarray, **more: object) -> None:
        """Write an event about keys of a group (int64 `[n]`); nothing if there are none."""
        if len(keys):
            self._write({"what": what, "group": group, **more, "keys": keys.tolist()})

    def _write(self, event: dict[str, object]) -> None:
        line = json.dumps(event).encode() + b"\n"
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(line)
            except OSError as error:
                log.warning("nothing more is recorded in %s: %s", self._path, error)
                self._end()

    def _end(self) -> None:
        file, self._file = self._file, None
        file.close()

    def close(self) -> None:
        """Write nothing more."""
        with self._lock:
            if self._file is not None:
                self._end()


def path_of_rank(path: str | Path, rank: int) -> Path:
    """Return the file of a rank: `run/moves.jsonl` is `run/moves-3.jsonl` of rank 3."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{rank}{path.suffix}")
