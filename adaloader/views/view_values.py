"""The values behind a view of a managed table, for whoever needs all of them."""

from __future__ import annotations

import torch

from adaloader.gradients.whole_gradient import read_whole
from adaloader.views.rows_view import guarded


def is_view(value) -> bool:
    """Whether a value is a view of a table."""
    return isinstance(value, torch.Tensor) and hasattr(value, "_form")


def values_of(view, with_gradient: bool = False) -> torch.Tensor:
    """Return a view's present values: of the dense parameter where its table is one again, else not to be written, or
    with a gradient that goes to the table's rows, if so asked and the view has one."""
    table = view._managed
    if table.is_dense:
        return as_viewed(view, table.parameter if view.requires_grad else table.parameter.detach())
    if with_gradient and view.requires_grad:
        return as_viewed(view, read_whole(table))
    with table.owner.paused():
        return guarded(as_viewed(view, table.whole_values()), table.name)


def as_viewed(view, whole: torch.Tensor) -> torch.Tensor:
    """Return what of all values `whole` `[num_rows, dim]` the view shows; it shares their memory."""
    form = view._form
    if not form.is_complex():
        return whole.as_strided(form.shape, form.stride(), form.storage_offset())
    strides = (*(2 * stride for stride in form.stride()), 1)
    return torch.view_as_complex(whole.as_strided((*form.shape, 2), strides, 2 * form.storage_offset()))
