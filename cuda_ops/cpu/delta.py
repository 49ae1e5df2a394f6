"""Additive differences: what changed since a copy was taken, and adding such a change to records."""

import numpy as np

from cuda_ops.cpu.checks import float_matrix, in_range, int_vector, record_count, word_range, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, kernel, touch


def delta(values, base, out=None):
    """Return values - base, row by row.

    Args:
        values: [U, dim] float32 or float64.
        base: [U, dim], dtype of `values`.
        out: [U, dim], dtype of `values`; may be `values` or `base`; allocated if not given.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit.
    """
    values = float_matrix(values, "values")
    base = float_matrix(base, "base", values.dtype)
    if base.shape != values.shape:
        raise ValueError(f"base must have shape {values.shape}, got {base.shape}")
    if out is None:
        return np.subtract(values, base)
    return np.subtract(values, base, out=writable(out, "out", values.dtype, values.shape))


def merge(words, stride, slots, delta, offset=0, distinct=False):
    """Add rows to records: record slots[i], words [offset, offset + dim) += delta[i].

    Args:
        words: [any] float32 or float64, the record store (see rows.py), updated in place.
        stride: words per record.
        slots: [n] int64; where one is repeated, rows are added in order.
        delta: [n, dim], dtype of `words`.
        offset: first word of the record to add to.
        distinct: whether no slot is repeated, which spares a body that adds rows side by side a sort.

    Raises:
        IndexError: a slot is outside the store.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    count = record_count(words, stride)
    slots = int_vector(slots, "slots")
    delta = float_matrix(delta, "delta", words.dtype)
    if len(delta) != slots.size:
        raise ValueError(f"delta has {len(delta)} rows for {slots.size} slots")
    word_range(stride, offset, delta.shape[1])
    in_range(slots, count, "slots")
    _merge(words, stride, slots, delta, offset)


@kernel
def _merge(words, stride, slots, delta, offset):
    count, width = delta.shape
    flat = delta.reshape(-1)
    for i in range(count):
        if i + ROWS_AHEAD < count:
            touch(words, slots[i + ROWS_AHEAD] * stride + offset, width)
        target = np.uint64(slots[i] * stride + offset)
        row = np.uint64(i * width)
        for j in range(width):
            words[target + np.uint64(j)] += flat[row + np.uint64(j)]
