"""What happens when a managed table is used as a whole: read without gradient, written, or made dense again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adaloader.errors import ManagedTableError
from adaloader.gradients.row_gradient import RowGradient
from adaloader.gradients.whole_gradient import read_whole
from adaloader.lookups.operations import ids_of_assignment
from adaloader.overrides.native import operation_name
from adaloader.tables.dense_use import use_as_a_whole
from adaloader.tables.writes import add_gradient, change_every_row, change_rows, overwrite
from adaloader.views.rows_view import guarded, written_arguments
from adaloader.views.view_values import is_view, values_of

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable

# Functions in place that treat every row alike: each owner applies them to its own rows.
_BY_ROW = {
    getattr(torch.Tensor, name)
    for name in """mul_ multiply_ __imul__ div_ divide_ true_divide_ __itruediv__ add_ __iadd__ sub_ subtract_ __isub__
    clamp_ clip_ clamp_min_ clamp_max_ zero_ fill_ neg_ negative_ abs_ absolute_ nan_to_num_ sqrt_ square_ sign_ tanh_
    sigmoid_ exp_ log_ reciprocal_ round_ pow_ __ipow__ lerp_ masked_fill_ copysign_""".split()
    if hasattr(torch.Tensor, name)
}
# Functions whose results have no gradient: calling one of them is no use of the table in training.
WITHOUT_GRADIENT = {
    getattr(holder, name)
    for holder in (torch, torch.Tensor)
    for name in """eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isnan isinf isfinite isneginf isposinf
    isin isclose allclose equal any all argmax argmin argsort count_nonzero nonzero unique histc logical_not logical_and
    logical_or logical_xor bool int long tolist numpy __array__ __bool__ __contains__ __repr__ item is_nonzero bucketize
    searchsorted signbit bincount""".split()
    if hasattr(holder, name)
}
_ADDS = {getattr(torch.Tensor, name): 1.0 for name in ("add_", "__iadd__")} | {
    getattr(torch.Tensor, name): -1.0 for name in ("sub_", "subtract_", "__isub__")
}
_PLACES = {torch.Tensor.index_copy_, torch.Tensor.index_fill_, torch.Tensor.index_add_}


def use_whole(table: ManagedTable, func, args: tuple, kwargs: dict):
    """Do `func(*args, **kwargs)`, in which `table` appears and which is no lookup.

    Raises:
        ManagedTableError: if it needs the whole table with its gradient, and that cannot be had.
    """
    name = operation_name(func)
    written = [argument for argument in written_arguments(func, args, kwargs) if _is_of(argument)]
    if written:
        return _write(written[0], func, args, kwargs, name)
    trained = any(_is_of(a) and a.requires_grad for a in _tensors((*args, *kwargs.values())))
    if trained and torch.is_grad_enabled() and func not in WITHOUT_GRADIENT:
        tables = {id(a._managed): a._managed for a in _tensors((*args, *kwargs.values())) if _is_of(a)}
        use_as_a_whole(tables.values(), name)
        return func(*_replaced(args, with_gradient=True), **_replaced(kwargs, with_gradient=True))
    return func(*_replaced(args), **_replaced(kwargs))


def _write(target, func, args, kwargs, name):
    table = target._managed
    if target.requires_grad and torch.is_grad_enabled() and not _initialises(func):
        raise ManagedTableError(
            f"{name} on table {table.name!r}: PyTorch does not allow a parameter to be changed in place while "
            "gradients are recorded; do it under torch.no_grad(), or on its .data"
        )
    leads = bool(args) and args[0] is target
    is_first = kwargs.get("out") is None and (leads or any(value is target for value in kwargs.values()))
    if not is_first and kwargs.get("out") is not target:
        raise ManagedTableError(
            f"{name} writes to a list with table {table.name!r} in it: write to the table by itself"
        )
    sign = _ADDS.get(func)
    if sign is not None and is_first and (gradient := _row_gradient(args[1:] if leads else args, kwargs)) is not None:
        add_gradient(table, gradient._sum, sign * float(kwargs.get("alpha", 1)))
        return target
    others = _replaced(args[1:] if leads else args)
    named = _replaced({key: value for key, value in kwargs.items() if value is not target})
    if is_first and func in _BY_ROW and all(_keeps_rows_apart(value, table) for value in (*others, *named.values())):
        change_every_row(table, func, others, named, name)
    elif is_first and func is torch.Tensor.__setitem__ and (found := ids_of_assignment(table, others[0])) is not None:
        ids, rest = found

        def assign(rows, positions):
            rows[(positions, *rest)] = others[1]

        change_rows(table, ids, assign)
        return None
    elif is_first and func in _PLACES and others[0] in (0, -2):
        change_rows(table, others[1], lambda rows, positions: func(rows, 0, positions, *others[2:], **named))
    else:
        _rewrite(table, func, others, named, is_first, name)
    return target


def _rewrite(table, func, others, named, is_first: bool, name: str) -> None:
    """Whatever else: done on all values, which are then written back; on several ranks on those of the first
    that runs this line."""
    values = table.whole_values().clone()
    with table.owner.paused(), torch.no_grad():
        if is_first:
            func(values, *others, **named)
        else:
            values = func(*others, **{**named, "out": values})
    overwrite(table, values, name)


def _row_gradient(others: tuple, kwargs: dict) -> RowGradient | None:
    """Return the row gradient that is to be added to a table, as adversarial training does, if that is it."""
    other = others[0] if others else kwargs.get("other")
    return other if isinstance(other, RowGradient) else None


def _initialises(func) -> bool:
    return getattr(func, "__module__", None) == "torch.nn.init"


def _keeps_rows_apart(value, table: ManagedTable) -> bool:
    if not isinstance(value, torch.Tensor):
        return not isinstance(value, (list, tuple))
    rows, dim = table.parameter.shape
    return tuple(value.shape) in {(), (1,), (dim,), (1, dim), (1, 1), (rows, 1), (rows, dim)} and (
        value.ndim != 1 or dim > 1 or value.shape == (1,)
    )


def _is_of(value) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "_managed")


def _tensors(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _replaced(value, with_gradient: bool = False):
    """Return `value` with the present values in place of tables: not to be written, or, if so asked and the table is
    trained, with a gradient that goes to its rows."""
    if _is_of(value):
        table = value._managed
        if is_view(value):
            return values_of(value, with_gradient)
        return read_whole(table) if with_gradient and value.requires_grad else guarded(table.whole_values(), table.name)
    if isinstance(value, dict):
        return {name: _replaced(part, with_gradient) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(part, with_gradient) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(part, with_gradient) for part in value)
    return value
