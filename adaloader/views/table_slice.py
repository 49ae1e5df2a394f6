"""A view of a managed table: what PyTorch would give, as sizes and strides, and the rows that it reaches.

Making one reads nothing, but that one of few rows is looked up at once, as `weight[3]` is.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from adaloader.errors import WholeTableError
from adaloader.lookups.slabs import expand
from adaloader.optimizers.gradient_layout import check_layout
from adaloader.overrides.compiler import not_compiled
from adaloader.overrides.constant import constant_tensor
from adaloader.overrides.native import operation_name
from adaloader.views.rows_view import guarded
from adaloader.views.view_layout import Layout, layout_of
from adaloader.views.view_positions import columns_of, offsets_of, order_of_results, rows_and_columns, with_open_rows
from adaloader.views.view_values import values_of

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable

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
        from adaloader.views import table_views  # which builds on this file

        return table_views.operate(func, args, kwargs or {})

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


def view_by(func, source, *args, **kwargs):
    """Return what the view operation `func` gives of a table or of a view of it: a view, or several."""
    with unseen():
        form = form_of(source)
        made = func(form, *args, **kwargs)
        parts = made if isinstance(made, (tuple, list)) else (made,)
        if any(part.untyped_storage()._cdata != form.untyped_storage()._cdata for part in parts):
            raise refusal(f"{operation_name(func)} (which copies here)", source._managed)
    if len(parts) > _FEW_ROWS or 1 < len(parts) == source._managed.table.spec.rows:
        raise refusal(operation_name(func), source._managed)
    views = [view_or_rows(source, part) for part in parts]
    return type(made)(views) if isinstance(made, (tuple, list)) else views[0]


def view_or_rows(source, form: torch.Tensor):
    """Return the view of a table (or of a view of it) that has this form; the rows themselves where these are few."""
    layout = layout_of(form, source._managed.table.spec.dim)
    view = slice_of(source, form)
    if layout.num_rows <= min(_FEW_ROWS, source._managed.table.spec.rows // 2) or form.numel() == 0:
        return guarded(_rows_of(view, "indexing"), source._managed.name)
    return view


def slice_of(source, form: torch.Tensor) -> TableSlice:
    """Return the view of a table (or of a view of it) that has this form, with a gradient where `source` has one."""
    device = source._managed.parameter.device
    stand_in = constant_tensor(form.shape, float("nan"), dtype=form.dtype, device=device)
    trains = source.requires_grad and torch.is_grad_enabled()
    view = torch.Tensor._make_subclass(TableSlice, stand_in, trains)
    view._managed, view._form = source._managed, form
    return view


def form_of(source) -> torch.Tensor:
    """Return the form of a table or of a view of it: without values, on the meta device."""
    if isinstance(source, TableSlice):
        return source._form
    return torch.empty(tuple(source.shape), dtype=source.dtype, device="meta")


@contextlib.contextmanager
def unseen():
    """Operations on forms are not the user's: no mode sees them."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


def rows_or_refusal(view, operation: str) -> torch.Tensor:
    """Return the values of a view of few rows; an error that names the operation where it has many."""
    table = view._managed
    if table.is_dense:
        return values_of(view)
    if layout_of_view(view).num_rows >= max(1, table.table.spec.rows // 2):
        raise refusal(operation, table)
    return _rows_of(view, operation)


def _rows_of(view: TableSlice, operation: str) -> torch.Tensor:
    layout = layout_of_view(view)
    if layout.crosses_rows:
        raise refusal(operation, view._managed)
    return look_up_at(view, {}, operation)


def layout_of_view(view) -> Layout:
    """Return which rows and columns of its table a view reaches."""
    return layout_of(view._form, view._managed.table.spec.dim)


def look_up_at(view, indices: dict[int, torch.Tensor], operation: str) -> torch.Tensor:
    """Return the elements of `view` at `indices`: by dimension, ids that are in range, all of one shape `B`.

    As in PyTorch, `B` takes the place of the indexed dimensions where these are neighbours, else it comes first; the
    other dimensions follow in their order.
    """
    layout, table = layout_of_view(view), view._managed
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
