"""Collectives that a thread of gloo's has completed and not yet let go of, when the interpreter ends.

Such a thread reports that a collective is complete, and then destroys what describes it, for which it needs Python's
lock. Where the interpreter has begun to end in between, that aborts the process ("terminate called without an active
exception"): a program that ends right after its last step would fail. A collective that is still referred to from
here is not the thread's to destroy.
"""

from __future__ import annotations

import atexit
import ctypes
import time
import weakref

import torch.distributed as dist

SECONDS_FOR_OTHERS = 0.02
"""Before the interpreter ends: time, with Python's lock free, for threads of collectives that are not kept here."""

_kept: weakref.WeakKeyDictionary[object, list[dist.Work]] = weakref.WeakKeyDictionary()


def keep(owner: object, works: list[dist.Work]) -> None:
    """Keep these collectives, instead of those kept for `owner` before, while `owner` lives; at exit, for ever."""
    _kept[owner] = works


@atexit.register
def _never_destroy() -> None:
    for works in _kept.values():
        for work in works:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(work))
    if _kept:
        time.sleep(SECONDS_FOR_OTHERS)
