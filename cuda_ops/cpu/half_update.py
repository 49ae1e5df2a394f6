"""Values in half precision with state in float32: rounding of rows, and optimizer steps on such records.

A record of half values is laid out in float32 words as any other (rows.py), except that its `dim` values are float16 or
bfloat16 and fill the first (dim + 1) // 2 words; the state begins after those. `halves` is a view of the whole store in
the dtype of the values: the value of record i begins at element 2 * i * stride.
"""

import numpy as np

from cuda_ops.cpu.checks import (
    BFLOAT16,
    HALF_DTYPES,
    float_matrix,
    in_range,
    int_vector,
    plain_input,
    record_count,
    word_range,
    writable,
)
from cuda_ops.cpu.half_rows import update_of
from cuda_ops.cpu.half_steps import ADAGRAD, ROWWISE_ADAGRAD, SGD, SPARSE_ADAM
from cuda_ops.cpu.halves import at_random, to_nearest, widen
from cuda_ops.cpu.kernels import kernel, part
from cuda_ops.cpu.philox import fill_words, room_for


def widen_rows(rows, out=None):
    """Convert rows in half precision to float32, exactly.

    Args:
        rows: [n, dim] float16 or bfloat16 (of NumPy arrays: checks.BFLOAT16).
        out: [n, dim] float32, allocated if not given.

    Returns:
        `out`. Moves 6 * n * dim bytes.
    """
    rows = _half_matrix(rows, "rows")
    out = np.empty(rows.shape, np.float32) if out is None else writable(out, "out", np.float32, rows.shape)
    _widen_rows(rows.view(np.int16).reshape(-1), rows.dtype == BFLOAT16, out.reshape(-1))
    return out


