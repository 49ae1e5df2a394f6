"""Views of a managed table (`weight[:-1]`, `weight.view(n, heads, d)`, `weight.t()`), which read nothing until they are
indexed.

Such a view keeps what PyTorch would give: its sizes and strides, on the meta device. Once it is indexed, the rows
behind those elements are looked up, and the view's columns are taken from them. A view of few rows is looked up at
once, as `weight[3]` is; anything else that is done with a view reads its rows if they are less than half of the table,
else it is an error.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from adaloader import lookups
from adaloader.compiler import not_compiled
from adaloader.deferred_tensor import constant_tensor, operation_name
from adaloader.errors import WholeTableError
from adaloader.gradient_layout import check_layout
from adaloader.native import native
from adaloader.rows_view import guarded, written_arguments
from adaloader.slabs import expand
from adaloader.view_layout import Layout, layout_of
from adaloader.view_positions import (
    columns_of,
    offsets_of,
    order_of_results,
    rows_and_columns,
    sum_of,
    times,
    with_open_rows,
)
from adaloader.view_use import use_views
from adaloader.view_values import values_of

if TYPE_CHECKING:
    from adaloader.managed_table import ManagedTable

# Views of so few rows are looked up when they are made.
_FEW_ROWS = 64


def refusal(operation: str, table: ManagedTable) -> WholeTableError:
    """The error for what is no lookup; `whole_use.py` and `view_use.py` see what can be done about it."""
    return WholeTableError(f"{operation} of table {table.name!r} {list(table.parameter.shape)} would read all of it")


class TableSlice(torch.Tensor):
    """A view of a managed table: `_form` is what PyTorch would give, without values, on the meta device."""

    _managed: ManagedTable
    _form: torch.Tensor
    decides_before_rows = True

    @classmethod
    @not_compiled
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        view = subject(func, args, kwargs)
        if isinstance(view, TableSlice):
            if func in _OF_FORM:
                with _unseen():
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
            with contextlib.suppress(WholeTableError):
                name = operation_name(func)
                args, kwargs = _with_rows(args, name), {key: _with_rows(value, name) for key, value in kwargs.items()}
        return use_views(func, args, kwargs)

    def __repr__(self, *, tensor_contents=None) -> str:
        return (
            f"TableSlice(table={self._managed.name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"requires_grad={self.requires_grad}; rows are managed by AdaLoader)"
        )

    def __deepcopy__(self, memo):
        """A copy is an ordinary tensor, with the values of this moment."""
        if id(self) not in memo:
            memo[id(self)] = values_of(self).as_subclass(torch.Tensor).clone()
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return values_of(self).as_subclass(torch.Tensor).clone().__reduce_ex__(protocol)


def subject(func, args: tuple, kwargs: dict):
    """Return what a call works on: a table's handler serves that table, not one that is among other arguments."""
    place, names = (1, ("weight",)) if func in _WEIGHT_SECOND else (0, ("input", "weight", "self"))
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), None)


# Making views


def view_by(func, source, *args, **kwargs):
    """Return what the view operation `func` gives of a table or of a view of it: a view, or several."""
    with _unseen():
        form = _form_of(source)
        made = func(form, *args, **kwargs)
        parts = made if isinstance(made, (tuple, list)) else (made,)
        if any(part.untyped_storage()._cdata != form.untyped_storage()._cdata for part in parts):
            raise refusal(f"{operation_name(func)} (which copies here)", source._managed)
    if len(parts) > _FEW_ROWS or 1 < len(parts) == source._managed.table.spec.rows:
        raise refusal(operation_name(func), source._managed)
    views = [_made(source, part) for part in parts]
    return type(made)(views) if isinstance(made, (tuple, list)) else views[0]


