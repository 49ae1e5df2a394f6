"""Limit the norm of rows, as the `max_norm` of an embedding does."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numba import cuda

from cuda_ops.cuda.checks import float_matrix, writable
from cuda_ops.cuda.launch import THREADS, kernel, launch
from cuda_ops.cuda.update import kind_of
from cuda_ops.cuda.words import pieces

_NORMS = {2.0: 0, 1.0: 1, math.inf: 2, -math.inf: 3, 0.0: 4}
_OTHER_NORM = 5


def renorm(rows, max_norm, norm_type=2.0):
    """Scale rows whose norm exceeds `max_norm` by max_norm / (norm + 1e-7), in place; as cuda_ops.cpu.renorm.renorm.

    Norms are summed in float64, here by halves over the lanes of a row. Moves 2 * U * dim * itemsize bytes or less.
    """
    writable(float_matrix(rows, "rows"), "rows", rows.dtype, tuple(rows.shape))
    if not rows.is_contiguous():
        raise ValueError("rows must be contiguous, aligned and writeable: results are written into it in place")
    changed = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    limit = float(max_norm) * (1 + 2 * torch.finfo(rows.dtype).eps)
    numbers = (np.float64(limit), np.float64(max_norm), np.float64(norm_type))
    kind = _NORMS.get(float(norm_type), _OTHER_NORM)
    dim = rows.shape[1]
    launch(
        _limiter(kind_of(rows), kind),
        len(rows),
        pieces(dim, 1),
        rows.detach().view(-1),
        changed,
        dim,
        *numbers,
        same_lanes=True,
    )
    return changed


@functools.lru_cache(None)
def _limiter(kind, norm):
    @kernel
    def limit_rows(rows, changed, dim, limit, max_norm, p):
        parts = cuda.shared.array(THREADS, np.float64)
        lanes = cuda.blockDim.x
        mine = cuda.threadIdx.y * lanes + cuda.threadIdx.x
        for first in range(cuda.blockIdx.x * cuda.blockDim.y, changed.size, cuda.gridDim.x * cuda.blockDim.y):
            i = first + cuda.threadIdx.y
            part = math.inf if norm == 3 else 0.0
            if i < changed.size:
                for j in range(cuda.threadIdx.x, dim, lanes):
                    size = abs(np.float64(rows[i * dim + j]))
                    if norm == 0:
                        part += size * size
                    elif norm == 1:
                        part += size
                    elif norm == 2:
                        part = size if size > part else part
                    elif norm == 3:
                        part = size if size < part else part
                    elif norm == 4:
                        part += 1.0 if size != 0 else 0.0
                    else:
                        part += size**p
            parts[mine] = part
            cuda.syncthreads()
            half = lanes // 2
            while half > 0:
                if cuda.threadIdx.x < half:
                    other = parts[mine + half]
                    if norm == 2:
                        parts[mine] = other if other > parts[mine] else parts[mine]
                    elif norm == 3:
                        parts[mine] = other if other < parts[mine] else parts[mine]
                    else:
                        parts[mine] += other
                cuda.syncthreads()
                half //= 2
            total = parts[cuda.threadIdx.y * lanes]
            if norm == 0:
                total = math.sqrt(total)
            elif norm == 5:
                total = total ** (1.0 / p)
            length = np.float64(kind(total))
            if i < changed.size and length > limit:
                factor = kind(max_norm / (length + 1e-7))
                for j in range(cuda.threadIdx.x, dim, lanes):
                    rows[i * dim + j] *= factor
                if cuda.threadIdx.x == 0:
                    changed[i] = True
            cuda.syncthreads()

    return limit_rows