def narrow_rows(rows, out, keys=None, version=0, seed=None):
    """Round float32 rows to half precision: to the nearest, or, with a seed, at random so that the mean is right.

    Moves 6 * n * dim bytes. See halves.py for the formula, and for which random bits an element gets.

    Args:
        rows: [n, dim] float32.
        out: [n, dim] float16 or bfloat16, overwritten.
        keys: [n] int64, any number for each row that tells it from the others; None for 0 .. n-1.
        version: int, the number of the step.
        seed: int of 64 bits; None to round to the nearest, ties to even, as torch does.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit.
    """
    rows = float_matrix(rows, "rows", np.dtype(np.float32))
    if out.dtype not in HALF_DTYPES:
        raise TypeError(f"out must be float16 or bfloat16, got {out.dtype}")
    writable(out, "out", out.dtype, rows.shape)
    keys = np.arange(len(rows)) if keys is None else int_vector(keys, "keys")
    if keys.size != len(rows):
        raise ValueError(f"{keys.size} keys given for {len(rows)} rows")
    halves, bfloat = out.view(np.int16), out.dtype == BFLOAT16
    if seed is None:
        _narrow_rows(rows.reshape(-1), halves.reshape(-1), bfloat)
    else:
        _narrow_rows_at_random(
            rows, halves, bfloat, keys, *seed_and_version(seed, version), *room_for((rows.shape[1] + 3) // 4)
        )
    return out


def half_sgd_update(halves, words, stride, dim, steps, slots, grad, lr, scale, version, keys=None, seed=None):
    """Step of SGD on half values: value = round(value - lr * (scale * grad)); last step = version.

    Arithmetic is in float32, rounded once at the end: to the nearest, or with a seed at random (halves.py). Moves
    len(slots) * (8 * dim + 8) bytes.

    Args:
        halves: [2 * words.size] float16 or bfloat16 view of the bytes of `words`, updated in place.
        words: [any] float32, the record store.
        stride: float32 words per record.
        dim: values of a record.
        steps: [words.nbytes // 8] int64 view of the same bytes.
        slots: [n] int64, distinct.
        grad: [n, dim], float32 or the dtype of `halves`.
        lr, scale, version: as in sgd_update.
        keys: [n] int64, what random bits depend on in place of a row's place; None for the slots.
        seed: int of 64 bits; None to round to the nearest.

    Raises:
        IndexError: a slot is outside the store.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    rest = (lr, 0.0, 0.0, 0.0, scale, version, keys, seed)
    _half_update(SGD, 0, halves, words, stride, dim, steps, slots, grad, *rest)


def half_adagrad_update(halves, words, stride, dim, steps, slots, grad, clr, eps, scale, version, keys=None, seed=None):
    """Step of Adagrad as adagrad_update, on half values (see half_sgd_update); moves n * (16 * dim + 8) bytes.

    The sum of squares is the `dim` words after the value's (dim + 1) // 2.
    """
    rest = (clr, eps, 0.0, 0.0, scale, version, keys, seed)
    _half_update(ADAGRAD, dim, halves, words, stride, dim, steps, slots, grad, *rest)


def half_sparse_adam_update(
    halves, words, stride, dim, steps, slots, grad, betas, step_size, eps, scale, version, keys=None, seed=None
):
    """Step of SparseAdam as sparse_adam_update, on half values (see half_sgd_update); moves n * (24 * dim + 8) bytes.

    The moments are the 2 * `dim` words after the value's (dim + 1) // 2.
    """
    rest = (step_size, eps, 1 - betas[0], 1 - betas[1], scale, version, keys, seed)
    _half_update(SPARSE_ADAM, 2 * dim, halves, words, stride, dim, steps, slots, grad, *rest)


def half_rowwise_adagrad_update(
    halves, words, stride, dim, steps, slots, grad, lr, eps, scale, version, keys=None, seed=None
):
    """Step of rowwise_adagrad_update, on half values (see half_sgd_update); moves n * (8 * dim + 16) bytes.

    The sum is the word after the value's (dim + 1) // 2.
    """
    rest = (lr, eps, 0.0, 0.0, scale, version, keys, seed)
    _half_update(ROWWISE_ADAGRAD, 1, halves, words, stride, dim, steps, slots, grad, *rest)


def seed_and_version(seed, version):
    """Return both as an int64 of the same low 64 bits."""
    return tuple(int(number or 0) & (2**63 - 1) | -(int(number or 0) & 2**63) for number in (seed, version))


def _half_matrix(rows, name):
    if rows.dtype not in HALF_DTYPES:
        raise TypeError(f"{name} must be float16 or bfloat16, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {rows.shape}")
    return plain_input(rows)


def _half_update(
    optimizer, state_words, halves, words, stride, dim, steps, slots, grad, lr, eps, weight, weight2, *rest
):
    scale, version, keys, seed = rest
    if words.dtype != np.float32:
        raise TypeError(f"words must be float32, got {words.dtype}")
    count = record_count(words, stride)
    if stride % 2:
        raise ValueError(f"stride is {stride} words of 4 bytes; a record must be a multiple of 8 bytes")
    word_range(stride - 2, 0, (dim + 1) // 2 + state_words)
    if halves.dtype not in HALF_DTYPES:
        raise TypeError(f"halves must be float16 or bfloat16, got {halves.dtype}")
    writable(halves, "halves", halves.dtype, (2 * words.size,))
    writable(steps, "steps", np.int64, (words.nbytes // 8,))
    slots = int_vector(slots, "slots")
    grad = widen_rows(grad) if grad.dtype == halves.dtype else float_matrix(grad, "grad", np.dtype(np.float32))
    if grad.shape != (slots.size, dim):
        raise ValueError(f"grad must have shape {(slots.size, dim)}, got {grad.shape}")
    keys = slots if keys is None else int_vector(keys, "keys")
    if keys.size != slots.size:
        raise ValueError(f"{keys.size} keys given for {slots.size} slots")
    in_range(slots, count, "slots")
    numbers = tuple(np.float32(number) for number in (-lr, eps, weight, weight2, scale))
    arrays = (halves.view(np.int16), words, steps, slots, grad, keys)
    update = update_of(optimizer, halves.dtype == BFLOAT16, seed is not None)
    room = room_for((dim + 3) // 4 if seed is not None else 0)
    update(*arrays, stride, numbers, seed_and_version(seed, version)[0], int(version), *room)


@kernel
def _widen_rows(halves, bfloat, out):
    for j in range(halves.size):
        out[j] = widen(halves[j], bfloat)


@kernel
def _narrow_rows(values, out, bfloat):
    for j in range(values.size):
        out[j] = to_nearest(values[j], bfloat)


@kernel
def _narrow_rows_at_random(rows, out, bfloat, keys, seed, version, random, counters):
    dim = rows.shape[1]
    blocks = (dim + 3) // 4
    numbers = np.uint64(version), np.uint64(seed), np.uint64(seed) >> np.uint64(32)
    drawn = first = 0
    for i in range(len(rows)):
        if i == drawn:
            first = i
            drawn += fill_words(random, counters, keys, first, blocks, *numbers)
        of_row = part(random, 4 * (i - first) * blocks, dim)
        row, rounded = part(rows, i * dim, dim), part(out, i * dim, dim)
        for j in range(dim):
            rounded[j] = at_random(row[j], bfloat, of_row[j])
