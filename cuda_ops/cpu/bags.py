"""Bags: the sum, mean or maximum of some rows of a slab, with weights, as torch.nn.EmbeddingBag, and its backward.

Bag b is made of the lookups [offsets[b], offsets[b + 1]), the last up to the end. A lookup at position `skip` (padding)
is left out, as if it were not in its bag. A bag of none is zero.
"""

import numpy as np

from cuda_ops.cpu.checks import float_matrix, in_range, int_vector, plain_input, writable
from cuda_ops.cpu.kernels import fused_kernel, kernel

MODES = {"sum": 0, "mean": 1, "max": 2}
_MEAN, _MAX = MODES["mean"], MODES["max"]


def reduce_bags(slab, positions, offsets, mode="sum", weights=None, skip=-1, out=None):
    """Reduce each bag to a row: its sum (of rows times their weights), mean, or maximum.

    Sums are made in order of the lookups. Moves (n + B) * dim * itemsize + 8 * n bytes.

    Args:
        slab: [U, dim] float32 or float64.
        positions: [n] int64 in [0, U), or equal to `skip`.
        offsets: [B] int64, ascending from 0, at most n: where each bag begins.
        mode: "sum", "mean" (over the lookups that are not skipped) or "max".
        weights: [n], dtype of `slab`, factors of the rows; with "sum" only, as in PyTorch.
        skip: position that is left out (padding); -1 for none.
        out: [B, dim], dtype of `slab`, overwritten; allocated if not given.

    Returns:
        (out, chosen): for "max", `chosen` int64 [B, dim] says which lookup each element is of, the first of equals, and
        -1 where there is none; None for the others.

    Raises:
        IndexError: a position is outside the slab.
        TypeError, ValueError: a mode, dtype or shape does not fit.
    """
    slab = float_matrix(slab, "slab")
    number, positions, offsets, weights = check_bags(mode, positions, offsets, weights, slab.dtype)
    shape = (offsets.size, slab.shape[1])
    out = np.empty(shape, slab.dtype) if out is None else writable(out, "out", slab.dtype, shape)
    _in_slab(positions, len(slab), int(skip))
    if number == _MAX:
        chosen = np.empty(shape, np.int64)
        _maxima(slab, positions, offsets, int(skip), out, chosen)
        return out, chosen
    _sums(slab, positions, offsets, weights, number == _MEAN, int(skip), out)
    return out, None


def bags_backward(grad, positions, offsets, out, mode="sum", weights=None, skip=-1, chosen=None):
    """Write the gradient of the slab of `reduce_bags`: out[u] = sum over lookups of u of their part of `grad`.

    In order of the lookups. Moves (B + 2 * n) * dim * itemsize + 8 * n bytes or less.

    Args:
        grad: [B, dim] float32 or float64, the gradient of the reduced bags.
        positions, offsets, mode, weights, skip: as in `reduce_bags`.
        out: [U, dim], dtype of `grad`, overwritten.
        chosen: [B, dim] int64, what `reduce_bags` returned; needed for "max".

    Returns:
        `out`.

    Raises:
        IndexError: a position is outside `out`, or a chosen lookup is not one; nothing is written.
        TypeError, ValueError: a mode, dtype or shape does not fit.
    """
    grad = float_matrix(grad, "grad")
    number, positions, offsets, weights = check_bags(mode, positions, offsets, weights, grad.dtype)
    if len(grad) != offsets.size:
        raise ValueError(f"grad has {len(grad)} rows for {offsets.size} bags")
    writable(out, "out", grad.dtype, (len(out), grad.shape[1]))
    _in_slab(positions, len(out), int(skip))
    if number != _MAX:
        _backward(grad, positions, offsets, weights, number == _MEAN, int(skip), out)
        return out
    if chosen is None or chosen.shape != grad.shape or chosen.dtype != np.int64:
        got = None if chosen is None else f"{chosen.dtype} {chosen.shape}"
        raise ValueError(f"chosen must be int64 {grad.shape} for mode 'max', got {got}")
    chosen = plain_input(chosen)
    in_range(chosen.reshape(-1) + 1, positions.size + 1, "1 + chosen")
    _maxima_backward(grad, positions, chosen, int(skip), out)
    return out


