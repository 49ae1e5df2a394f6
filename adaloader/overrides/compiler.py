"""`torch.compile`: what must run as it is written, with a graph break where compiled code calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C._dynamo import eval_frame


def not_compiled(function: Callable) -> Callable:
    """Mark `function` such that the compiler neither traces it nor compiles what it calls, and return it.

    Does what `torch.compiler.disable` does, without its import, which takes seconds and tens of megabytes where nothing
    is compiled, and without a wrapper.
    """
    if not hasattr(eval_frame, "set_code_exec_strategy"):  # PyTorch before 2.8
        return torch.compiler.disable(function)
    skip = eval_frame._FrameAction.SKIP
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = "it works on rows that AdaLoader manages"
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function
