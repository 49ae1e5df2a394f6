"""What happens when a view of a managed table is used otherwise than by a lookup: as with the table itself."""

from __future__ import annotations

import torch

from adaloader.errors import ManagedTableError
from adaloader.overrides.native import operation_name
from adaloader.tables.dense_use import use_as_a_whole
from adaloader.tables.whole_use import WITHOUT_GRADIENT
from adaloader.tables.writes import overwrite
from adaloader.views.rows_view import written_arguments
from adaloader.views.view_values import as_viewed, is_view, values_of


def use_views(func, args: tuple, kwargs: dict):
    """Do `func(*args, **kwargs)`, in which views of tables appear and which is no lookup.

    Raises:
        ManagedTableError: if it needs a whole table with its gradient and that cannot be had, or writes to a view while
            gradients are recorded.
    """
    name = operation_name(func)
    views = list(_views((*args, *kwargs.values())))
    written = [argument for argument in written_arguments(func, args, kwargs) if is_view(argument)]
    if written:
        return _write(written[0], func, args, kwargs, name)
    tables = {id(view._managed): view._managed for view in views if not view._managed.is_dense}
    if any(view.requires_grad for view in views) and torch.is_grad_enabled() and func not in WITHOUT_GRADIENT:
        use_as_a_whole(tables.values(), name)
        return func(*_replaced(args, with_gradient=True), **_replaced(kwargs, with_gradient=True))
    return func(*_replaced(args), **_replaced(kwargs))


def _write(view, func, args, kwargs, name: str):
    """Write to all values, which are then written back; on several ranks those of the first that runs this line
    count (collective)."""
    table = view._managed
    if table.is_dense:
        func(*_replaced(args), **_replaced(kwargs))
        return view
    if view.requires_grad and torch.is_grad_enabled():
        raise ManagedTableError(
            f"{name} on a view of table {table.name!r}: PyTorch allows no parameter to be changed in place while "
            "gradients are recorded; do it under torch.no_grad(), or on its .data"
        )
    with table.owner.paused(), torch.no_grad():
        whole = table.whole_values().clone()
        target = as_viewed(view, whole)
        func(*_replaced(args, view, target), **_replaced(kwargs, view, target))
    overwrite(table, whole, name)
    return view


def _views(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _views(value)
        elif is_view(value):
            yield value


def _replaced(value, target=None, by=None, *, with_gradient: bool = False):
    if value is target and target is not None:
        return by
    if is_view(value):
        return values_of(value, with_gradient)
    if isinstance(value, dict):
        return {name: _replaced(part, target, by, with_gradient=with_gradient) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replaced(part, target, by, with_gradient=with_gradient) for part in value)
    return value
