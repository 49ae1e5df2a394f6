"""Hooks that users register on tables: called when a backward ends, with the row gradient that it has given.

They are those of `Tensor.register_hook` (given the gradient of one backward, before it is added to `.grad`; what they
return takes its place) and of `register_post_accumulate_grad_hook`. In plain PyTorch they run as soon as the gradient
is there. Here it comes in parts, one per lookup of the same rows, and on several ranks from all of them, so that it is
there at the end.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from adaloader.errors import ManagedTableError
from adaloader.gradients.backward import TaskEnd, current_task, queue_at_end
from adaloader.gradients.parts import Part
from adaloader.gradients.row_gradient import RowGradient, row_gradient
from adaloader.gradients.row_sum import RowSum

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel
    from adaloader.tables.managed_table import ManagedTable


class OfTable:
    """A hook of a table. Autograd, which may still hold it, gets nothing by calling it; `call` is for tables."""

    def __init__(self, call: Callable[[torch.Tensor], object]):
        self.call = call

    def __call__(self, gradient: torch.Tensor) -> None:
        return None


def give_back_hooks(table: ManagedTable) -> None:
    """The parameter is an ordinary one again: its hooks are autograd's to call."""
    for attribute, hooks in (("_backward_hooks", table.hooks), ("_post_accumulate_grad_hooks", table.post_hooks)):
        if hooks:
            for key, hook in list(hooks.items()):
                hooks[key] = hook.call
        setattr(table.parameter, attribute, hooks or None)
    table.hooks, table.post_hooks = OrderedDict(), OrderedDict()


class GradientHooks:
    """Calls the hooks of one model's tables.

    Invariant: `_fresh` has, for tables with hooks, the parts that the backward under way has given so far.
    """

    def __init__(self, model: ManagedModel):
        self._model = weakref.ref(model)
        self._fresh: dict[ManagedTable, list[Part]] = {}
        self._task: int | None = None

    def reached(self, table: ManagedTable, part: Part) -> None:
        """A backward has given `part`."""
        if not table.has_hooks:
            return
        self._fresh.setdefault(table, []).append(part)
        model = self._model()
        if model.reducer is None and self._task != current_task():
            self._task = current_task()
            queue_at_end(TaskEnd(self.backward_ended, self._fresh.clear))

    def backward_ended(self) -> None:
        """Call the hooks of tables that the backward has reached (on several ranks: collective, in table order)."""
        model = self._model()
        fresh, self._fresh, self._task = self._fresh, {}, None
        tables = [table for table in model.tables_in_order() if table.has_hooks]
        if not tables:
            return
        given = [RowSum(table, fresh.get(table, []), belongs_to_table=False) for table in tables]
        for rows in given:
            rows.table.parts = [p for p in rows.table.parts if not any(p is part for part in rows.parts)]
        if model.ranks > 1:
            given = model.combiner.combine_backward(given, following=model.joining)
        else:
            given = [rows for rows in given if rows.parts]
        if not model.joining:
            with_graph = any(part.values.requires_grad for rows in given for part in rows.parts)
            # backward(inputs=[a table]) is run with the operations of tables switched off, hooks are not
            with torch.set_grad_enabled(with_graph), torch._C._EnableTorchFunction(), model.paused():
                for rows in given:
                    _call(rows)


def _call(rows: RowSum) -> None:
    """Let the hooks of a table change what a backward has given, add that to its gradient, then call the others."""
    table = rows.table
    gradient = row_gradient(rows)
    for hook in list(table.hooks.values()):
        returned = hook.call(gradient)
        if returned is not None:
            if not (isinstance(returned, RowGradient) and returned._sum.table is table):
                raise ManagedTableError(
                    f"a hook on table {table.name!r} returned {type(returned).__name__}; it must return None or a "
                    "gradient that it computed from the one that it was given (grad * 0.5, say)"
                )
            gradient = returned
    table.parts = [*table.parts, *gradient._sum.parts]
    table.gradient.changed()
    table.has_gradient = True
    for hook in list(table.post_hooks.values()):
        if hook.call(table.parameter) is not None:
            raise RuntimeError("Tensor post accumulate grad hooks should return None.")
