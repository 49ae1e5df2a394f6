"""Notices that a loop has thrown an optimizer's state away, to begin anew: what records hold of it goes with it."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer


class StateWatch:
    """Watches `optimizer.state`, which has nothing of managed tables that says whether it was cleared.

    It was where it is empty, and it had something after the last step or is another object since. (An optimizer that
    holds tables alone has nothing in it: there only another object tells.)

    Args:
        on_reset: called before the step that follows.
    """

    def __init__(self, on_reset: Callable[[Optimizer], None]):
        self._on_reset = on_reset
        self._known: tuple[object, bool] | None = None  # `state`, and whether it had something

    def step_begins(self, optimizer: Optimizer) -> None:
        """Call `on_reset` if the state is gone."""
        if self._known is None:
            return
        state, had_any = self._known
        if (had_any or optimizer.state is not state) and not any(optimizer.state.values()):
            self._on_reset(optimizer)

    def is_as_it_should_be(self, optimizer: Optimizer) -> None:
        """A step has ended, or a state was loaded."""
        self._known = optimizer.state, any(optimizer.state.values())
