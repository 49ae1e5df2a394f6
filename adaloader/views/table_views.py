"""Views of a managed table (`weight[:-1]`, `weight.view(n, heads, d)`, `weight.t()`), which read nothing until they are
indexed.

Such a view keeps what PyTorch would give: its sizes and strides, on the meta device. Once it is indexed, the rows
behind those elements are looked up, and the view's columns are taken from them. A view of few rows is looked up at
once, as `weight[3]` is; anything else that is done with a view reads its rows if they are less than half of the table,
else it is an error.

This file says what each operation on a view does; `table_slice.py` makes views and reads their rows, `view_lookups.py`
has the lookups.
"""

from __future__ import annotations

import contextlib

import torch

from adaloader.errors import WholeTableError
from adaloader.overrides.native import native, operation_name
from adaloader.views.rows_view import written_arguments
from adaloader.views.table_slice import TableSlice, rows_or_refusal, slice_of, unseen, view_by
from adaloader.views.view_lookups import embedding, embedding_bag, gather, get_item, index_select, take, take_along_dim
from adaloader.views.view_use import use_views


def operate(func, args: tuple, kwargs: dict):
    """Do `func(*args, **kwargs)`, in which views of tables appear."""
    view = subject(func, args, kwargs)
    if isinstance(view, TableSlice):
        if func in _OF_FORM:
            with unseen():
                return func(view._form, *args[1:], **kwargs)
        if func is torch.Tensor.grad.__get__:
            return None
    if getattr(func, "__name__", "") == "__get__" and func not in _NO_QUESTIONS or func in _QUESTIONS:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if isinstance(view, TableSlice) and not view._managed.is_dense and (func in VIEWS or func in _INDEXING):
        try:
            made = view_by(func, *args, **kwargs) if func in VIEWS else _INDEXING[func](*args, **kwargs)
        except WholeTableError:
            return use_views(func, args, kwargs)
        if view._managed.owner.watch.recorder is not None:
            view._managed.owner.watch.recorder.came_from_table(made)
        return made
    if not written_arguments(func, args, kwargs):
        with contextlib.suppress(WholeTableError):  # of many rows: `use_views` knows whether they can be had
            name = operation_name(func)
            args, kwargs = _with_rows(args, name), {key: _with_rows(value, name) for key, value in kwargs.items()}
    return use_views(func, args, kwargs)


def _with_rows(node, operation: str):
    if isinstance(node, TableSlice):
        return rows_or_refusal(node, operation)
    if isinstance(node, (list, tuple)) and any(isinstance(child, TableSlice) for child in node):
        return type(node)(_with_rows(child, operation) for child in node)
    if isinstance(node, tuple):
        return tuple(_with_rows(child, operation) for child in node)
    return node


def subject(func, args: tuple, kwargs: dict):
    """Return what a call works on: a table's handler serves that table, not one that is among other arguments."""
    place, names = (1, ("weight",)) if func in _WEIGHT_SECOND else (0, ("input", "weight", "self"))
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _detached(view, *args) -> TableSlice:
    with torch.no_grad():
        return slice_of(view, view._form)


def _functions(names: str) -> set:
    methods = {getattr(torch.Tensor, name) for name in names.split() if hasattr(torch.Tensor, name)}
    return methods | {native(name) for name in names.split() if hasattr(torch, name)}


_WEIGHT_SECOND = {torch.nn.functional.embedding, torch.nn.functional.embedding_bag}

# Operations that give a view of their input: what they need is its sizes and strides.
VIEWS = _functions(
    """view reshape unsqueeze squeeze transpose t permute swapaxes swapdims movedim moveaxis narrow select chunk split
    tensor_split hsplit vsplit unbind unflatten flatten ravel expand view_as_complex view_as_real contiguous"""
) | {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "real", "imag")}

# Lookups by something else than rows in front; of tables and views alike.
BY_INDEX = {
    native("gather"): gather,
    torch.Tensor.gather: gather,
    native("take_along_dim"): take_along_dim,
    torch.Tensor.take_along_dim: take_along_dim,
    native("take"): take,
    torch.Tensor.take: take,
}

_INDEXING = BY_INDEX | {
    torch.Tensor.__getitem__: get_item,
    torch.nn.functional.embedding: embedding,
    torch.nn.functional.embedding_bag: embedding_bag,
    native("index_select"): index_select,
    torch.Tensor.index_select: index_select,
    torch.Tensor.detach: _detached,
    native("detach"): _detached,
    torch.Tensor.data.__get__: _detached,
}

_NO_QUESTIONS = {torch.Tensor.data.__get__, *VIEWS}
_OF_FORM = _functions("stride storage_offset is_contiguous")
_QUESTIONS = _functions(
    """size dim ndimension numel nelement is_floating_point is_complex element_size get_device is_signed __len__
    new_zeros new_ones new_full new_empty is_same_size result_type"""
)
