"""What a hook can know of the backward that called it: which one, what it runs inside of, and when it ends.

PyTorch has no public way to ask; the private ones used here serve its own checkpointing and multi-grad hooks.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

import torch
from torch.autograd import graph
from torch.autograd.function import BackwardCFunction
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

_ENGINE_CODE = graph._engine_run_backward.__code__
_PYTHON_NODE_CODE = BackwardCFunction.apply.__code__


def current_task() -> int:
    """Return the number of the backward pass that is running on this thread.

    Raises:
        RuntimeError: none is.
    """
    task = torch._C._current_graph_task_id()
    if task < 0:
        raise RuntimeError("no backward is running: call this from a hook that backward() calls")
    return task


def enclosing_call() -> tuple[bool, torch.autograd.graph.Node | None]:
    """Say whether the running backward was started inside another, and by which node of the other, if by any.

    Reentrant checkpointing starts a backward inside the Python-written backward of its own node; that call is
    on this thread's stack. Without such a node (a tensor hook that calls `backward()`, say) two calls of the
    engine are.
    """
    engine_calls = 0
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _PYTHON_NODE_CODE:
            return True, frame.f_locals["self"]
        engine_calls += frame.f_code is _ENGINE_CODE
        frame = frame.f_back
    return engine_calls > 1, None


class TaskEnd:
    """Called when a backward pass ends. Dropped without having been called when it fails: then it says so.

    The engine owns it and lets go of it as the exception passes, before `backward()` returns.
    """

    def __init__(self, on_end: Callable[[], None], on_failure: Callable[[], None]) -> None:
        self._on_end = on_end
        self._on_failure = on_failure
        self._called = False

    def __call__(self) -> None:
        self._called = True
        self._on_end()

    def __del__(self) -> None:
        if not self._called:
            self._on_failure()


def queue_at_end(callback: TaskEnd) -> None:
    """Have the engine call `callback` at the end of the running backward, before `backward()` returns."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def hook_gradient(parameter: Parameter, method: Callable[[Parameter], None]) -> RemovableHandle:
    """Call `method(parameter)` after each accumulation of its gradient; it may be frozen now and thaw later.

    The object of `method` is not kept alive: Python does not see that autograd holds hooks, and so would never find
    that only the object and the parameter hold each other.
    """
    weakly = weakref.WeakMethod(method)

    def call(parameter: Parameter) -> None:
        method = weakly()
        if method is not None:
            method(parameter)

    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)  # PyTorch takes no hook for a frozen parameter
    handle = parameter.register_post_accumulate_grad_hook(call)
    parameter.requires_grad_(not frozen)
    return handle
