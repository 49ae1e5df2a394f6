"""Who we run with: the communicator, and ending the whole job when one rank fails.

Ranks wait for each other, so a rank that dies alone leaves the others waiting. An exception that ends this process is
met in `sys.excepthook`, and, should somebody have replaced that, at exit, where `sys.last_value` still tells of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from adaloader.ranks.registry import ends
from pm import PeerError
from pm.launch import default_comm, launched

if TYPE_CHECKING:
    from mpi4py import MPI

_PROCESS_OF_RANK = "ADALOADER_PROCESS_OF_RANK"
_INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended
# A launcher that is told to end the job may drop what it has not yet read of the ranks' output.
_SECONDS_TO_SPEAK = 0.3
# How long the trainer's thread may take to meet what ended a background thread.
_SECONDS_TO_MEET = 3.0


def same_comm(one: MPI.Comm | None, other: MPI.Comm | None) -> bool:
    """Whether two `comm=` arguments mean the same ranks; None stands for the default."""
    if one is other:
        return True
    one, other = (default_comm() if comm is None else comm for comm in (one, other))
    if all(comm is None or comm.size == 1 for comm in (one, other)):
        return True
    return one is not None and other is not None and one == other


def end_job_on_failure() -> None:
    """Have an exception that ends this process end the whole job, with its traceback and a non-zero code.

    Ctrl-C counts as one. For the main process of a rank. To be called again after code that may have set a hook.
    """
    global _guarded
    if sys.excepthook is not _abort and multiprocessing.parent_process() is None and _is_started_by_launcher():
        _guarded = True
        _hooks_before.append(sys.excepthook)
        sys.excepthook = _abort


def _is_started_by_launcher() -> bool:
    """Whether this process is a rank, not one that a rank has started, with the launcher's variables too."""
    return os.environ.setdefault(_PROCESS_OF_RANK, str(os.getpid())) == str(os.getpid())


def end_job_if_failed() -> None:
    """At exit: end the job if an exception is what ends this process, and our hook has not done so."""
    error = getattr(sys, "last_value", None)
    if _guarded and error is not None and os.getpid() == _process:
        end_job(type(error))


_guarded = False
_hooks_before: list = []  # a hook may call the one that it found, which may be ours: each is called once
_acting = False
_process = os.getpid()


def _abort(kind, error, trace) -> None:
    """Print as the hooks before this one do, then end the job.

    Called by another hook it leaves the end to the exit of the process: `torch.distributed` sets a hook that catches
    what is printed in its course, and prints it afterwards.
    """
    global _acting
    first, _acting = sys.excepthook is _abort and not _acting, True
    before = _hooks_before.pop() if _hooks_before else sys.__excepthook__
    before(kind, error, trace)
    if first and os.getpid() == _process:  # a forked child is no rank
        end_job(kind)


def end_job_unless(known: Callable[[], bool], error: BaseException) -> None:
    """A background thread has ended with `error`: end the job, unless the trainer's thread soon meets it and raises it.

    It would be too late where that thread is waiting for ranks that wait for this one, or is far from our code. The
    cause is printed now, before others notice that this rank is gone; what is wrong on all ranks, all will raise.
    """
    is_cause = not isinstance(error, PeerError)
    if is_cause:
        traceback.print_exception(error)

    def end() -> None:
        if not known():
            if not is_cause:
                traceback.print_exception(error)
            end_job(type(error))

    timer = threading.Timer(_SECONDS_TO_MEET, end)
    timer.daemon = True
    timer.start()


def end_job(kind: type[BaseException]) -> None:
    """End the whole job with a non-zero code, after a line that names this rank and `kind`."""
    mpi = sys.modules.get("mpi4py.MPI")
    begun = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    ranks, rank = (mpi.COMM_WORLD.size, mpi.COMM_WORLD.rank) if begun else launched()
    ends(kind.__name__)
    with contextlib.suppress(OSError, ValueError):  # a script may have closed them, and the job ends in any case
        print(f"adaloader: rank {rank} of {ranks} failed ({kind.__name__}); ending the job", file=sys.stderr)
        for stream in (sys.stderr, sys.stdout):
            if stream is not None:
                stream.flush()
    time.sleep(_SECONDS_TO_SPEAK)
    if begun:
        mpi.COMM_WORLD.Abort(_INTERRUPTED if issubclass(kind, KeyboardInterrupt) else 1)
    # Before MPI has begun, launchers end the job for a process that a signal ended, not for one that exits.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
