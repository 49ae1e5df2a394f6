"""Rows that plain PyTorch hands out as a view of the table (`table[3]`, `table[2:5]`).

A write to such a view changes the table in plain PyTorch. Here the rows are a copy: what is written to it is written to
the table as well, where it is known which rows they are (not for views of the copy), and refused elsewhere.
"""

from __future__ import annotations

import torch

from adaloader.errors import ManagedTableError
from adaloader.overrides.compiler import not_compiled
from adaloader.overrides.native import operation_name

# In-place by name, but they change no value.
_HARMLESS = {"requires_grad_", "detach_", "rename_", "share_memory_"}
_ASSIGNMENTS = {
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
}


class RowsView(torch.Tensor):
    """A copy of some rows of the table named `table_name`; views of it are guarded too, other results are not."""

    table_name: str
    origin: tuple[torch.Tensor, tuple] | None = None

    @classmethod
    @not_compiled
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(getattr(kind, "decides_before_rows", False) for kind in types):
            return NotImplemented  # a table among the arguments has no values to be read here
        source = _source(args, kwargs)
        for target in written_arguments(func, args, kwargs):
            is_alone = any(target is value for value in (*args, *kwargs.values()))  # and not in a list of several
            if isinstance(target, RowsView) and is_alone and _may_be_written(target):
                return _write_through(target, func, args, kwargs)
            if isinstance(target, RowsView):
                raise ManagedTableError(
                    f"{operation_name(func)} would write to rows of table {target.table_name!r}, but what reading a "
                    "managed table gives is a copy: write to the table itself, under torch.no_grad() "
                    "(table[ids] = values, table.mul_(0.9), table.copy_(values))"
                )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return guarded(result, source.table_name) if _is_view_of(result, source) else result


def guarded(rows: torch.Tensor, table_name: str, origin: tuple[torch.Tensor, tuple] | None = None) -> RowsView:
    """Return `rows` as a `RowsView`, with the same memory and place in the autograd graph; `origin` is the table, and
    the index by which they are all of its rows there."""
    view = rows.as_subclass(RowsView)
    view.table_name, view.origin = table_name, origin
    return view


def _may_be_written(rows: RowsView) -> bool:
    table = None if rows.origin is None else rows.origin[0]
    return table is not None and not (table.requires_grad and torch.is_grad_enabled())


def _write_through(rows: RowsView, func, args: tuple, kwargs: dict) -> RowsView:
    """Write to the rows in the table (collective, as all writes to a table are) and here."""
    table, index = rows.origin
    with torch.no_grad():
        changed = rows.as_subclass(torch.Tensor).detach().clone()

        def replaced(value):
            return changed if value is rows else value

        func(*map(replaced, args), **{name: replaced(value) for name, value in kwargs.items()})
        table.detach()[index] = changed
        with torch._C.DisableTorchFunctionSubclass():
            rows.detach().copy_(changed)
    return rows


def written_arguments(func, args: tuple, kwargs: dict) -> list:
    """Return the arguments that `func(*args, **kwargs)` writes to: `out=`, or the first of a function in place."""
    written = kwargs.get("out")
    if written is None and _writes_first(func):
        written = _source(args, kwargs)
    return list(written) if isinstance(written, (list, tuple)) else [] if written is None else [written]


def _source(args: tuple, kwargs: dict):
    return args[0] if args else next((kwargs[name] for name in ("input", "tensor", "self") if name in kwargs), None)


def _writes_first(func) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    return in_place or name in _ASSIGNMENTS or (name == "__set__" and func.__self__ is torch.Tensor.data)


def _is_view_of(result, source) -> bool:
    return (
        type(result) is torch.Tensor
        and isinstance(source, RowsView)
        and result.numel() > 0
        and result.untyped_storage().data_ptr() == torch.Tensor.untyped_storage(source).data_ptr()
    )
