"""From slab rows to lookups and back: copies of rows, and sums per row.

A sum per segment is made without atomics. Lookups are sorted by segment (torch.sort, a radix sort, stable); a part of a
warp then adds up the rows of one segment in the order of the lookups, in registers, and writes the sum once. A segment
of more than `CHUNK` lookups (a popular row) is cut into chunks of that many, which are summed side by side, and then
their sums in order: no row holds up the rest, and what a row sums to depends on its own lookups alone.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import cuda

from cuda_ops.cuda.checks import float_matrix, in_range, int_vector, writable
from cuda_ops.cuda.copies import copy_rows
from cuda_ops.cuda.launch import SIMULATED, kernel, launch
from cuda_ops.cuda.words import move, pieces, widest

CHUNK = 4 if SIMULATED else 64
"""Lookups that are added one after the other; a few in the simulator, so that small tests come to the longer ones."""


def expand(slab, inverse, out=None):
    """Copy slab rows to lookups: out[i] = slab[inverse[i]]; as cuda_ops.cpu.segment.expand.

    Moves 2 * n * dim * itemsize + 8 * n bytes, most reads of popular rows from the cache.
    """
    slab = float_matrix(slab, "slab")
    inverse = int_vector(inverse, "inverse")
    dim, shape = slab.shape[1], (inverse.numel(), slab.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=slab.dtype, device=slab.device)
    else:
        writable(out, "out", slab.dtype, shape)
    in_range(inverse, len(slab), "inverse")
    copy_rows(out, slab, len(inverse), dim, (None, dim, 0), (inverse, dim, 0), inverse)
    return out


def segment_sum(grad, inverse, out, skip=-1):
    """Sum rows per segment: out[u] = sum of grad[i] where inverse[i] == u, or zero; as cuda_ops.cpu.segment's.

    The same bits every time; those of the CPU for segments of at most `CHUNK` lookups. Moves (n + U) * dim * itemsize
    bytes, and some 100 * n for sorting.
    """
    grad = float_matrix(grad, "grad")
    inverse = int_vector(inverse, "inverse")
    if len(grad) != inverse.numel():
        raise ValueError(f"grad has {len(grad)} rows for {inverse.numel()} entries of inverse")
    segments, dim = len(out), grad.shape[1]
    writable(out, "out", grad.dtype, (segments, dim))
    _check_segments(inverse, segments, skip)
    return sum_of_rows(grad, None, inverse, out, skip)


def sum_of_rows(grad, rows, inverse, out, skip):
    """As segment_sum, of grad[rows[i]] for each i (rows int64 [n] in [0, len(grad)), or None for i), all checked."""
    segments, dim = out.shape
    order, starts, first_chunk = _sorted_segments(inverse, segments, skip)
    if rows is not None:
        order = rows[order]
    chunks = 2 * (len(inverse) // CHUNK)  # at most: a segment that is cut has more than CHUNK lookups
    partial = torch.empty(chunks, dim, dtype=grad.dtype, device=grad.device)
    wide = widest(grad, dim, others=(out, partial))
    body = _summer(np.float32 if grad.dtype == torch.float32 else np.float64, wide)
    arrays = (grad.view(-1), order, starts, first_chunk, partial.view(-1), out.view(-1), dim)
    if chunks:
        launch(body, chunks, pieces(dim, wide), *arrays, chunks, 1)
    launch(body, segments, pieces(dim, wide), *arrays, segments, 0)
    return out


def segment_count(inverse, segments, skip=-1):
    """Count entries per segment: int64 [segments]; as cuda_ops.cpu.segment.segment_count."""
    inverse = int_vector(inverse, "inverse")
    _check_segments(inverse, segments, skip)
    counted = torch.where((inverse < 0) | (inverse >= segments) | (inverse == skip), segments, inverse)
    return torch.zeros(segments + 1, dtype=torch.int64, device=inverse.device).scatter_add_(
        0, counted, torch.ones_like(inverse)
    )[:segments]


def _check_segments(inverse, segments, skip):
    try:
        in_range(torch.where(inverse == skip, 0, inverse) if segments else inverse[inverse != skip], segments, "")
    except IndexError:
        outside = ((inverse < 0) | (inverse >= segments)) & (inverse != skip)
        position = int(outside.to(torch.uint8).argmax())
        raise IndexError(
            f"inverse[{position}] is {int(inverse[position])}, neither in [0, {segments}) nor the skipped {skip}"
        ) from None


def _sorted_segments(inverse, segments, skip):
    """Return how lookups lie when sorted by segment.

    Returns:
        order: int64 [n], lookups sorted by segment, those of one in order.
        starts: int64 [2, segments], the first and the end of each segment in `order`; none for the skipped one.
        first_chunk: int64 [segments + 1], chunks in the segments before each that are cut.
    """
    ordered, order = torch.sort(inverse, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(segments + 1, device=inverse.device))
    starts = torch.stack([bounds[:-1], bounds[1:]])
    if 0 <= skip < segments:
        starts[1, skip] = starts[0, skip]
    lengths = starts[1] - starts[0]
    chunks = torch.where(lengths > CHUNK, (lengths + (CHUNK - 1)) // CHUNK, 0)
    first_chunk = torch.zeros(segments + 1, dtype=torch.int64, device=inverse.device)
    torch.cumsum(chunks, 0, out=first_chunk[1:])
    return order, starts, first_chunk


@functools.lru_cache(None)
def _summer(kind, wide):
    @kernel
    def sum_rows(grad, order, starts, first_chunk, partial, out, dim, count, by_chunk):
        """With `by_chunk`, sums of the chunks of long segments; without, of segments, from chunks where there are."""
        segments = first_chunk.size - 1
        total = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        for i in range(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, count, cuda.gridDim.x * cuda.blockDim.y):
            if by_chunk:
                if i >= first_chunk[segments]:
                    break
                low, high = 0, segments  # the last segment whose first chunk is at or before this one
                while high - low > 1:
                    middle = (low + high) // 2
                    if first_chunk[middle] <= i:
                        low = middle
                    else:
                        high = middle
                begin = starts[0, low] + (i - first_chunk[low]) * CHUNK
                end = begin + CHUNK if begin + CHUNK < starts[1, low] else starts[1, low]
            else:
                begin, end = starts[0, i], starts[1, i]
            from_chunks = by_chunk == 0 and end - begin > CHUNK
            if from_chunks:
                begin, end = first_chunk[i], first_chunk[i + 1]
            for j in range(cuda.threadIdx.x * wide, dim, cuda.blockDim.x * wide):
                for k in range(wide):
                    total[k] = 0
                if from_chunks:
                    for r in range(begin, end):
                        move(row, 0, partial, r * dim + j, wide)
                        for k in range(wide):
                            total[k] += row[k]
                else:
                    for r in range(begin, end):
                        move(row, 0, grad, order[r] * dim + j, wide)
                        for k in range(wide):
                            total[k] += row[k]
                if by_chunk:
                    move(partial, i * dim + j, total, 0, wide)
                else:
                    move(out, i * dim + j, total, 0, wide)

    return sum_rows
