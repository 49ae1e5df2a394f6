"""Compiled functions run as written while a step is watched, for inside compiled code there is nothing to see."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch._C._dynamo import eval_frame

_WRAPPER_MODULE = "torch._dynamo.eval_frame"


class _Eager:
    """How many recordings there are for which compiled functions run as written, and how they ran before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.recordings = 0
        self.stance = None


_eager = _Eager()


def run_eagerly() -> Callable[[], None]:
    """Have `torch.compile`d functions run uncompiled from now on; return a function that ends that.

    Where the compiler was never imported there are none, and nothing is done. Several may overlap in any order.
    """
    if "torch._dynamo" not in sys.modules:
        return _nothing
    with _eager.lock:
        _eager.recordings += 1
        if _eager.recordings == 1:
            _eager.stance = _outside_compiled_code(lambda: torch.compiler.set_stance("force_eager"))
    return _compile_again


def _compile_again() -> None:
    with _eager.lock:
        _eager.recordings -= 1
        if _eager.recordings == 0:
            _outside_compiled_code(lambda: _eager.stance.__exit__(None, None, None))


def inside_compiled_code() -> bool:
    """Whether a compiled function calls this, which afterwards puts back the dispatch keys that it found."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == _WRAPPER_MODULE:
            return True
        frame = frame.f_back
    return False


def _nothing() -> None:
    """End nothing."""


def _outside_compiled_code(action: Callable):
    """Do what the compiler forbids in a function that it runs: the loader may be asked for a batch by one."""
    callback = eval_frame.set_eval_frame(None)
    try:
        return action()
    finally:
        eval_frame.set_eval_frame(callback)
