"""Additive differences: what changed since a copy was taken, and adding such a change to records."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import cuda

from cuda_ops.cuda.checks import float_matrix, in_range, int_vector, record_count, word_range, writable
from cuda_ops.cuda.launch import kernel, launch
from cuda_ops.cuda.words import move, pieces, widest


def delta(values, base, out=None):
    """Return values - base, row by row, by torch; as cuda_ops.cpu.delta.delta."""
    values = float_matrix(values, "values")
    base = float_matrix(base, "base", values.dtype)
    if base.shape != values.shape:
        raise ValueError(f"base must have shape {tuple(values.shape)}, got {tuple(base.shape)}")
    if out is not None:
        writable(out, "out", values.dtype, tuple(values.shape))
    return torch.sub(values, base, out=out)


def merge(words, stride, slots, delta, offset=0, distinct=False):
    """Add rows to records: record slots[i], words [offset, offset + dim) += delta[i]; as cuda_ops.cpu.delta.merge.

    Unless `distinct` says that no slot is repeated, slots are sorted first (torch.sort, stable), and the rows of one
    are added in order by one part of a warp: the CPU's bits. Moves 3 * n * dim * itemsize bytes or less, and 16 for
    each slot.
    """
    count = record_count(words, stride)
    slots = int_vector(slots, "slots")
    delta = float_matrix(delta, "delta", words.dtype)
    if len(delta) != slots.numel():
        raise ValueError(f"delta has {len(delta)} rows for {slots.numel()} slots")
    width = delta.shape[1]
    word_range(stride, offset, width)
    in_range(slots, count, "slots")
    if distinct:
        order = torch.arange(slots.numel(), device=slots.device)
    else:
        slots, order = torch.sort(slots, stable=True)
    wide = widest(words, stride, offset, width, others=(delta,))
    body = _adder(np.float32 if words.dtype == torch.float32 else np.float64, wide)
    sizes = (stride, offset, width)
    launch(body, slots.numel(), pieces(width, wide), words, slots, order, delta.view(-1), *sizes)


@functools.lru_cache(None)
def _adder(kind, wide):
    @kernel
    def add_rows(words, slots, order, delta, stride, offset, width):
        total = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, slots.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            slot = slots[i]
            if i > 0 and slots[i - 1] == slot:
                continue
            begin = slot * stride + offset
            for j in range(cuda.threadIdx.x * wide, width, cuda.blockDim.x * wide):
                move(total, 0, words, begin + j, wide)
                at = i
                while at < slots.size and slots[at] == slot:
                    move(row, 0, delta, order[at] * width + j, wide)
                    for k in range(wide):
                        total[k] += row[k]
                    at += 1
                move(words, begin + j, total, 0, wide)

    return add_rows
