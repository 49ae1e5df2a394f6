"""Copies between records and slabs. See cuda_ops/cpu/rows.py for how records lie in memory."""

from __future__ import annotations

import torch

from cuda_ops.cuda.checks import as_bits, float_matrix, in_range, int_vector, record_count, word_range, writable
from cuda_ops.cuda.copies import copy_rows


def gather(words, stride, slots, out=None, positions=None, offset=0, width=None):
    """Copy words of records to rows of a slab; as cuda_ops.cpu.rows.gather, but `positions` must be distinct.

    A part of a warp per row, 16 bytes at a time where `stride`, `offset` and the width are multiples of that. Moves 2 *
    len(slots) * width * itemsize bytes, and 8 for each slot and position.

    Args, Returns, Raises: as on the CPU, for tensors of one CUDA device.
    """
    count = record_count(words, stride, copied=True)
    slots = int_vector(slots, "slots")
    if out is None:
        if width is None or positions is not None:
            raise ValueError("gather allocates its output only when given width and no positions; pass out")
        out = torch.empty(slots.numel(), width, dtype=words.dtype, device=words.device)
    positions = _check_slab(words, stride, slots, out, "out", positions, offset)
    in_range(slots, count, "slots")
    width = out.shape[1]
    copy_rows(as_bits(out), as_bits(words), slots.numel(), width, (positions, width, 0), (slots, stride, offset), slots)
    return out


def scatter(words, stride, slots, rows, positions=None, offset=0, distinct=False):
    """Copy rows of a slab to words of records; as cuda_ops.cpu.rows.scatter.

    Bytes and accesses are those of `gather`. Rows are written in no order: unless `distinct` says that no slot is
    repeated, slots are sorted first (torch.sort, stable) to find the last of each.
    """
    count = record_count(words, stride, copied=True)
    slots = int_vector(slots, "slots")
    rows = float_matrix(rows, "rows", words.dtype)
    positions = _check_slab(words, stride, slots, rows, "rows", positions, offset)
    in_range(slots, count, "slots")
    if not distinct and slots.numel() > 1:
        slots, positions = _last_of_each(slots, positions)
    width = rows.shape[1]
    copy_rows(
        as_bits(words), as_bits(rows), slots.numel(), width, (slots, stride, offset), (positions, width, 0), slots
    )


def _last_of_each(slots, positions):
    """Return the distinct slots, and for each the position of its last occurrence."""
    ordered, order = torch.sort(slots, stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    order = order[last]
    return ordered[last], order if positions is None else positions[order]


def _check_slab(words, stride, slots, slab, name, positions, offset):
    writable(slab, name, words.dtype, (len(slab), slab.shape[-1]))
    word_range(stride, offset, slab.shape[1])
    if positions is None:
        if len(slab) != slots.numel():
            raise ValueError(
                f"{name} has {len(slab)} rows for {slots.numel()} slots; pass positions to use some of them"
            )
        return None
    positions = int_vector(positions, "positions")
    if positions.numel() != slots.numel():
        raise ValueError(f"{positions.numel()} positions given for {slots.numel()} slots")
    in_range(positions, len(slab), "positions")
    return positions
