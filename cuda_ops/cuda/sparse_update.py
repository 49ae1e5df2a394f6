"""Steps of optimizers that leave alone the rows without gradient: SparseAdam, and the rowwise Adagrad."""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import cuda

from cuda_ops.cuda.launch import THREADS, kernel, launch, like
from cuda_ops.cuda.update import check_update, kind_of
from cuda_ops.cuda.words import move, pieces, widest


def sparse_adam_update(words, stride, dim, steps, slots, grad, betas, step_size, eps, scale, version):
    """Step of torch.optim.SparseAdam, with g = scale * grad; as cuda_ops.cpu.sparse_update.sparse_adam_update.

    Moves len(slots) * (7 * dim * itemsize + 16) bytes.
    """
    slots, grad = check_update(words, stride, dim, 2 * dim, steps, slots, grad)
    wide = widest(words, stride, dim, others=(grad,))
    arrays = (words, steps, slots, grad.view(-1))
    sizes = (stride, dim, stride * words.itemsize // 8, int(version))
    numbers = like(words, 1 - betas[0], 1 - betas[1], -step_size, eps, scale)
    launch(_sparse_adam(kind_of(words), wide), slots.numel(), pieces(dim, wide), *arrays, *sizes, *numbers)


def rowwise_adagrad_update(words, stride, dim, steps, slots, grad, lr, eps, scale, version):
    """Step of Adagrad with one sum per row, of the mean of squares; as cuda_ops.cpu.sparse_update's of that name.

    Squares are summed in float64, here by halves over the lanes of a row. Moves len(slots) * (3 * dim * itemsize + 32)
    bytes; the gradient is read twice, the second time from the cache.
    """
    slots, grad = check_update(words, stride, dim, 1, steps, slots, grad)
    wide = widest(words, stride, dim, others=(grad,))
    arrays = (words, steps, slots, grad.view(-1))
    sizes = (stride, dim, stride * words.itemsize // 8, int(version))
    body = _rowwise_adagrad(kind_of(words), wide)
    launch(body, slots.numel(), pieces(dim, wide), *arrays, *sizes, *like(words, -lr, eps, scale), same_lanes=True)


@functools.lru_cache(None)
def _sparse_adam(kind, wide):
    @kernel
    def sparse_adam(
        words, steps, slots, grad, stride, dim, record_longs, version, weight, weight2, minus_step, eps, scale
    ):
        value = cuda.local.array(wide, kind)
        m = cuda.local.array(wide, kind)
        v = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, slots.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            begin = slots[i] * stride
            for j in range(cuda.threadIdx.x * wide, dim, cuda.blockDim.x * wide):
                move(value, 0, words, begin + j, wide)
                move(m, 0, words, begin + dim + j, wide)
                move(v, 0, words, begin + 2 * dim + j, wide)
                move(row, 0, grad, i * dim + j, wide)
                for k in range(wide):
                    g = scale * row[k]
                    m[k] += (g - m[k]) * weight
                    v[k] += (g * g - v[k]) * weight2
                    value[k] += minus_step * (m[k] / (math.sqrt(v[k]) + eps))
                move(words, begin + j, value, 0, wide)
                move(words, begin + dim + j, m, 0, wide)
                move(words, begin + 2 * dim + j, v, 0, wide)
            if cuda.threadIdx.x == 0:
                steps[(slots[i] + 1) * record_longs - 1] = version

    return sparse_adam


@functools.lru_cache(None)
def _rowwise_adagrad(kind, wide):
    @kernel
    def rowwise_adagrad(words, steps, slots, grad, stride, dim, record_longs, version, minus_lr, eps, scale):
        value = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        squares = cuda.shared.array(THREADS, np.float64)
        lanes = cuda.blockDim.x
        mine = cuda.threadIdx.y * lanes + cuda.threadIdx.x
        # All threads of a block go through as many turns, for they meet in each.
        for first in range(cuda.blockIdx.x * cuda.blockDim.y, slots.size, cuda.gridDim.x * cuda.blockDim.y):
            i = first + cuda.threadIdx.y
            begin = slots[i] * stride if i < slots.size else 0
            part = 0.0
            if i < slots.size:
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
            if i < slots.size:
                total = words[begin + dim] + kind(squares[cuda.threadIdx.y * lanes] / dim)
                root = math.sqrt(total) + eps
                for j in range(cuda.threadIdx.x * wide, dim, lanes * wide):
                    move(value, 0, words, begin + j, wide)
                    move(row, 0, grad, i * dim + j, wide)
                    for k in range(wide):
                        value[k] += minus_lr * (scale * row[k]) / root
                    move(words, begin + j, value, 0, wide)
            cuda.syncthreads()
            if i < slots.size and cuda.threadIdx.x == 0:
                words[begin + dim] = total
                steps[(slots[i] + 1) * record_longs - 1] = version

    return rowwise_adagrad
