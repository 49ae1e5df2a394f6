"""Whether indices are checked, where the check would have the host wait for a device."""

from __future__ import annotations

import contextlib
import threading

_state = threading.local()


@contextlib.contextmanager
def trusted():
    """Do not check the range of indices on a device inside, on this thread: a wrong one then reads or writes other
    memory.

    The host need not wait for the device then. For indices that were made by us, or checked before. Nothing changes for
    arrays in the host's memory, whose indices are always checked.
    """
    before = is_trusted()
    _state.trusted = True
    try:
        yield
    finally:
        _state.trusted = before


def is_trusted() -> bool:
    """Whether this thread is inside `trusted`."""
    return getattr(_state, "trusted", False)
