"""Bags on the device: the sum, mean or maximum of some rows of a slab, and its backward. See cuda_ops/cpu/bags.py.

A part of a warp per bag adds its rows in order, in registers, 16 bytes at a time where the dim allows; long bags are
not cut. The gradient of the slab is a sum per segment (segment.py): of the bags' gradients themselves for sums and
means, of one row for each lookup, made first, where lookups have weights or a maximum chose them.
"""

from __future__ import annotations

import functools

import torch
from numba import cuda

from cuda_ops.cpu.bags import MODES
from cuda_ops.cuda.checks import float_matrix, in_range, int_vector, name_of, writable
from cuda_ops.cuda.launch import kernel, launch
from cuda_ops.cuda.segment import segment_sum, sum_of_rows
from cuda_ops.cuda.update import kind_of
from cuda_ops.cuda.words import move, pieces, widest
from cuda_ops.trust import is_trusted

_MEAN, _MAX = MODES["mean"], MODES["max"]


def reduce_bags(slab, positions, offsets, mode="sum", weights=None, skip=-1, out=None):
    """Reduce each bag to a row; as cuda_ops.cpu.bags.reduce_bags.

    Moves (n + B) * dim * itemsize + 8 * n bytes, for "max" 8 * B * dim more.
    """
    slab = float_matrix(slab, "slab")
    number, positions, offsets, weights = _check_bags(mode, positions, offsets, weights, slab.dtype)
    bags, dim = len(offsets), slab.shape[1]
    if out is None:
        out = torch.empty(bags, dim, dtype=slab.dtype, device=slab.device)
    else:
        writable(out, "out", slab.dtype, (bags, dim))
    _in_slab(positions, len(slab), skip)
    chosen = torch.empty(bags, dim, dtype=torch.int64, device=slab.device) if number == _MAX else None
    wide = 1 if number == _MAX else widest(slab, dim, others=(out,))
    body = _reducer(number, weights is not None, kind_of(slab), wide)
    stand_in = (slab if weights is None else weights, positions if chosen is None else chosen.view(-1))
    arrays = (slab.view(-1), positions, offsets, stand_in[0].view(-1), out.view(-1), stand_in[1])
    launch(body, bags, pieces(dim, wide), *arrays, dim, int(skip))
    return out, chosen


def bags_backward(grad, positions, offsets, out, mode="sum", weights=None, skip=-1, chosen=None):
    """Write the gradient of the slab; as cuda_ops.cpu.bags.bags_backward.

    No atomics: lookups are sorted by position (torch.sort). Moves (B + n + U) * dim * itemsize bytes and some 100 * n;
    2 * n * dim * itemsize more with weights or for "max".
    """
    grad = float_matrix(grad, "grad")
    number, positions, offsets, weights = _check_bags(mode, positions, offsets, weights, grad.dtype)
    if len(grad) != len(offsets):
        raise ValueError(f"grad has {len(grad)} rows for {len(offsets)} bags")
    writable(out, "out", grad.dtype, (len(out), grad.shape[1]))
    _in_slab(positions, len(out), skip)
    if number == _MAX and (chosen is None or chosen.shape != grad.shape or chosen.dtype != torch.int64):
        got = None if chosen is None else f"{name_of(chosen.dtype)} {tuple(chosen.shape)}"
        raise ValueError(f"chosen must be int64 {tuple(grad.shape)} for mode 'max', got {got}")
    if not positions.numel():
        return out.zero_()
    lookups = torch.arange(len(positions), device=grad.device)
    bag_of = torch.searchsorted(offsets, lookups, right=True) - 1
    if number == _MAX:
        in_range(chosen.reshape(-1) + 1, len(positions) + 1, "1 + chosen")
        rows = torch.where(chosen[bag_of] == lookups[:, None], grad[bag_of], 0)
    elif weights is not None:
        rows = grad[bag_of] * weights[:, None]
    else:
        if number == _MEAN:
            kept = (positions != skip).to(torch.int64)
            counts = torch.zeros_like(offsets).scatter_add_(0, bag_of, kept)
            grad = grad * (1 / counts.clamp_min(1).to(grad.dtype))[:, None]
        return sum_of_rows(grad, bag_of, positions, out, skip)
    return segment_sum(rows, positions, out, skip)


def _check_bags(mode, positions, offsets, weights, dtype):
    """Return (number of the mode, positions, offsets, weights) in plain form."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    positions, offsets = int_vector(positions, "positions"), int_vector(offsets, "offsets")
    if not len(offsets) and len(positions):
        raise ValueError(f"{len(positions)} positions are in none of 0 bags")
    if len(offsets) and not is_trusted():
        wrong = (offsets[:1] != 0).any() | (offsets[-1:] > len(positions)).any() | (offsets[1:] < offsets[:-1]).any()
        if wrong:
            raise ValueError(f"offsets must ascend from 0 to at most {len(positions)}, got {offsets.cpu().numpy()}")
    if weights is None:
        return MODES[mode], positions, offsets, None
    if mode != "sum":
        raise ValueError(f"weights go with mode 'sum', not {mode!r}, as in torch.nn.EmbeddingBag")
    if weights.dtype != dtype or weights.shape != positions.shape:
        expected, got = (
            f"{name_of(kind)} {tuple(like.shape)}" for kind, like in ((dtype, positions), (weights.dtype, weights))
        )
        raise ValueError(f"weights must be {expected}, one for each position, got {got}")
    return MODES[mode], positions, offsets, weights.contiguous()


def _in_slab(positions, rows, skip):
    if is_trusted():
        return
    outside = ((positions < 0) | (positions >= rows)) & (positions != skip)
    if outside.any():
        at = int(outside.to(torch.uint8).argmax())
        raise IndexError(f"positions[{at}] is {int(positions[at])}, neither in [0, {rows}) nor the skipped {skip}")


@functools.lru_cache(None)
def _reducer(mode, weighted, kind, wide):
    @kernel
    def reduce_rows(slab, positions, offsets, weights, out, chosen, dim, skip):
        total = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        bags = offsets.size
        for bag in range(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, bags, cuda.gridDim.x * cuda.blockDim.y):
            end = offsets[bag + 1] if bag + 1 < bags else positions.size
            for j in range(cuda.threadIdx.x * wide, dim, cuda.blockDim.x * wide):
                for k in range(wide):
                    total[k] = 0
                count = 0
                best = -1
                for i in range(offsets[bag], end):
                    if positions[i] == skip:
                        continue
                    move(row, 0, slab, positions[i] * dim + j, wide)
                    if mode == _MAX:
                        if count == 0 or row[0] > total[0]:
                            total[0] = row[0]
                            best = i
                    elif weighted:
                        weight = weights[i]
                        for k in range(wide):
                            total[k] += weight * row[k]
                    else:
                        for k in range(wide):
                            total[k] += row[k]
                    count += 1
                if mode == _MAX:
                    chosen[bag * dim + j] = best
                if mode == _MEAN and count > 1:
                    share = kind(1) / kind(count)
                    for k in range(wide):
                        total[k] *= share
                move(out, bag * dim + j, total, 0, wide)

    return reduce_rows
