"""Between unique rows and their uses: expand a slab to lookups, sum gradients of lookups per unique row."""

import numpy as np

from cuda_ops.cpu.checks import float_matrix, in_range, int_vector, writable
from cuda_ops.cpu.kernels import kernel


def expand(slab, inverse, out=None):
    """Repeat rows of a slab: out[i] = slab[inverse[i]].

    Moves 2 * n * dim * itemsize bytes.

    Args:
        slab: [U, dim] float32 or float64.
        inverse: [n] int64 in [0, U).
        out: [n, dim], dtype of `slab`; allocated if not given.

    Returns:
        `out`.

    Raises:
        IndexError: an entry of `inverse` is outside the slab.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    slab = float_matrix(slab, "slab")
    inverse = int_vector(inverse, "inverse")
    shape = (inverse.size, slab.shape[1])
    out = np.empty(shape, slab.dtype) if out is None else writable(out, "out", slab.dtype, shape)
    in_range(inverse, len(slab), "inverse")
    _expand(slab, inverse, out)
    return out


def segment_sum(grad, inverse, out, skip=-1):
    """Sum rows per segment, in order of n: out[u] = sum of grad[i] where inverse[i] == u, or zero.

    Moves (n + 2 * U) * dim * itemsize bytes or less. The order makes the result repeatable bit by bit.

    Args:
        grad: [n, dim] float32 or float64.
        inverse: [n] int64 in [0, U), or equal to `skip`.
        out: [U, dim], dtype of `grad`, overwritten.
        skip: rows of `grad` whose `inverse` is this are left out (padding); may also be a position in [0, U).

    Returns:
        `out`.

    Raises:
        IndexError: an entry of `inverse` is neither in [0, U) nor `skip`; `out` then holds no result.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    grad = float_matrix(grad, "grad")
    inverse = int_vector(inverse, "inverse")
    if len(grad) != inverse.size:
        raise ValueError(f"grad has {len(grad)} rows for {inverse.size} entries of inverse")
    writable(out, "out", grad.dtype, (len(out), grad.shape[1]))
    _raise_outside(_segment_sum(grad, inverse, out, skip), inverse, len(out), skip)
    return out


def segment_count(inverse, segments, skip=-1):
    """Count entries per segment: int64 [segments], with `inverse` and `skip` as in segment_sum.

    Raises:
        IndexError: an entry of `inverse` is neither in [0, segments) nor `skip`.
    """
    inverse = int_vector(inverse, "inverse")
    counts = np.zeros(segments, np.int64)
    _raise_outside(_segment_count(inverse, counts, skip), inverse, segments, skip)
    return counts


def _raise_outside(position, inverse, bound, skip):
    if position >= 0:
        raise IndexError(f"inverse[{position}] is {inverse[position]}, neither in [0, {bound}) nor the skipped {skip}")


# Indices are unsigned, and no slices are made of rows, as in rows.py.


@kernel
def _expand(slab, inverse, out):
    dim = slab.shape[1]
    rows, flat = slab.reshape(-1), out.reshape(-1)
    if dim == 1:  # without a loop over one word
        for i in range(inverse.size):
            flat[np.uint64(i)] = rows[np.uint64(inverse[i])]
        return
    for i in range(inverse.size):
        source = np.uint64(inverse[i] * dim)
        target = np.uint64(i * dim)
        for j in range(dim):
            flat[target + np.uint64(j)] = rows[source + np.uint64(j)]


@kernel
def _segment_sum(grad, inverse, out, skip):
    segments, dim = out.shape
    rows, sums = grad.reshape(-1), out.reshape(-1)
    # A row could instead be written, not added, where its segment is seen first; the mispredicted branches
    # cost more than zeroing first (0.18 against 0.10 ms for 26,624 rows of 16 floats; equal at 128).
    sums[:] = 0
    if dim == 1:  # without a loop over one word: 0.5 ns a row in place of 1.0
        for i in range(inverse.size):
            segment = inverse[np.uint64(i)]
            if segment == skip:
                continue
            if np.uint64(segment) >= np.uint64(segments):
                return i
            sums[np.uint64(segment)] += rows[np.uint64(i)]
        return -1
    for i in range(inverse.size):
        segment = inverse[np.uint64(i)]
        if segment == skip:
            continue
        if np.uint64(segment) >= np.uint64(segments):
            return i
        source = np.uint64(i * dim)
        target = np.uint64(segment * dim)
        for j in range(dim):
            sums[target + np.uint64(j)] += rows[source + np.uint64(j)]
    return -1


@kernel
def _segment_count(inverse, counts, skip):
    for i in range(inverse.size):
        segment = inverse[i]
        if segment == skip:
            continue
        if segment < 0 or segment >= counts.size:
            return i
        counts[segment] += 1
    return -1
