"""`python -m adaloader run`: start a job, say which rank on which host died, and start it again.

Ranks write who they are into the run folder (`registry.py`) when their first loader is made, and again when they end as
they should; whoever is left there without having ended is the one, or one of those, that died first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from adaloader.checkpoint.layout import complete_in
from adaloader.ranks.registry import RUN_FOLDER, Entry, read_entries

_LOOK_SECONDS = 0.1
_SECONDS_TO_END = 5.0
# Restarts that follow each other without a new checkpoint: what fails then will fail again.
_MOST_IN_VAIN = 3


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="start it again up to N times (%(default)s)"
    )
    parser.add_argument("--run-folder", type=Path, help="where ranks register, and checkpoints go (a new one here)")
    parser.add_argument(
        "job", nargs=argparse.REMAINDER, metavar="-- mpirun ...", help="the command that starts the job"
    )


def run_job(args: argparse.Namespace) -> int:
    """Run the job until it ends well or has been restarted often enough; return its exit code."""
    command = args.job[1:] if args.job[:1] == ["--"] else args.job
    if not command or args.restarts < 0 or shutil.which(command[0]) is None:
        what = f"no program {command[0]!r}" if command else "no command"
        print(
            f"adaloader: {what}: give it after --, as in: run --restarts 3 -- mpirun -n 2 python train.py",
            file=sys.stderr,
        )
        return 2
    folder = (args.run_folder or Path(f"run-{time.strftime('%Y%m%d-%H%M%S')}")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    in_vain = 0
    for attempt in range(args.restarts + 1):
        before = _newest(folder)
        ended = _run_once(command, folder)
        if ended.code == 0 or ended.asked:
            return ended.code
        _report(folder, ended)
        in_vain = in_vain + 1 if _newest(folder) == before else 0
        if attempt == args.restarts:
            break
        if in_vain >= _MOST_IN_VAIN:
            _say(f"not started again: {in_vain} attempts ended without a new checkpoint")
            break
        _say(f"starting again ({attempt + 1} of {args.restarts}) from {_newest(folder) or 'the beginning'}")
    return ended.code


def _run_once(command: list[str], folder: Path) -> Ended:
    """Start the job and wait for its end."""
    ranks = folder / "ranks"
    shutil.rmtree(ranks, ignore_errors=True)
    ranks.mkdir()
    # A session of its own: Ctrl-C is for the ranks, by way of this process, for a launcher would end them at once.
    process = subprocess.Popen(command, env={**os.environ, RUN_FOLDER: str(folder)}, start_new_session=True)
    with _PassedOn(process, folder) as passed_on, Watch(folder) as watch:
        lost_since = None
        while process.poll() is None:
            watch.look(_LOOK_SECONDS)
            lost_since = lost_since or (time.monotonic() if watch.lost else None)
            if lost_since is not None and time.monotonic() - lost_since > _SECONDS_TO_END:
                _say("a rank is gone, and its launcher goes on: ending the job")
                passed_on.end_all()
        watch.look(0.0)
    for entry in read_entries(folder):
        entry.end_here()  # what a launcher left running
    code = process.returncode
    return Ended(128 - code if code < 0 else code, passed_on.asked, watch.lost)


@dataclass(frozen=True)
class Ended:
    """How a job ended: its code, whether a signal had asked for that, and the ranks here that died first."""

    code: int
    asked: bool
    lost: list[Entry]


class Watch:
    """Sees processes of registered ranks on this host end, the moment that they do."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._poll = select.poll()
        self._watched: dict[int, Entry] = {}
        self._known: set[int] = set()
        self.lost: list[Entry] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc) -> None:
        for descriptor in self._watched:
            os.close(descriptor)

    def look(self, seconds: float) -> None:
        """Wait for so long for the end of a rank; `lost` are those whose unforeseen end came first."""
        for entry in read_entries(self._folder):
            if entry.pid not in self._known and entry.is_alive_here:
                self._known.add(entry.pid)
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    descriptor = os.pidfd_open(entry.pid)
                    self._watched[descriptor] = entry
                    self._poll.register(descriptor, select.POLLIN)
        gone = self._poll.poll(1000 * seconds)
        if not gone:
            return
        said = {entry.rank: entry for entry in read_entries(self._folder)}
        lost = []
        for descriptor, _ in gone:
            self._poll.unregister(descriptor)
            os.close(descriptor)
            entry = self._watched.pop(descriptor)
            if not said.get(entry.rank, entry).ended:
                lost.append(entry)
        self.lost = self.lost or lost


def _ends(process: subprocess.Popen, seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):  # the return code tells
        process.wait(seconds)
    return process.returncode is not None


class _PassedOn:
    """Passes SIGTERM, SIGUSR1 and the first Ctrl-C on to the ranks on this host; the second Ctrl-C ends the job."""

    def __init__(self, process: subprocess.Popen, folder: Path):
        self._process, self._folder = process, folder
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> _PassedOn:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        registered = [entry for entry in read_entries(self._folder) if not entry.ended]
        if (number == signal.SIGINT and self.asked) or not registered:
            self.asked = True
            self.end_all()
            return
        self.asked = True
        passed = signal.SIGUSR1 if number == signal.SIGINT else number
        if not any([entry.send(passed) for entry in registered]):
            self.end_all()  # no rank is on this host: the launcher alone reaches them

    def end_all(self) -> None:
        """End the launcher, and with it its ranks."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):  # all of its group have ended
                os.killpg(self._process.pid, number)
            if _ends(self._process, _SECONDS_TO_END):
                return


def _report(folder: Path, ended: Ended) -> None:
    """Say which ranks died, and where."""
    entries = read_entries(folder)
    _say(f"the job ended with code {ended.code}")
    failed = [entry for entry in entries if entry.failure]
    for entry in failed:
        _say(f"rank {entry.rank} on {entry.host} (PID {entry.pid}) failed: {entry.failure}")
    others = {entry.rank for entry in entries if not entry.ended and not entry.failure}
    first = [entry for entry in ended.lost if entry.rank in others]
    far = [e for e in entries if e.rank in others and e.host != socket.gethostname()]  # these nobody here could see
    for entry in first or ([] if failed else far):
        _say(f"rank {entry.rank} on {entry.host} (PID {entry.pid}) died without a word: killed, or crashed")
    if not entries:
        _say(f"no rank had registered in {folder}: it ended before a loader was made")


def _newest(folder: Path) -> Path | None:
    complete = complete_in(folder / "checkpoints")
    return complete[-1] if complete else None


def _say(text: str) -> None:
    print(f"adaloader: {text}", file=sys.stderr, flush=True)