def _made(source, form: torch.Tensor):
    layout = layout_of(form, source._managed.table.spec.dim)
    view = _slice(source, form)
    if layout.num_rows <= min(_FEW_ROWS, source._managed.table.spec.rows // 2) or form.numel() == 0:
        return guarded(_rows_of(view, "indexing"), source._managed.name)
    return view


def _slice(source, form: torch.Tensor) -> TableSlice:
    device = source._managed.parameter.device
    stand_in = constant_tensor(form.shape, float("nan"), dtype=form.dtype, device=device)
    trains = source.requires_grad and torch.is_grad_enabled()
    view = torch.Tensor._make_subclass(TableSlice, stand_in, trains)
    view._managed, view._form = source._managed, form
    return view


def _form_of(source) -> torch.Tensor:
    if isinstance(source, TableSlice):
        return source._form
    return torch.empty(tuple(source.shape), dtype=source.dtype, device="meta")


@contextlib.contextmanager
def _unseen():
    """Operations on forms are not the user's: no mode sees them."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


# Reading


def rows_or_refusal(view, operation: str) -> torch.Tensor:
    """Return the values of a view of few rows; an error that names the operation where it has many."""
    table = view._managed
    if table.is_dense:
        return values_of(view)
    if _layout(view).num_rows >= max(1, table.table.spec.rows // 2):
        raise refusal(operation, table)
    return _rows_of(view, operation)


def _with_rows(node, operation: str):
    if isinstance(node, TableSlice):
        return rows_or_refusal(node, operation)
    if isinstance(node, (list, tuple)) and any(isinstance(child, TableSlice) for child in node):
        return type(node)(_with_rows(child, operation) for child in node)
    if isinstance(node, tuple):
        return tuple(_with_rows(child, operation) for child in node)
    return node


def _rows_of(view: TableSlice, operation: str) -> torch.Tensor:
    layout = _layout(view)
    if layout.crosses_rows:
        raise refusal(operation, view._managed)
    return look_up_at(view, {}, operation)


def _layout(view) -> Layout:
    return layout_of(view._form, view._managed.table.spec.dim)


def look_up_at(view, indices: dict[int, torch.Tensor], operation: str) -> torch.Tensor:
    """Return the elements of `view` at `indices`: by dimension, ids that are in range, all of one shape `B`.

    As in PyTorch, `B` takes the place of the indexed dimensions where these are neighbours, else it comes first; the
    other dimensions follow in their order.
    """
    layout, table = _layout(view), view._managed
    indices = {at: ids.cpu() for at, ids in indices.items()}  # where lookups are compared and served
    dims = range(len(layout.shape))
    shape_B = next(iter(indices.values())).shape if indices else torch.Size()
    open_rows = [at for at in layout.row_dims if at not in indices]
    open_columns = [at for at in dims if at not in indices and at not in layout.row_dims]
    ids, columns = rows_and_columns(layout, indices, open_columns)
    if open_rows and not indices:  # the same rows for every batch; the number of a single row may be the batch's
        ids = torch.full((), layout.offset // layout.dim, device="cpu")
    ids = with_open_rows(layout, ids, open_rows)
    if view.requires_grad and torch.is_grad_enabled():
        check_layout(table.table.spec.rule, False, table.name, operation)
    slab, positions = table.look_up(ids, operation)
    with table.owner.paused():
        offsets_T = offsets_of(layout, open_columns)
        if columns is None:
            rows = columns_of(expand(slab, positions, ids.shape), offsets_T + layout.offset % layout.dim)
        else:
            at = table.here(positions).view(ids.shape)[..., None]
            wanted = columns.reshape(*shape_B, *[1] * (ids.ndim - len(shape_B)), 1) + offsets_T.flatten()
            rows = slab.tensor[at, wanted.to(at.device)]
        shape = (*ids.shape, *(layout.shape[at] for at in open_columns))
        order = order_of_results(len(shape_B), sorted(indices), open_rows, open_columns)
        found = rows.reshape(shape).permute(order)
        if layout.is_complex:
            found = torch.view_as_complex(found.contiguous())
        return found if view.requires_grad else found.detach()


# Indexing


def checked(view, ids: torch.Tensor, dim: int, operation: str, *, from_the_end: bool) -> torch.Tensor:
    """Return ids for a dimension of a view; with `from_the_end`, negative ones count from there.

    Raises:
        IndexError: naming the id and what is valid.
        TypeError: if ids are not integers.
    """
    size, table = view.shape[dim], view._managed
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        given = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"{operation} of a view of table {table.name!r} got ids of {given}; ids must be torch.int64")
    with table.owner.paused():
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, -1)
    if low < (-size if from_the_end else 0) or high >= size:
        bad = high if high >= size else low
        raise IndexError(
            f"id {bad} is out of range for dimension {dim} of a view {list(view.shape)} of table {table.name!r} "
            f"(valid ids: {-size if from_the_end else 0} to {size - 1})"
        )
    if from_the_end and (low < 0 or table.owner.watch.recorder is not None):  # a watched step: so may others be
        ids = torch.where(ids < 0, ids + size, ids)
    return ids


def get_item(source, index):
    """`view[index]`: integers, slices, None and `...` give views; tensors and lists of ids look up."""
    parts = list(index) if isinstance(index, tuple) else [index]
    basic, advanced = [], {}
    dims_indexed = sum(part is not None and part is not Ellipsis for part in parts)
    place = dim = 0
    form = _form_of(source)
    for part in parts:
        if part is Ellipsis:
            skipped = form.ndim - dims_indexed
            place, dim = place + skipped, dim + skipped
            basic.append(part)
        elif _is_ids(part):
            ids = torch.as_tensor(part)
            if ids.dtype == torch.bool:
                if ids.ndim != 1 or len(ids) != form.shape[dim]:
                    raise refusal("indexing with a mask", source._managed)
                ids = ids.nonzero().squeeze(1)
            advanced[place] = ids
            basic.append(slice(None))
            place, dim = place + 1, dim + 1
        else:
            basic.append(part)
            place += part is None or isinstance(part, slice)
            dim += part is not None
    with _unseen():
        narrowed = form[tuple(basic)]
    if not advanced:
        return _made(source, narrowed)
    view = _slice(source, narrowed)
    ids = [checked(view, given, at, "indexing", from_the_end=True) for at, given in advanced.items()]
    return _found(view, dict(zip(advanced, torch.broadcast_tensors(*ids), strict=True)), "indexing")


def _is_ids(part) -> bool:
    if isinstance(part, torch.Tensor) and part.ndim == 0 and part.dtype == torch.bool or isinstance(part, bool):
        raise IndexError("a managed table cannot be indexed with a single truth value")
    return part is not None and part is not Ellipsis and not isinstance(part, slice) and not _is_int(part)


def _is_int(part) -> bool:
    return hasattr(part, "__index__") and not isinstance(part, torch.Tensor)


def _found(view, indices: dict[int, torch.Tensor], operation: str) -> torch.Tensor:
    layout = _layout(view)
    open_rows = [at for at in layout.row_dims if at not in indices]
    count = 1
    for at in open_rows:
        count *= layout.shape[at]
    if open_rows and count >= max(1, view._managed.table.spec.rows // 2):
        raise refusal(operation, view._managed)
    return look_up_at(view, indices, operation)


def embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """`torch.nn.functional.embedding` of a view `[rows, columns]`."""
    if weight.ndim != 2:
        raise RuntimeError(f"embedding: 'weight' must be 2-D, got a view {list(weight.shape)}")
    ids = checked(weight, input, 0, "embedding", from_the_end=False)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    layout = _layout(weight)
    if layout.is_whole_rows:
        step, start = layout.strides[0] // layout.dim, layout.offset // layout.dim
        return lookups.embedding(
            sum_of([times(ids, step)], start),
            _whole(weight),
            None if padding is None else padding * step + start,
            max_norm,
            norm_type,
            scale_grad_by_freq,
        )
    _refuse_options(weight, "embedding", max_norm, scale_grad_by_freq)
    rows = _found(weight, {0: ids}, "embedding")
    return rows if padding is None else torch.where((ids == padding)[..., None], rows.detach(), rows)


def embedding_bag(
    input,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    """`torch.nn.functional.embedding_bag` of a view `[rows, columns]`."""
    ids = checked(weight, input, 0, "embedding_bag", from_the_end=False)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    layout = _layout(weight)
    options = {
        "offsets": offsets,
        "mode": mode,
        "per_sample_weights": per_sample_weights,
        "include_last_offset": include_last_offset,
    }
    if layout.is_whole_rows:
        step, start = layout.strides[0] // layout.dim, layout.offset // layout.dim
        return lookups.embedding_bag(
            sum_of([times(ids, step)], start),
            _whole(weight),
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            padding_idx=None if padding is None else padding * step + start,
            **options,
        )
    _refuse_options(weight, "embedding_bag", max_norm, scale_grad_by_freq)
    rows = _found(weight, {0: ids.reshape(-1)}, "embedding_bag")
    with weight._managed.owner.paused():
        at = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        padded = (ids == padding).reshape(-1).nonzero() if padding is not None else ()
        if len(padded):
            first = int(padded[0])
            at, options["padding_idx"] = torch.where(ids == padding, first, at), first
        return torch.nn.functional.embedding_bag(at, rows, **options)


def _whole(view: TableSlice):
    """The table itself, for a lookup that a view's is translated to; without gradient where the view has none."""
    parameter = view._managed.parameter
    return parameter if view.requires_grad else parameter.detach()


def _refuse_options(view, operation: str, max_norm, scale_grad_by_freq) -> None:
    if max_norm is not None or scale_grad_by_freq:
        raise refusal(f"{operation} with max_norm or scale_grad_by_freq on a view of columns", view._managed)


def index_select(input, dim, index):
    """`torch.index_select` of a view, along a dimension of its rows."""
    at = dim % input.ndim
    ids = checked(input, index.reshape(-1), at, "index_select", from_the_end=False)
    return _found(_as_slice(input), {at: ids}, "index_select")


def take(input, index):
    """`torch.take`: elements by their place in the flattened table."""
    return get_item(view_by(torch.Tensor.view, input, -1), index)


def gather(input, dim, index, *, sparse_grad=False):
    """`torch.gather` of a table `[n, dim]` or a view of it along its rows."""
    view, at = _as_slice(input), dim % input.ndim
    if at not in _layout(view).row_dims or index.ndim != view.ndim:
        raise refusal(f"gather along dimension {dim}", view._managed)
    ids = checked(view, index, at, "gather", from_the_end=False)
    others = [other for other in range(view.ndim) if other != at]
    if ids.numel() and all(ids.stride(o) == 0 and ids.shape[o] == view.shape[o] for o in others):
        return _along(view, ids[tuple(slice(None) if o == at else 0 for o in range(view.ndim))], at)
    indices = {at: ids}
    for other in others:
        if ids.shape[other] > view.shape[other]:
            raise IndexError(f"gather: index {list(ids.shape)} is larger than the table in dimension {other}")
        shape = [-1 if o == other else 1 for o in range(view.ndim)]
        indices[other] = torch.arange(ids.shape[other], device=ids.device).view(shape).expand(ids.shape)
    return look_up_at(view, {o: indices[o] for o in sorted(indices)}, "gather")


def take_along_dim(input, indices, dim=None):
    """`torch.take_along_dim` of a table `[n, dim]` or a view of it along its rows."""
    if dim is None:
        return take(input, indices.reshape(-1))
    view, at = _as_slice(input), dim % input.ndim
    others = [other for other in range(view.ndim) if other != at]
    if at in _layout(view).row_dims and all(indices.shape[o] == 1 for o in others):
        ids = checked(view, indices.reshape(-1), at, "take_along_dim", from_the_end=True)
        return _along(view, ids, at)
    shape = [max(size, indices.shape[o]) if o != at else indices.shape[at] for o, size in enumerate(view.shape)]
    ids = checked(view, indices, at, "take_along_dim", from_the_end=True)
    return gather(view, at, ids.expand(shape))


def _along(view, ids: torch.Tensor, at: int) -> torch.Tensor:
    return _found(view, {at: ids}, "gather")


def _as_slice(source) -> TableSlice:
    return source if isinstance(source, TableSlice) else _slice(source, _form_of(source))


def _detached(view, *args) -> TableSlice:
    with torch.no_grad():
        return _slice(view, view._form)


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
