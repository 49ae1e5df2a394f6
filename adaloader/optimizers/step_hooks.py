"""Step hooks that are next to an optimizer's own step, whoever registers others, and when.

What a loader's hooks do belongs to the step: the user's hooks before it see, and may change, the gradients of all
parameters, and those after it see all values of the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def call_last_before_steps(optimizer: Optimizer, hook: Callable) -> RemovableHandle:
    """Register a step pre-hook that runs after all others of `optimizer`, later ones too."""
    handle = optimizer.register_step_pre_hook(hook)
    hooks, this = optimizer._optimizer_step_pre_hooks, weakref.ref(optimizer)
    before = optimizer.__dict__.get("register_step_pre_hook")  # of another model's loader

    def register_step_pre_hook(other: Callable) -> RemovableHandle:
        registered = type(this()).register_step_pre_hook(this(), other) if before is None else before(other)
        if handle.id in hooks:
            hooks.move_to_end(handle.id)
        return registered

    optimizer.register_step_pre_hook = register_step_pre_hook
    return handle


def call_first_after_steps(optimizer: Optimizer, hook: Callable) -> RemovableHandle:
    """Register a step post-hook that runs before all others of `optimizer`, earlier ones too."""
    handle = optimizer.register_step_post_hook(hook)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    return handle
