"""Who the ranks of a job are: each says so when its first loader is made, for whoever must tell which of them died.

With a run folder (`python -m adaloader run`) each writes it there: rank, host, PID, and at the end how it ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import asdict, dataclass, replace
from multiprocessing.util import Finalize
from pathlib import Path

log = logging.getLogger("adaloader")

RUN_FOLDER = "ADALOADER_RUN_FOLDER"
"""The environment variable that names the run folder."""


@dataclass(frozen=True)
class Entry:
    """What a rank has said of itself. `started` tells its process from a later one of the same PID."""

    rank: int
    ranks: int
    host: str
    pid: int
    started: int
    ended: bool = False
    failure: str = ""

    @property
    def is_alive_here(self) -> bool:
        """Whether its process runs, on this host."""
        return self.host == socket.gethostname() and _start_of(self.pid) == self.started

    def send(self, number: int) -> bool:
        """Send its process a signal if it runs on this host; return whether it does."""
        if not self.is_alive_here:
            return False
        # It may have ended since, and its number been given to a process of somebody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, number)
        return True

    def end_here(self) -> None:
        """Kill its process if it still runs on this host."""
        self.send(signal.SIGKILL)


_own: Entry | None = None


def register(rank: int, ranks: int) -> None:
    """Say, once in a process, which rank it is."""
    global _own
    if _own is not None:
        return
    _own = Entry(rank, ranks, socket.gethostname(), os.getpid(), _start_of(os.getpid()))
    log.info("rank %d of %d: host %s, PID %d", rank, ranks, _own.host, _own.pid)
    _write(_own)
    if multiprocessing.parent_process() is not None:  # when it is forked, it ends without what atexit knows
        Finalize(None, _ends_as_child, exitpriority=0)


def _ends_as_child() -> None:
    kind = sys.exc_info()[0]  # of what the process's target has raised
    ends("" if kind in (None, SystemExit) else kind.__name__)


def this_process() -> str:
    """Return this process's host and PID, for messages."""
    return f"host {socket.gethostname()}, PID {os.getpid()}"


def ends(failure: str = "") -> None:
    """Say that this rank ends, as it should or with a `failure`."""
    if _own is not None and os.getpid() == _own.pid:
        _write(replace(_own, ended=not failure, failure=failure))


def read_entries(folder: Path) -> list[Entry]:
    """Return what ranks have written into a run folder, in their order."""
    entries = []
    for path in sorted((folder / "ranks").glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # of a write under way on another file system
            entries.append(Entry(**json.loads(path.read_text())))
    return entries


def _write(entry: Entry) -> None:
    if RUN_FOLDER not in os.environ:
        return
    path = Path(os.environ[RUN_FOLDER]) / "ranks" / f"rank-{entry.rank:05d}.json"
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(asdict(entry)))
        beside.replace(path)
    except OSError as error:
        log.warning("rank %d cannot register in %s: %s", entry.rank, path.parent, error.strerror)


def _start_of(pid: int) -> int:
    """Return when a process started, in ticks since the machine did; -1 if there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
