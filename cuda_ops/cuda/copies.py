"""The kernel behind gather, scatter and expand: rows copied from one place to another."""

from __future__ import annotations

import functools

import torch
from numba import cuda

from cuda_ops.cuda.launch import kernel, launch
from cuda_ops.cuda.words import move, pieces, widest


def copy_rows(
    target: torch.Tensor, source: torch.Tensor, count: int, width: int, to: tuple, at: tuple, like: torch.Tensor
) -> None:
    """Copy `count` rows of `width` words.

    Args:
        target, source: contiguous tensors of one dtype.
        to, at: (rows int64 `[count]` or None for 0 .. count-1, words from one row to the next, first word) in `target`
            and in `source`. Rows of `to` must be distinct.
        like: an int64 tensor on the device, which stands for the rows that are None.
    """
    (to_rows, to_stride, to_offset), (at_rows, at_stride, at_offset) = to, at
    wide = widest(target, to_stride, to_offset, at_stride, at_offset, width, others=(source,))
    body = _copier(wide, to_rows is not None, at_rows is not None)
    to_rows, at_rows = (like if rows is None else rows for rows in (to_rows, at_rows))
    flat_to, flat_at = target.view(-1), source.view(-1)
    sizes = (to_stride, to_offset, at_stride, at_offset, count, width)
    launch(body, count, pieces(width, wide), flat_to, flat_at, to_rows, at_rows, *sizes)


@functools.lru_cache(None)
def _copier(wide, has_to, has_at):
    @kernel
    def copy(target, source, to_rows, at_rows, to_stride, to_offset, at_stride, at_offset, count, width):
        for i in range(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, count, cuda.gridDim.x * cuda.blockDim.y):
            to = (to_rows[i] if has_to else i) * to_stride + to_offset
            at = (at_rows[i] if has_at else i) * at_stride + at_offset
            for j in range(cuda.threadIdx.x * wide, width, cuda.blockDim.x * wide):
                move(target, to + j, source, at + j, wide)

    return copy
