"""`torch.compile`: what must run as it is written, with a graph break where compiled code calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_running_compiler = torch._C._dynamo.eval_frame.get_eval_frame_callback


def _skip(code) -> None:
    """Have the compiler leave a frame alone, and what it calls: it would go on within it after a graph break."""
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # since PyTorch 2.7
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    else:
        frames.skip_code(code)


def not_compiled(function: Callable) -> Callable:
    """Return `function` such that the compiler neither traces it nor compiles what it calls.

    Does what `torch.compiler.disable` does, without its import, which takes seconds and tens of megabytes where nothing
    is compiled.
    """

    @functools.wraps(function)
    def called(*args, **kwargs):
        if _running_compiler() is None:
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    _skip(called.__code__)
    called._torchdynamo_disable = True
    called._torchdynamo_disable_msg = "it works on rows that AdaLoader manages"
    return called
