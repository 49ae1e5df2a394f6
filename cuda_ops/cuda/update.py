"""Optimizer steps on records: value, state and last-step word in one pass over memory.

Arithmetic is that of cuda_ops/cpu/update.py, operation by operation, in the value dtype; the compiler may round a
product and a sum once together, there as here, so that results differ by an ulp at most.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numba import cuda

from cuda_ops.cuda.checks import float_matrix, in_range, int_vector, record_count, word_range, writable
from cuda_ops.cuda.launch import kernel, launch, like
from cuda_ops.cuda.words import move, pieces, widest


def sgd_update(words, stride, dim, steps, slots, grad, lr, scale, version):
    """Step of SGD without momentum: value -= lr * (scale * grad); as cuda_ops.cpu.update.sgd_update.

    Moves len(slots) * (3 * dim * itemsize + 16) bytes.
    """
    slots, grad = check_update(words, stride, dim, 0, steps, slots, grad)
    wide = widest(words, stride, dim, others=(grad,))
    arrays = (words, steps, slots, grad.view(-1))
    sizes = (stride, dim, stride * words.itemsize // 8, int(version))
    launch(_sgd(kind_of(words), wide), slots.numel(), pieces(dim, wide), *arrays, *sizes, *like(words, -lr, scale))


def adagrad_update(words, stride, dim, steps, slots, grad, clr, eps, scale, version):
    """Step of Adagrad, with g = scale * grad; as cuda_ops.cpu.update.adagrad_update.

    state += g * g; value -= clr * g / (sqrt(state) + eps). Moves len(slots) * (5 * dim * itemsize + 16) bytes.
    """
    slots, grad = check_update(words, stride, dim, dim, steps, slots, grad)
    wide = widest(words, stride, dim, others=(grad,))
    arrays = (words, steps, slots, grad.view(-1))
    sizes = (stride, dim, stride * words.itemsize // 8, int(version))
    numbers = like(words, -clr, eps, scale)
    launch(_adagrad(kind_of(words), wide), slots.numel(), pieces(dim, wide), *arrays, *sizes, *numbers)


def kind_of(words: torch.Tensor) -> type:
    """NumPy scalar type of the words, for local arrays."""
    return np.float32 if words.dtype == torch.float32 else np.float64


def check_update(words, stride, dim, state_words, steps, slots, grad):
    """Return (slots, grad) in plain form; raise what the update functions say if something does not fit."""
    count = record_count(words, stride)
    if words.itemsize * stride % 8:
        raise ValueError(f"stride is {stride} words of {words.itemsize} bytes; a record must be a multiple of 8 bytes")
    word_range(stride - 8 // words.itemsize, 0, dim + state_words)
    writable(steps, "steps", torch.int64, (words.numel() * words.itemsize // 8,))
    slots = int_vector(slots, "slots")
    grad = float_matrix(grad, "grad", words.dtype)
    if tuple(grad.shape) != (slots.numel(), dim):
        raise ValueError(f"grad must have shape {(slots.numel(), dim)}, got {tuple(grad.shape)}")
    in_range(slots, count, "slots")
    return slots, grad


@functools.lru_cache(None)
def _sgd(kind, wide):
    @kernel
    def sgd(words, steps, slots, grad, stride, dim, record_longs, version, minus_lr, scale):
        value = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, slots.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            begin = slots[i] * stride
            for j in range(cuda.threadIdx.x * wide, dim, cuda.blockDim.x * wide):
                move(value, 0, words, begin + j, wide)
                move(row, 0, grad, i * dim + j, wide)
                for k in range(wide):
                    value[k] += minus_lr * (scale * row[k])
                move(words, begin + j, value, 0, wide)
            if cuda.threadIdx.x == 0:
                steps[(slots[i] + 1) * record_longs - 1] = version

    return sgd


@functools.lru_cache(None)
def _adagrad(kind, wide):
    @kernel
    def adagrad(words, steps, slots, grad, stride, dim, record_longs, version, minus_clr, eps, scale):
        value = cuda.local.array(wide, kind)
        state = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, slots.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            begin = slots[i] * stride
            for j in range(cuda.threadIdx.x * wide, dim, cuda.blockDim.x * wide):
                move(value, 0, words, begin + j, wide)
                move(state, 0, words, begin + dim + j, wide)
                move(row, 0, grad, i * dim + j, wide)
                for k in range(wide):
                    g = scale * row[k]
                    total = state[k] + g * g
                    state[k] = total
                    value[k] += minus_clr * g / (math.sqrt(total) + eps)
                move(words, begin + j, value, 0, wide)
                move(words, begin + dim + j, state, 0, wide)
            if cuda.threadIdx.x == 0:
                steps[(slots[i] + 1) * record_longs - 1] = version

    return adagrad