def check_bags(mode, positions, offsets, weights, dtype):
    """Return (number of the mode, positions, offsets, weights) in plain form; no weights are an empty vector."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    positions, offsets = int_vector(positions, "positions"), int_vector(offsets, "offsets")
    if offsets.size and (offsets[0] != 0 or offsets[-1] > positions.size or (offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"offsets must ascend from 0 to at most {positions.size}, got {offsets}")
    if not offsets.size and positions.size:
        raise ValueError(f"{positions.size} positions are in none of 0 bags")
    if weights is None:
        return MODES[mode], positions, offsets, np.empty(0, dtype)
    if mode != "sum":
        raise ValueError(f"weights go with mode 'sum', not {mode!r}, as in torch.nn.EmbeddingBag")
    if weights.dtype != dtype or weights.shape != positions.shape:
        expected = f"{dtype} {positions.shape}"
        raise ValueError(f"weights must be {expected}, one for each position, got {weights.dtype} {weights.shape}")
    return MODES[mode], positions, offsets, plain_input(weights)


def _in_slab(positions, rows, skip):
    at = _first_outside(positions, rows, skip)
    if at >= 0:
        raise IndexError(f"positions[{at}] is {positions[at]}, neither in [0, {rows}) nor the skipped {skip}")


@kernel
def _first_outside(positions, rows, skip):
    """First of `positions` that is neither in [0, rows) nor `skip`; -1 if there is none."""
    outside = False
    for i in range(positions.size):
        outside |= (np.uint64(positions[i]) >= np.uint64(rows)) & (positions[i] != skip)
    if outside:
        for i in range(positions.size):
            if np.uint64(positions[i]) >= np.uint64(rows) and positions[i] != skip:
                return i
    return -1


@fused_kernel
def _sums(slab, positions, offsets, weights, mean, skip, out):
    bags, dim = out.shape
    rows, sums = slab.reshape(-1), out.reshape(-1)
    dtype = slab.dtype.type
    one = dtype(1)
    weighted = weights.size > 0
    if dim == 1:  # without loops over one word
        for bag in range(bags):
            word_sum, count = dtype(0), 0
            for i in range(offsets[bag], offsets[bag + 1] if bag + 1 < bags else positions.size):
                at = np.uint64(i)
                if positions[at] != skip:
                    count += 1
                    word = rows[np.uint64(positions[at])]
                    word_sum += weights[at] * word if weighted else word
            sums[np.uint64(bag)] = word_sum * (one / dtype(count)) if mean and count > 1 else word_sum
        return
    for bag in range(bags):
        end = offsets[bag + 1] if bag + 1 < bags else positions.size
        target = np.uint64(bag * dim)
        for j in range(dim):
            sums[target + np.uint64(j)] = 0
        count = 0
        i = offsets[bag]
        while i < end:
            at = np.uint64(i)
            if not weighted and i + 3 < end:
                p0, p1 = positions[at], positions[at + np.uint64(1)]
                p2, p3 = positions[at + np.uint64(2)], positions[at + np.uint64(3)]
                if (p0 != skip) & (p1 != skip) & (p2 != skip) & (p3 != skip):
                    # Added one after the other, as alone; but the sum goes through memory once.
                    r0, r1, r2, r3 = np.uint64(p0 * dim), np.uint64(p1 * dim), np.uint64(p2 * dim), np.uint64(p3 * dim)
                    for j in range(dim):
                        u = np.uint64(j)
                        total = ((sums[target + u] + rows[r0 + u]) + rows[r1 + u]) + rows[r2 + u]
                        sums[target + u] = total + rows[r3 + u]
                    count += 4
                    i += 4
                    continue
            i += 1
            if positions[at] == skip:
                continue
            count += 1
            source = np.uint64(positions[at] * dim)
            if weighted:
                weight = weights[at]
                for j in range(dim):
                    sums[target + np.uint64(j)] += weight * rows[source + np.uint64(j)]
            else:
                for j in range(dim):
                    sums[target + np.uint64(j)] += rows[source + np.uint64(j)]
        if mean and count > 1:
            share = one / dtype(count)
            for j in range(dim):
                sums[target + np.uint64(j)] *= share


@fused_kernel
def _maxima(slab, positions, offsets, skip, out, chosen):
    bags, dim = out.shape
    for bag in range(bags):
        chosen[bag] = -1
        out[bag] = 0
        first = True
        for i in range(offsets[bag], offsets[bag + 1] if bag + 1 < bags else positions.size):
            if positions[i] == skip:
                continue
            for j in range(dim):
                value = slab[positions[i], j]
                if first or value > out[bag, j]:
                    out[bag, j] = value
                    chosen[bag, j] = i
            first = False


@fused_kernel
def _backward(grad, positions, offsets, weights, mean, skip, out):
    bags, dim = grad.shape
    rows, sums = grad.reshape(-1), out.reshape(-1)
    one = grad.dtype.type(1)
    sums[:] = 0
    for bag in range(bags):
        begin, end = offsets[bag], offsets[bag + 1] if bag + 1 < bags else positions.size
        share = one
        if mean:
            count = 0
            for i in range(begin, end):
                count += positions[i] != skip
            share = one / grad.dtype.type(max(count, 1))
        source = np.uint64(bag * dim)
        for i in range(begin, end):
            if positions[i] == skip:
                continue
            factor = weights[i] if weights.size else share
            if dim == 1:  # without a loop over one word
                sums[np.uint64(positions[i])] += factor * rows[source]
                continue
            target = np.uint64(positions[i] * dim)
            for j in range(dim):
                sums[target + np.uint64(j)] += factor * rows[source + np.uint64(j)]


@fused_kernel
def _maxima_backward(grad, positions, chosen, skip, out):
    out[:] = 0
    for bag in range(len(grad)):
        for j in range(grad.shape[1]):
            i = chosen[bag, j]
            if i >= 0 and positions[i] != skip:
                out[positions[i], j] += grad[bag, j]
