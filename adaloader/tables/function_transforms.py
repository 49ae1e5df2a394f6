"""`torch.func.grad`, `vmap` and their like replace tensors by wrappers, and a managed table has nothing to wrap."""

from __future__ import annotations

import torch
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nested._internal.nested_tensor import NestedTensor

from adaloader.errors import WholeTableError
from adaloader.tables.dense_use import become_dense, refuse, why_not_dense
from adaloader.views.view_values import is_view, values_of


def refuse_inside(operation: str, table: str) -> None:
    """Raise WholeTableError for a lookup inside a function transform, whose ids may be wrappers."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise WholeTableError(
            f"{operation} of table {table!r} inside a function transform (torch.func.grad, vmap, ...)"
        )


def _knowing_tables(wrap):
    def wrapped(tensor, level):
        table = getattr(tensor, "_managed", None)
        if table is not None:
            with temporarily_clear_interpreter_stack():
                tensor = _as_dense(tensor, table)
        return wrap(tensor, level)

    wrapped.knows_tables = True
    return wrapped


def _as_dense(tensor, table):
    """Return what the table, or a view of it, is once the table is an ordinary parameter."""
    operation = "a function transform (torch.func.grad, vjp, ...)"
    if not table.is_dense:
        why = why_not_dense(table)
        if why is not None:
            raise refuse(table, operation, why, may_be_read=False)
        become_dense(table, operation)
    if is_view(tensor):
        return values_of(tensor)
    return table.parameter if tensor.requires_grad else table.parameter.detach()


def guard_transforms() -> None:
    """Have transforms and ragged tensors know tables, of which they would see nothing but the memory, full of NaN."""
    wrap = getattr(eager_transforms, "_wrap_for_grad", None)
    if wrap is not None and not hasattr(wrap, "knows_tables"):
        eager_transforms._wrap_for_grad = _knowing_tables(wrap)
    if not hasattr(NestedTensor, "knows_tables"):
        NestedTensor.__torch_function__ = _after_tables(NestedTensor.__torch_function__)
        NestedTensor.knows_tables = True


def _after_tables(handle):
    """Have ragged tensors leave what concerns tables to these: they would take the values of the memory."""

    @classmethod
    def handler(cls, func, types, args=(), kwargs=None):
        if any(getattr(kind, "decides_before_rows", False) for kind in types):
            return NotImplemented
        return handle.__func__(cls, func, types, args, kwargs)

    return handler
