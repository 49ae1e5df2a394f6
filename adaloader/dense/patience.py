"""Waiting for a collective of `torch.distributed`, and for no longer than it can still come.

Gloo's own wait knows neither Ctrl-C nor that a rank has left and still serves its rows: it blocks until its time limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

# How long one wait of gloo's may take; when its time is over the collective goes on.
_LOOK_SECONDS = 0.1


def wait(work: dist.Work, timeout: timedelta, in_vain: Callable[[], str | None]) -> None:
    """Block until `work`, a collective of gloo's, is complete.

    Raises:
        RuntimeError: it failed, or `timeout` is over, or `in_vain()`, asked now and then, gives a reason.
    """
    started = time.monotonic()
    while True:
        try:
            work.wait(timedelta(seconds=_LOOK_SECONDS))
            return
        except RuntimeError:
            if work.is_completed():  # now, or with the error that this is
                work.wait(timeout)
                return
        reason = in_vain()
        if reason is None and time.monotonic() - started > timeout.total_seconds():
            reason = f"it was not complete after {timeout.total_seconds():g} s"
        if reason is not None:
            raise RuntimeError(reason)
