"""The lookups that a managed table can serve: each remaps its ids to a slab and issues the operation there."""

from __future__ import annotations

import operator

import numpy as np
import torch

from adaloader.errors import ManagedTableError, WholeTableError
from adaloader.lookups import bags
from adaloader.lookups.slabs import expand
from adaloader.optimizers.gradient_layout import check_layout
from adaloader.views.rows_view import guarded

_ID_DTYPES = (torch.int64, torch.int32)
_FEW_ROWS = 64  # a slice of no more rows is looked up at once
_MORE_THAN_NUMBERS = (torch.Tensor, np.ndarray, slice, list, tuple, range, str)


def embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """`torch.nn.functional.embedding` of a managed table; `sparse` matters only to what its optimizer may be."""
    if isinstance(input, torch.Tensor) and input.layout is torch.jagged:
        rows = embedding(input.values(), weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return torch.nested.nested_tensor_from_jagged(rows, input.offsets(), input.lengths())
    table, ids = _table_and_ids(weight, input, "embedding")
    _check_layout(weight, sparse, "embedding")
    slab, positions = table.look_up(ids, "embedding", by_frequency=scale_grad_by_freq and _trains(weight))
    if max_norm is not None:
        table.renormed(slab, positions, float(max_norm), float(norm_type))
    elif table.matched is not None and weight is table.parameter and _trains(weight) and not scale_grad_by_freq:
        table.usages[table.matched] = (padding_idx, sparse, ids.shape[1:])
    padding = -1
    if padding_idx is not None:
        padding = _position_of(slab, _padding_row(table, padding_idx))
    with table.owner.paused():
        return _as_seen_from(weight, expand(slab, positions, ids.shape, padding))


def aten_embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    """`torch.embedding`, where -1 means no padding row."""
    padding_idx = None if padding_idx < 0 else padding_idx
    return embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


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
    """`torch.nn.functional.embedding_bag` of a managed table, all modes, with offsets or a matrix of ids."""
    table, ids = _table_and_ids(weight, input, "embedding_bag")
    _check_layout(weight, sparse, "embedding_bag")
    if scale_grad_by_freq and mode == "max":
        raise ValueError("embedding_bag: mode='max' does not support scale_grad_by_freq=True")
    ragged = offsets.numel() - include_last_offset if isinstance(offsets, torch.Tensor) else None
    by_frequency = scale_grad_by_freq and _trains(weight)
    slab, positions = table.look_up(ids, "embedding_bag", by_frequency=by_frequency, bags=ragged)
    if max_norm is not None:
        table.renormed(slab, positions, float(max_norm), float(norm_type))
    padding = None
    if padding_idx is not None:
        at = _position_of(slab, _padding_row(table, padding_idx))
        padding = None if at < 0 else at
    with table.owner.paused():
        rows = slab.tensor if len(slab.rows) else _one_row(slab.tensor)
        pooled = bags.embedding_bag(
            slab,
            rows,
            table.here(positions).view(ids.shape),
            offsets.long() if isinstance(offsets, torch.Tensor) and offsets.dtype in _ID_DTYPES else offsets,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=padding,
        )
        if slab.reached is not None and pooled.requires_grad:
            pooled.register_hook(lambda gradient: slab.mark_reached(positions, -1 if padding is None else padding))
        return _as_seen_from(weight, pooled)


def index_select(input, dim, index):
    """`index_select` of rows (dim 0) of a managed table."""
    if not isinstance(dim, int) or dim not in (0, -2):
        raise WholeTableError(
            f"index_select of table {input._managed.name!r} along dimension {dim} would read every row of it; only "
            "rows (dimension 0) can be looked up"
        )
    table, ids = _table_and_ids(input, index, "index_select")
    if ids.ndim > 1:
        raise IndexError(f"index_select: the index must have one dimension, got {ids.ndim}")
    _check_layout(input, False, "index_select")
    slab, positions = table.look_up(ids, "index_select")
    with table.owner.paused():
        return _as_seen_from(input, expand(slab, positions, torch.Size((ids.numel(),))))


def get_item(weight, index):
    """`table[ids]`: an integer, a list, array or tensor of them (negative ones count from the end), a short
    slice."""
    table = weight._managed
    parts = index if isinstance(index, tuple) else tuple(index) if _is_tuple_to_pytorch(index) else (index,)
    if not parts:
        raise _whole_table(table, index)
    first, rest = parts[0], parts[1:]
    if _is_large_view(table, first):
        from adaloader.views import table_views  # which builds on this file

        return table_views.get_item(weight, parts)
    _check_layout(weight, False, "indexing")
    ids = _from_the_front(table, _ids_of_index(table, first))
    slab, positions = table.look_up(ids, "indexing")
    basic = ids.ndim == 0 or isinstance(first, slice)
    advanced = any(_is_advanced(part) for part in rest)
    with table.owner.paused():
        if advanced and not basic:
            at = table.here(positions).view(ids.shape)
            return _as_seen_from(weight, slab.tensor[(at, *rest)])
        rows = _as_seen_from(weight, expand(slab, positions, ids.shape))
        if rest:
            rows = rows[(slice(None),) * ids.ndim + rest]
        return guarded(rows, table.name, (weight, tuple(parts))) if basic and not advanced else rows


def _is_large_view(table, first) -> bool:
    """Whether the first part of an index leaves more rows than one would look up because of it alone."""
    if first is None or first is Ellipsis:
        return True
    if not isinstance(first, slice) or (first.step or 1) < 0:
        return False
    rows = range(*first.indices(table.table.spec.rows))
    return len(rows) > min(_FEW_ROWS, table.table.spec.rows // 2 - 1)


def ids_of_assignment(table, index) -> tuple[torch.Tensor, tuple] | None:
    """Return the ids that `table[index] = ...` writes, and the rest of the index; None where it writes all rows."""
    parts = index if isinstance(index, tuple) else tuple(index) if _is_tuple_to_pytorch(index) else (index,)
    if not parts or parts[0] is None or parts[0] is Ellipsis or isinstance(parts[0], bool):
        return None
    first, num_rows = parts[0], table.table.spec.rows
    if isinstance(first, (list, np.ndarray)):
        first = torch.as_tensor(first)
    if isinstance(first, torch.Tensor) and first.dtype in (torch.bool, torch.uint8):
        return (first.nonzero().squeeze(1), parts[1:]) if first.ndim == 1 and len(first) == num_rows else None
    if isinstance(first, slice):
        rows = range(*first.indices(num_rows))
        return (
            None if len(rows) == num_rows else (torch.arange(rows.start, rows.stop, rows.step, device="cpu"), parts[1:])
        )
    return _from_the_front(table, _ids_of_index(table, first)), parts[1:]


def _is_tuple_to_pytorch(index) -> bool:
    """Whether PyTorch takes a sequence for a tuple of indices: a short one that holds more than numbers."""
    if not isinstance(index, (list, range)) or len(index) >= 32:
        return False
    return any(part is None or part is Ellipsis or isinstance(part, _MORE_THAN_NUMBERS) for part in index)


def _is_advanced(part) -> bool:
    """Whether PyTorch pairs this part of an index with the ids, instead of applying it to each row."""
    return isinstance(part, (torch.Tensor, np.ndarray, list, range, tuple, bool))


def _from_the_front(table, ids: torch.Tensor) -> torch.Tensor:
    """Return ids with negative ones counted from the end of the table."""
    num_rows = table.table.spec.rows
    if ids.dtype not in _ID_DTYPES or not ids.numel():
        return ids
    with table.owner.paused():
        low = int(ids.min())
    if low >= 0 and table.owner.watch.recorder is None:  # a watched step is for later batches too, that may have some
        return ids
    counted = torch.where(ids < 0, ids + num_rows, ids)
    if low < -num_rows:
        raise IndexError(
            f"id {low} is out of range for table {table.name!r} with {num_rows} rows "
            f"(valid ids: {-num_rows} to {num_rows - 1})"
        )
    return counted


def _ids_of_index(table, index) -> torch.Tensor:
    """Return the ids that the first part of an index stands for; an error if it stands for no rows in particular."""
    if isinstance(index, (list, range, np.ndarray)):
        index = torch.as_tensor(index if len(index) else np.empty(np.shape(index), np.int64))
    if isinstance(index, torch.Tensor) and not hasattr(index, "_managed"):
        if index.dtype in (torch.bool, torch.uint8):
            if index.shape != table.parameter.shape[: index.ndim]:
                raise IndexError(
                    f"a mask of shape {list(index.shape)} does not fit table {table.name!r} "
                    f"{list(table.parameter.shape)}"
                )
            if index.ndim != 1:
                raise _whole_table(table, index)
            return index.nonzero().squeeze(1)
        return index
    if isinstance(index, slice) and index != slice(None):
        num_rows = table.table.spec.rows
        rows = range(*index.indices(num_rows))
        if rows.step < 0:
            raise ValueError(f"table {table.name!r}[{index!r}]: the step of a slice must be positive")
        if len(rows) < num_rows // 2:
            return torch.arange(rows.start, rows.stop, rows.step, device="cpu")
    if hasattr(index, "__index__") and not isinstance(index, (bool, torch.Tensor)):
        return torch.tensor(operator.index(index), device="cpu")
    if index is None or index is Ellipsis or isinstance(index, (bool, slice)):
        raise _whole_table(table, index)
    shown = f"table {index._managed.name!r}" if hasattr(index, "_managed") else repr(index)
    raise TypeError(f"table {table.name!r} cannot be indexed with {shown}: ids are integers, or tensors of integers")


def _whole_table(table, index) -> WholeTableError:
    return WholeTableError(
        f"table {table.name!r}[{index!r}] would read the whole table, whose rows AdaLoader manages; index it with "
        f"integer ids, or keep it dense: AdaLoader(..., min_rows={table.table.spec.rows + 1})"
    )


def _table_and_ids(weight, ids, operation):
    if hasattr(ids, "_managed"):
        raise ManagedTableError(f"{operation}: table {ids._managed.name!r} was given where ids belong")
    if not isinstance(ids, torch.Tensor):
        raise TypeError(
            f"{operation} of table {weight._managed.name!r} needs a tensor of ids, got {type(ids).__name__}"
        )
    return weight._managed, ids


def _check_layout(weight, sparse: bool, operation: str) -> None:
    if _trains(weight):
        check_layout(weight._managed.table.spec.rule, sparse, weight._managed.name, operation)


def _trains(weight) -> bool:
    return weight.requires_grad and torch.is_grad_enabled()


def _as_seen_from(weight, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a detached view carry no gradient, though the slab that they come from does."""
    return rows if weight.requires_grad else rows.detach()


def _padding_row(table, padding_idx: int) -> int:
    num_rows = table.table.spec.rows
    row = padding_idx + num_rows if padding_idx < 0 else padding_idx
    if not 0 <= row < num_rows:
        raise ValueError(f"padding_idx {padding_idx} is out of range for table {table.name!r} with {num_rows} rows")
    return row


def _position_of(slab, row: int) -> int:
    """Return where `row` is in the slab, -1 if it was not looked up."""
    at = np.flatnonzero(slab.rows == row)
    return int(at[0]) if len(at) else -1


def _one_row(empty: torch.Tensor) -> torch.Tensor:
    """A slab of one zero row for an operation that refuses a table without rows, though no id points to it."""
    return torch.cat([empty, empty.new_zeros(1, empty.shape[1])])
