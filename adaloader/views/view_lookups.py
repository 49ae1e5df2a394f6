"""The lookups of a view of a managed table: by ids in any of its dimensions, as PyTorch has them."""

from __future__ import annotations

import torch

from adaloader.lookups import operations
from adaloader.views.table_slice import (
    TableSlice,
    form_of,
    layout_of_view,
    look_up_at,
    refusal,
    slice_of,
    unseen,
    view_by,
    view_or_rows,
)
from adaloader.views.view_positions import sum_of, times


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
    form = form_of(source)
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
    with unseen():
        narrowed = form[tuple(basic)]
    if not advanced:
        return view_or_rows(source, narrowed)
    view = slice_of(source, narrowed)
    ids = [checked(view, given, at, "indexing", from_the_end=True) for at, given in advanced.items()]
    return _found(view, dict(zip(advanced, torch.broadcast_tensors(*ids), strict=True)), "indexing")


def _is_ids(part) -> bool:
    if isinstance(part, torch.Tensor) and part.ndim == 0 and part.dtype == torch.bool or isinstance(part, bool):
        raise IndexError("a managed table cannot be indexed with a single truth value")
    return part is not None and part is not Ellipsis and not isinstance(part, slice) and not _is_int(part)


def _is_int(part) -> bool:
    return hasattr(part, "__index__") and not isinstance(part, torch.Tensor)


def _found(view, indices: dict[int, torch.Tensor], operation: str) -> torch.Tensor:
    layout = layout_of_view(view)
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
    layout = layout_of_view(weight)
    if layout.is_whole_rows:
        step, start = layout.strides[0] // layout.dim, layout.offset // layout.dim
        return operations.embedding(
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
    layout = layout_of_view(weight)
    options = {
        "offsets": offsets,
        "mode": mode,
        "per_sample_weights": per_sample_weights,
        "include_last_offset": include_last_offset,
    }
    if layout.is_whole_rows:
        step, start = layout.strides[0] // layout.dim, layout.offset // layout.dim
        return operations.embedding_bag(
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
    if at not in layout_of_view(view).row_dims or index.ndim != view.ndim:
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
    if at in layout_of_view(view).row_dims and all(indices.shape[o] == 1 for o in others):
        ids = checked(view, indices.reshape(-1), at, "take_along_dim", from_the_end=True)
        return _along(view, ids, at)
    shape = [max(size, indices.shape[o]) if o != at else indices.shape[at] for o, size in enumerate(view.shape)]
    ids = checked(view, indices, at, "take_along_dim", from_the_end=True)
    return gather(view, at, ids.expand(shape))


def _along(view, ids: torch.Tensor, at: int) -> torch.Tensor:
    return _found(view, {at: ids}, "gather")


def _as_slice(source) -> TableSlice:
    return source if isinstance(source, TableSlice) else slice_of(source, form_of(source))
