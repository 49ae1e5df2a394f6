"""`python -m adaloader run`: start a job, say which rank on which host died, and start it again.

Ranks write who they are into the run folder (`registry.py`) when their first loader is made, and again when they end as
they should; whoever is left there without having ended is the one, or one of those, that died first.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from adaloader.checkpoint.layout import complete_in
from adaloader.ranks.registry import RUN_FOLDER, Entry, read_entries

_LOOK_SECONDS = 0.1
_SECONDS_TO_END = 5.0
# Restarts that follow each other without a new checkpoint: what fails then will fail again.
_MOST_IN_VAIN = 3
_PR_SET_PDEATHSIG = 1
# Under which name ranks know what was asked of this process by a key, or by a terminal that was closed.
_MEANT = {signal.SIGINT: signal.SIGUSR1, signal.SIGHUP: signal.SIGTERM, signal.SIGQUIT: signal.SIGTERM}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--restarts", type=_count, default=0, metavar="N", help="start it again up to N times (%(default)s)"
    )
    parser.add_argument("--run-folder", type=Path, help="where ranks register, and checkpoints go (a new one here)")
    parser.add_argument(
        "job", nargs=argparse.REMAINDER, metavar="-- mpirun ...", help="the command that starts the job"
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not 0, 1, 2, ...")
    return int(text)


class _CannotStart(Exception):
    """Why there is no job."""


def run_job(args: argparse.Namespace) -> int:
    """Run the job until it ends well or has been restarted often enough; return its exit code."""
    command = args.job[1:] if args.job[:1] == ["--"] else args.job
    folder = (args.run_folder or Path(f"run-{time.strftime('%Y%m%d-%H%M%S')}")).resolve()
    try:
        if not command or shutil.which(command[0]) is None:
            what = f"no program {command[0]!r}" if command else "no command"
            raise _CannotStart(f"{what}: give it after --, as in: run --restarts 3 -- mpirun -n 2 python train.py")
        return _run_until_done(command, folder, args.restarts)
    except _CannotStart as error:
        _say(str(error))
        return 2


def _run_until_done(command: list[str], folder: Path, restarts: int) -> int:
    in_vain = 0
    for attempt in range(restarts + 1):
        before = _newest(folder)
        ended = _run_once(command, folder)
        if ended.asked or (ended.code == 0 and not ended.lost):
            return ended.code
        _report(folder, ended)
        in_vain = in_vain + 1 if _newest(folder) == before else 0
        ended = replace(ended, code=ended.code or 1)
        if attempt == restarts:
            break
        if in_vain >= _MOST_IN_VAIN:
            _say(f"not started again: {in_vain} attempts ended without a new checkpoint")
            break
        _say(f"starting again ({attempt + 1} of {restarts}) from {_newest(folder) or 'the beginning'}")
    return ended.code


def _run_once(command: list[str], folder: Path) -> Ended:
    """Start the job and wait for its end."""
    process = _start(command, folder)
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
    lost = watch.lost or (_without_an_end(folder) if code == 0 else [])
    return Ended(128 - code if code < 0 else code, passed_on.asked, lost)


def _start(command: list[str], folder: Path) -> subprocess.Popen:
    """Start the job, in a run folder in which no rank is registered yet."""
    ranks = folder / "ranks"
    try:
        shutil.rmtree(ranks, ignore_errors=True)
        ranks.mkdir(parents=True)
    except OSError as error:
        what = f"the run folder {folder} cannot be made or written ({error.strerror})"
        raise _CannotStart(f"{what}: give one that can by --run-folder") from error
    environment = {**os.environ, RUN_FOLDER: str(folder)}
    try:
        # A session of its own: Ctrl-C is for the ranks, by way of this process, for a launcher would end them at once.
        return subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_ending_with_this_process()
        )
    except OSError as error:
        what = f"{command[0]!r} cannot be started ({error.strerror})"
        raise _CannotStart(f"{what}: give a program, or a script whose first line is #! and its program") from error


def _ending_with_this_process() -> Callable[[], None] | None:
    """Return what a child has to call so that it gets SIGTERM when this process ends, were it by SIGKILL."""
    if sys.platform != "linux":
        return None
    parent, control = os.getpid(), ctypes.CDLL(None).prctl  # loaded here: a child of fork is not to wait for a lock
    control.argtypes = ctypes.c_int, *[ctypes.c_ulong] * 4

    def ask() -> None:
        control(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)

    return ask


def _without_an_end(folder: Path) -> list[Entry]:
    """Return the ranks that have not said that they ended, although their launcher has ended well."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while True:
        left = [entry for entry in read_entries(folder) if not entry.ended]
        # What another host has written may be seen here a while later.
        if all(entry.host == socket.gethostname() for entry in left) or time.monotonic() > deadline:
            return left
        time.sleep(_LOOK_SECONDS)


@dataclass(frozen=True)
class Ended:
    """How a job ended: its launcher's code, whether a signal had asked for that, and the ranks that died first."""

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
            latest = said.get(entry.rank, entry)
            if latest.pid == entry.pid and not latest.ended:  # or its place was taken: jobs of one rank each
                lost.append(entry)
        self.lost = self.lost or lost


def _ends(process: subprocess.Popen, seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):  # the return code tells
        process.wait(seconds)
    return process.returncode is not None


class _PassedOn:
    """Passes SIGTERM, SIGUSR1 and the first Ctrl-C on to the ranks on this host; the second Ctrl-C ends the job.

    SIGQUIT and SIGHUP, of a terminal that closes, are passed on as SIGTERM; under nohup, SIGHUP is nobody's.
    """

    def __init__(self, process: subprocess.Popen, folder: Path):
        self._process, self._folder = process, folder
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> _PassedOn:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # by nohup
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
        passed = _MEANT.get(number, number)
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
    vanished = "" if ended.code else ", but not all of its ranks have ended: it has failed"
    _say(f"the job ended with code {ended.code}{vanished}")
    failed = [entry for entry in entries if entry.failure]
    for entry in failed:
        _say(f"rank {entry.rank} on {entry.host} (PID {entry.pid}) failed: {entry.failure}")
    others = {entry.rank for entry in entries if not entry.ended and not entry.failure}
    first = [entry for entry in ended.lost if entry.rank in others]
    far = [e for e in entries if e.rank in others and e.host != socket.gethostname()]  # these nobody here could see
    for entry in first or ([] if failed else far):
        who = f"rank {entry.rank} on {entry.host} (PID {entry.pid})"
        _say(f"{who} died without a word: killed, crashed, or ended by os._exit")
    if not entries:
        _say(f"no rank had registered in {folder}: it ended before a loader was made")


def _newest(folder: Path) -> Path | None:
    complete = complete_in(folder / "checkpoints")
    return complete[-1] if complete else None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it, as of a terminal that was closed: the job is watched on
        print(f"adaloader: {text}", file=sys.stderr, flush=True)
