"""Backwards whose dense gradients are not summed over ranks yet: what `loader.no_sync()` is made of.

Gradients of several batches are added up in `.grad` before they are summed over ranks, so that each must carry its own
batch's weight when it is added: it is multiplied by ranks x weight / sum of weights (exactly 1 where all ranks have
equal shares), and the sum that follows is a mean over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter


class Deferral:
    """Whether backwards are to wait for a later sum, and how many do (`pending`).

    Invariant: gradients pass `factor` on their way into `.grad` inside `no_sync()`, and from then on until they have
    been summed.

    Args:
        factor: asked while a backward runs: what the gradients that it gives are to be multiplied by.
    """

    def __init__(self, factor: Callable[[], float]):
        self.pending = 0
        self._factor = factor
        self._depth = 0
        self._handles: list = []
        self._nodes: list = []  # parameters do not keep them alive

    @property
    def is_on(self) -> bool:
        """Whether the loop is inside `no_sync()`."""
        return self._depth > 0

    def enter(self, parameters: Iterable[Parameter]) -> None:
        """The loop enters `no_sync()`."""
        self._depth += 1
        if self._handles:
            return
        for parameter in parameters:
            if parameter.requires_grad:
                node = get_gradient_edge(parameter).node
                self._nodes.append(node)
                self._handles.append(node.register_prehook(self._weigh))

    def leave(self) -> None:
        self._depth -= 1
        self._release()

    def summed(self) -> None:
        """What was pending has been summed."""
        self.pending = 0
        self._release()

    def _release(self) -> None:
        if self._depth or self.pending:
            return
        for handle in self._handles:
            handle.remove()
        self._handles, self._nodes = [], []

    def _weigh(self, grads: tuple) -> tuple | None:
        factor = self._factor()
        if factor == 1.0:
            return None
        with torch.no_grad():
            return tuple(None if grad is None else grad * factor for grad in grads)
