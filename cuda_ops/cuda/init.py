"""Row initialisation on the device; see cuda_ops/init.py for the generator and the distributions.

The bits are those of the CPU. Uniform and normal values are made of them by the same functions, compiled for the
device, where a product and a sum may be rounded once together: they equal the CPU's to a few ulp of float64, and so
after rounding to float32 almost always to the bit.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numba import cuda

from cuda_ops import init as host
from cuda_ops.cpu.philox import philox
from cuda_ops.cuda.checks import int_vector, writable
from cuda_ops.cuda.launch import helper_from, kernel, launch
from cuda_ops.cuda.update import kind_of
from cuda_ops.init import _SHIFT24, _SHIFT32, _SHIFT52, _SHIFT53

_philox = helper_from(philox)
_log = helper_from(host._log)
_central_quantile = helper_from(host._central_quantile)
_tail_quantile = helper_from(host._tail_quantile, _log=_log)


def fill_normal(out_ND, rows_N, key0: int, key1: int, mean: float, std: float) -> None:
    """Fill with independent normal values; as cuda_ops.init.fill_normal, for a contiguous tensor."""
    _fill(out_ND, rows_N, key0, key1, (0.0, 1.0, mean, std, -math.inf, math.inf), uniform=False)


def fill_trunc_normal(out_ND, rows_N, key0: int, key1: int, mean: float, std: float, low: float, high: float) -> None:
    """Fill with normal values conditioned on [`low`, `high`]; as cuda_ops.init.fill_trunc_normal."""
    numbers = host.truncation(mean, std, low, high, kind_of(out_ND))
    if isinstance(numbers, float):
        out_ND.fill_(numbers)
    else:
        _fill(out_ND, rows_N, key0, key1, numbers, uniform=False)


def fill_uniform(out_ND, rows_N, key0: int, key1: int, low: float, high: float) -> None:
    """Fill with independent values, uniform on steps of [`low`, `high`]; as cuda_ops.init.fill_uniform."""
    _fill(out_ND, rows_N, key0, key1, (low, high - low), uniform=True)


def _fill(out_ND, rows_N, key0, key1, numbers, *, uniform):
    rows_N = int_vector(rows_N, "rows_N")
    if out_ND.dtype not in (torch.float32, torch.float64) or out_ND.ndim != 2:
        raise TypeError(f"out_ND must be a float32 or float64 matrix, got {out_ND.dtype} {tuple(out_ND.shape)}")
    writable(out_ND, "out_ND", out_ND.dtype, (len(rows_N), out_ND.shape[1]))
    dim = out_ND.shape[1]
    blocks = -(-dim * out_ND.itemsize // 16)
    body = (_uniform if uniform else _normal)(kind_of(out_ND))
    keys = (np.uint64(key0), np.uint64(key1))
    launch(body, len(rows_N), blocks, out_ND.detach().view(-1), rows_N, dim, *keys, *map(np.float64, numbers))


@functools.lru_cache(None)
def _normal(kind):
    single = kind is np.float32
    count = 4 if single else 2

    @kernel
    def fill(out, rows, dim, key0, key1, start, width, mean, scale, low, high):
        words = cuda.local.array(4, np.uint64)
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, rows.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            for block in range(cuda.threadIdx.x, (dim + count - 1) // count, cuda.blockDim.x):
                words[0], words[1], words[2], words[3] = _philox(
                    np.uint64(rows[i]), np.uint64(block), np.uint64(0), key0, key1
                )
                for k in range(count):
                    if single:
                        p = (np.float64(np.int64(words[k])) + 0.5) * 2.0**-32
                    else:
                        bits = (words[2 * k] | (words[2 * k + 1] << _SHIFT32)) >> _SHIFT52
                        p = (np.float64(np.int64(bits)) + 0.5) * 2.0**-52
                    p = start + width * p
                    if p < 0.075:
                        z = _tail_quantile(p)
                    elif p > 0.925:
                        z = -_tail_quantile(1.0 - p)
                    else:
                        z = _central_quantile(p - 0.5)
                    value = mean + scale * z
                    value = low if value < low else (high if value > high else value)
                    if block * count + k < dim:
                        out[i * dim + block * count + k] = value

    return fill


@functools.lru_cache(None)
def _uniform(kind):
    single = kind is np.float32
    count = 4 if single else 2

    @kernel
    def fill(out, rows, dim, key0, key1, low, width):
        words = cuda.local.array(4, np.uint64)
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, rows.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            for block in range(cuda.threadIdx.x, (dim + count - 1) // count, cuda.blockDim.x):
                words[0], words[1], words[2], words[3] = _philox(
                    np.uint64(rows[i]), np.uint64(block), np.uint64(0), key0, key1
                )
                for k in range(count):
                    if single:
                        unit = np.float64(np.int64(words[k] >> _SHIFT24)) * 2.0**-24
                    else:
                        bits = (words[2 * k] | (words[2 * k + 1] << _SHIFT32)) >> _SHIFT53
                        unit = np.float64(np.int64(bits)) * 2.0**-53
                    if block * count + k < dim:
                        out[i * dim + block * count + k] = low + width * unit

    return fill
