"""`torch.func.grad`, `vmap` and their like replace tensors by wrappers, and a managed table has nothing to wrap."""

from __future__ import annotations

import torch
from torch._functorch import eager_transforms

from adaloader.errors import ManagedTableError


def refuse_inside(operation: str, table: str) -> None:
    """Raise ManagedTableError for a lookup inside a function transform."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ManagedTableError(
            f"{operation} of table {table!r} inside a function transform (torch.func.grad, vmap, ...), which AdaLoader "
            "does not support: look the rows up before, and pass these to the function; or keep the table dense by a "
            "larger min_rows"
        )


def _refusing(wrap):
    def wrapped(tensor, level):
        managed = getattr(tensor, "_managed", None)
        if managed is not None:
            raise ManagedTableError(
                f"table {managed.name!r} was given to a function transform (torch.func.grad, vjp, ...) that would take "
                "the gradient of all its rows: look rows up before, and pass these to the function; or keep the table "
                "dense by a larger min_rows"
            )
        return wrap(tensor, level)

    wrapped.refuses_tables = True
    return wrapped


def guard_transforms() -> None:
    """Have transforms refuse tables: once wrapped, one is a plain tensor of NaN, and nothing else would notice."""
    wrap = getattr(eager_transforms, "_wrap_for_grad", None)
    if wrap is not None and not hasattr(wrap, "refuses_tables"):
        eager_transforms._wrap_for_grad = _refusing(wrap)
