"""A dispatch mode beneath those of the user, so that theirs come and go while ours stays.

Modes form a stack per thread, and every ``with`` block pops whatever is on top. A mode that shall outlive the
blocks of the user's code must therefore lie under all of theirs. PyTorch's own infrastructure modes (fake
tensors, tracing) live in slots beneath the stack and are left alone. The modes of others are moved without
being entered or left: their own bookkeeping never notices.
"""

from __future__ import annotations

import threading

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from .eagerly import inside_compiled_code

_leftovers = threading.local()
_INFRASTRUCTURE = tuple(torch._C._TorchDispatchModeKey.__members__.values())


def insert_at_bottom(mode: TorchDispatchMode) -> None:
    """Put ``mode`` under every mode on this thread's stack."""
    above = [_pop_mode() for _ in _user_modes()]
    _push_mode(mode)
    for other in reversed(above):
        _push_mode(other)


def remove(mode: TorchDispatchMode) -> bool:
    """Take ``mode`` from wherever it is on this thread's stack; whether it was there."""
    present = _user_modes()
    if not any(other is mode for other in present):
        return False
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
    return True


def remove_when_possible(mode: TorchDispatchMode) -> bool:
    """Take ``mode`` from this thread's stack, or have :func:`remove_leftovers` do so; whether it was there.

    A compiled function puts back the dispatch keys that it found when it returns: among them, as long as any mode is on
    the stack, the key of modes. So a mode that was there at its beginning must outlast it.
    """
    if not inside_compiled_code():
        return remove(mode)
    if not any(other is mode for other in _user_modes()):
        return False
    _leftovers.modes = [*getattr(_leftovers, "modes", ()), mode]
    return True


def remove_leftovers() -> None:
    """Take from this thread's stack the modes that had to outlast a compiled function which has returned."""
    if getattr(_leftovers, "modes", None) and not inside_compiled_code():
        modes, _leftovers.modes = _leftovers.modes, []
        for mode in modes:
            remove(mode)


def tracing() -> bool:
    """Whether one of PyTorch's infrastructure modes is active: the tensors that pass now are stand-ins, not data."""
    return any(torch._C._get_dispatch_mode(key) is not None for key in _INFRASTRUCTURE)


def _user_modes() -> list[TorchDispatchMode]:
    return [mode for mode in _get_current_dispatch_mode_stack() if getattr(mode, "_mode_key", None) is None]
