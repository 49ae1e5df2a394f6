"""Copies between records and slabs.

A record store is one contiguous region. Kernels get it as `words`, a vector of the value dtype, with `stride`
words a record: record i begins at word i * stride and holds `dim` words of value, then optimizer state, and
in its last 8 bytes the step that last touched it. `offset` and the width of the slab choose which words of a
record are meant: 0 and dim for the value. A plain matrix of `stride` columns, flattened, will also do.
"""

import numpy as np

from cuda_ops.cpu.checks import as_bits, float_matrix, in_range, int_vector, record_count, word_range, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, kernel, touch


def gather(words, stride, slots, out=None, positions=None, offset=0, width=None):
    """Copy words of records to rows of a slab.

    out[positions[i]] = words [offset, offset + width) of record slots[i]. Moves 2 * len(slots) * width *
    itemsize bytes.

    Args:
        words: [any] float32, float64, float16 or bfloat16, the record store.
        stride: words per record.
        slots: [n] int64, records to read; need not be distinct.
        out: [rows, width], dtype of `words`; allocated as [n, width] if not given, which needs `width`.
        positions: [n] int64, the row of `out` for each slot; None for 0 .. n-1. Other rows of `out` stay as
            they are.
        offset: first word of the record to copy.
        width: words to copy, if `out` is not given.

    Returns:
        `out`.

    Raises:
        IndexError: a slot is outside the store, or a position outside `out`.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    count = record_count(words, stride, copied=True)
    slots = int_vector(slots, "slots")
    if out is None:
        if width is None or positions is not None:
            raise ValueError("gather allocates its output only when given width and no positions; pass out")
        out = np.empty((slots.size, width), words.dtype)
    positions = _check_slab(words, stride, slots, out, "out", positions, offset)
    in_range(slots, count, "slots")
    _gather(as_bits(words), stride, slots, as_bits(out), positions, offset)
    return out


def scatter(words, stride, slots, rows, positions=None, offset=0, distinct=False):
    """Copy rows of a slab to words of records.

    Words [offset, offset + width) of record slots[i] = rows[positions[i]]. Moves 2 * len(slots) * width *
    itemsize bytes.

    Args:
        words: [any] float32, float64, float16 or bfloat16, the record store, written in place.
        stride: words per record.
        slots: [n] int64, records to write; where one is repeated the last wins.
        rows: [rows, width], dtype of `words`.
        positions: [n] int64, the row for each slot; None for 0 .. n-1.
        offset: first word of the record to write.
        distinct: whether no slot is repeated, which spares a body that writes rows side by side a sort.

    Raises:
        IndexError: a slot is outside the store, or a position outside `rows`.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    count = record_count(words, stride, copied=True)
    slots = int_vector(slots, "slots")
    rows = float_matrix(rows, "rows", words.dtype)
    positions = _check_slab(words, stride, slots, rows, "rows", positions, offset)
    in_range(slots, count, "slots")
    _scatter(as_bits(words), stride, slots, as_bits(rows), positions, offset)


def _check_slab(words, stride, slots, slab, name, positions, offset):
    writable(slab, name, words.dtype, (len(slab), slab.shape[-1]))
    word_range(stride, offset, slab.shape[1])
    if positions is None:
        if len(slab) != slots.size:
            raise ValueError(f"{name} has {len(slab)} rows for {slots.size} slots; pass positions to use some of them")
        return None
    positions = int_vector(positions, "positions")
    if positions.size != slots.size:
        raise ValueError(f"{positions.size} positions given for {slots.size} slots")
    in_range(positions, len(slab), "positions")
    return positions


# Indices are unsigned, and no slices are made of rows: what Numba adds to either for negative numbers costs as much as
# a short row.


@kernel
def _gather(words, stride, slots, out, positions, offset):
    count = slots.size
    width = out.shape[1]
    flat = out.reshape(-1)
    for i in range(count):
        if i + ROWS_AHEAD < count:
            touch(words, slots[i + ROWS_AHEAD] * stride + offset, width)
        source = np.uint64(slots[i] * stride + offset)
        target = np.uint64((i if positions is None else positions[i]) * width)
        for j in range(width):
            flat[target + np.uint64(j)] = words[source + np.uint64(j)]


@kernel
def _scatter(words, stride, slots, rows, positions, offset):
    count = slots.size
    width = rows.shape[1]
    flat = rows.reshape(-1)
    for i in range(count):
        if i + ROWS_AHEAD < count:
            touch(words, slots[i + ROWS_AHEAD] * stride + offset, width)
        target = np.uint64(slots[i] * stride + offset)
        source = np.uint64((i if positions is None else positions[i]) * width)
        for j in range(width):
            words[target + np.uint64(j)] = flat[source + np.uint64(j)]
