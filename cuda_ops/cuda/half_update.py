"""Values in half precision with state in float32, on the device; see cuda_ops/cpu/half_update.py.

Elements are converted, stepped and rounded by the CPU's own functions, compiled for the device, and random bits are
the same. 16 bytes of gradient and state and 8 of values at a time, where the stride is a multiple of 4 words and the
dim of 8 (without state, of 4), and element by element where not.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import cuda

from cuda_ops.cpu import half_steps, halves
from cuda_ops.cpu.half_steps import ADAGRAD, ROWWISE_ADAGRAD, SGD, SPARSE_ADAM, STATE_PARTS
from cuda_ops.cpu.half_update import seed_and_version
from cuda_ops.cpu.philox import philox
from cuda_ops.cuda.checks import (
    HALF_DTYPES,
    float_matrix,
    in_range,
    int_vector,
    name_of,
    record_count,
    word_range,
    writable,
)
from cuda_ops.cuda.launch import THREADS, helper_from, kernel, launch, like
from cuda_ops.cuda.words import move, pieces, widest

_bits_of = helper_from(halves.bits_of)
_float_of = helper_from(halves.float_of)
_widen = helper_from(halves.widen, bits_of=_bits_of, float_of=_float_of)
_rounding = {
    "bits_of": _bits_of,
    "float_of": _float_of,
    "_up_or_down": helper_from(halves._up_or_down),
    "_with_sign": helper_from(halves._with_sign),
}
_narrow = helper_from(
    halves.narrow,
    to_nearest=helper_from(halves.to_nearest, **_rounding),
    at_random=helper_from(halves.at_random, **_rounding),
)
_random_words = helper_from(halves.random_words, philox=helper_from(philox))
_word_at = helper_from(halves.word_at)
_element_step = helper_from(half_steps.element_step)
_TO_NEAREST = halves.TO_NEAREST


def widen_rows(rows, out=None):
    """Convert rows in half precision to float32, exactly, by torch; as cuda_ops.cpu.half_update.widen_rows."""
    rows = _half_matrix(rows, "rows")
    if out is None:
        return rows.float()
    return writable(out, "out", torch.float32, tuple(rows.shape)).copy_(rows)


def narrow_rows(rows, out, keys=None, version=0, seed=None):
    """Round float32 rows to half precision; as cuda_ops.cpu.half_update.narrow_rows, to the nearest by torch."""
    rows = float_matrix(rows, "rows", torch.float32)
    if out.dtype not in HALF_DTYPES:
        raise TypeError(f"out must be float16 or bfloat16, got {name_of(out.dtype)}")
    writable(out, "out", out.dtype, tuple(rows.shape))
    keys = torch.arange(len(rows), device=rows.device) if keys is None else int_vector(keys, "keys")
    if len(keys) != len(rows):
        raise ValueError(f"{len(keys)} keys given for {len(rows)} rows")
    if seed is None:
        return out.copy_(rows)
    dim = rows.shape[1]
    body = _rounder(out.dtype == torch.bfloat16)
    views = rows.view(-1), out.view(torch.int16).view(-1)
    launch(body, len(rows), pieces(dim, 4), *views, keys, dim, *map(np.int64, seed_and_version(seed, version)))
    return out


def half_sgd_update(halves, words, stride, dim, steps, slots, grad, lr, scale, version, keys=None, seed=None):
    """Step of SGD on half values; as cuda_ops.cpu.half_update.half_sgd_update."""
    rest = (lr, 0.0, 0.0, 0.0, scale, version, keys, seed)
    _half_update(SGD, 0, halves, words, stride, dim, steps, slots, grad, *rest)


def half_adagrad_update(halves, words, stride, dim, steps, slots, grad, clr, eps, scale, version, keys=None, seed=None):
    """Step of Adagrad on half values; as cuda_ops.cpu.half_update.half_adagrad_update."""
    rest = (clr, eps, 0.0, 0.0, scale, version, keys, seed)
    _half_update(ADAGRAD, dim, halves, words, stride, dim, steps, slots, grad, *rest)


def half_sparse_adam_update(
    halves, words, stride, dim, steps, slots, grad, betas, step_size, eps, scale, version, keys=None, seed=None
):
    """Step of SparseAdam on half values; as cuda_ops.cpu.half_update.half_sparse_adam_update."""
    rest = (step_size, eps, 1 - betas[0], 1 - betas[1], scale, version, keys, seed)
    _half_update(SPARSE_ADAM, 2 * dim, halves, words, stride, dim, steps, slots, grad, *rest)


def half_rowwise_adagrad_update(
    halves, words, stride, dim, steps, slots, grad, lr, eps, scale, version, keys=None, seed=None
):
    """Step of the rowwise Adagrad on half values; as cuda_ops.cpu.half_update.half_rowwise_adagrad_update.

    Squares are summed in float64, here by halves over the lanes of a row.
    """
    rest = (lr, eps, 0.0, 0.0, scale, version, keys, seed)
    _half_update(ROWWISE_ADAGRAD, 1, halves, words, stride, dim, steps, slots, grad, *rest)


def _half_matrix(rows, name):
    if rows.dtype not in HALF_DTYPES:
        raise TypeError(f"{name} must be float16 or bfloat16, got {name_of(rows.dtype)}")
    if rows.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(rows.shape)}")
    return rows.contiguous()


def _half_update(
    optimizer, state_words, halves, words, stride, dim, steps, slots, grad, lr, eps, weight, weight2, *rest
):
    scale, version, keys, seed = rest
    if words.dtype != torch.float32:
        raise TypeError(f"words must be float32, got {name_of(words.dtype)}")
    count = record_count(words, stride)
    if stride % 2:
        raise ValueError(f"stride is {stride} words of 4 bytes; a record must be a multiple of 8 bytes")
    value_words = (dim + 1) // 2
    word_range(stride - 2, 0, value_words + state_words)
    if halves.dtype not in HALF_DTYPES:
        raise TypeError(f"halves must be float16 or bfloat16, got {name_of(halves.dtype)}")
    writable(halves, "halves", halves.dtype, (2 * words.numel(),))
    writable(steps, "steps", torch.int64, (words.numel() // 2,))
    slots = int_vector(slots, "slots")
    grad = widen_rows(grad) if grad.dtype == halves.dtype else float_matrix(grad, "grad", torch.float32)
    if tuple(grad.shape) != (slots.numel(), dim):
        raise ValueError(f"grad must have shape {(slots.numel(), dim)}, got {tuple(grad.shape)}")
    keys = slots if keys is None else int_vector(keys, "keys")
    if len(keys) != len(slots):
        raise ValueError(f"{len(keys)} keys given for {len(slots)} slots")
    in_range(slots, count, "slots")
    parts = STATE_PARTS[optimizer]
    wide = widest(words, stride, dim, *[value_words] * bool(parts), others=(grad,))
    body = _updater(optimizer, halves.dtype == torch.bfloat16, seed is not None, wide)
    arrays = (halves.view(torch.int16), words, steps, slots, grad.view(-1), keys)
    numbers = like(words, -lr, eps, weight, weight2, scale)
    counters = (np.int64(seed_and_version(seed, version)[0]), np.int64(version))
    launch(
        body,
        slots.numel(),
        pieces(dim, wide),
        *arrays,
        stride,
        dim,
        *numbers,
        *counters,
        same_lanes=optimizer == ROWWISE_ADAGRAD,
    )


@functools.lru_cache(None)
def _rounder(bfloat):
    @kernel
    def round_rows(rows, out, keys, dim, seed, version):
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, keys.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            for block in range(cuda.threadIdx.x, (dim + 3) // 4, cuda.blockDim.x):
                random = _random_words(keys[i], block, version, seed)
                for k in range(4):
                    j = 4 * block + k
                    if j < dim:
                        out[i * dim + j] = _narrow(rows[i * dim + j], bfloat, _word_at(random, k))

    return round_rows


@functools.lru_cache(None)
def _updater(optimizer, bfloat, at_random, wide):
    parts = STATE_PARTS[optimizer]
    rowwise = optimizer == ROWWISE_ADAGRAD

    @kernel
    def update_halves(
        halves, words, steps, slots, grad, keys, stride, dim, minus_lr, eps, weight, weight2, scale, seed, version
    ):
        value = cuda.local.array(wide, np.int16)
        first = cuda.local.array(wide, np.float32)
        second = cuda.local.array(wide, np.float32)
        row = cuda.local.array(wide, np.float32)
        squares = cuda.shared.array(THREADS, np.float64)
        lanes = cuda.blockDim.x
        mine = cuda.threadIdx.y * lanes + cuda.threadIdx.x
        # All threads of a block go through as many turns, for they may meet in each.
        for start in range(cuda.blockIdx.x * cuda.blockDim.y, slots.size, cuda.gridDim.x * cuda.blockDim.y):
            i = start + cuda.threadIdx.y
            inside = i < slots.size
            slot = slots[i] if inside else 0
            first_at = slot * stride + (dim + 1) // 2
            total = np.float32(0)
            if rowwise:
                part = 0.0
                if inside:
                    for j in range(cuda.threadIdx.x * wide, dim, lanes * wide):
                        move(row, 0, grad, i * dim + j, wide)
                        for k in range(wide):
                            g = np.float64(scale * row[k])
                            part += g * g
                squares[mine] = part
                cuda.syncthreads()
                half = lanes // 2
                while half > 0:
                    if cuda.threadIdx.x < half:
                        squares[mine] += squares[mine + half]
                    cuda.syncthreads()
                    half //= 2
                if inside:
                    total = words[first_at] + np.float32(squares[cuda.threadIdx.y * lanes] / dim)
                cuda.syncthreads()
            if inside:
                for j in range(cuda.threadIdx.x * wide, dim, lanes * wide):
                    move(value, 0, halves, 2 * slot * stride + j, wide)
                    move(row, 0, grad, i * dim + j, wide)
                    if parts > 0:
                        move(first, 0, words, first_at + j, wide)
                    if parts > 1:
                        move(second, 0, words, first_at + dim + j, wide)
                    nearest = np.int64(_TO_NEAREST)
                    random = (nearest, nearest, nearest, nearest)
                    if at_random:
                        random = _random_words(keys[i], j // 4, version, seed)
                    for k in range(wide):
                        old_first = first[k] if parts > 0 else total
                        old_second = second[k] if parts > 1 else np.float32(0)
                        new, new_first, new_second = _element_step(
                            optimizer,
                            _widen(value[k], bfloat),
                            old_first,
                            old_second,
                            scale * row[k],
                            minus_lr,
                            eps,
                            weight,
                            weight2,
                        )
                        if parts > 0:
                            first[k] = new_first
                        if parts > 1:
                            second[k] = new_second
                        value[k] = _narrow(new, bfloat, _word_at(random, (j + k) % 4))
                    move(halves, 2 * slot * stride + j, value, 0, wide)
                    if parts > 0:
                        move(words, first_at + j, first, 0, wide)
                    if parts > 1:
                        move(words, first_at + dim + j, second, 0, wide)
                if cuda.threadIdx.x == 0:
                    if rowwise:
                        words[first_at] = total
                    steps[(slot + 1) * (stride // 2) - 1] = version

    return update_halves
