"""Limit the norm of rows, as the `max_norm` of an embedding does."""

import numpy as np

from cuda_ops.cpu.checks import writable
from cuda_ops.cpu.kernels import helper, kernel

_VALUE_DTYPES = (np.float32, np.float64)


def renorm(rows, max_norm, norm_type=2.0):
    """Scale rows whose norm exceeds `max_norm` by max_norm / (norm + 1e-7), in place.

    This is what torch.embedding_renorm_ does. Norms are summed in float64 and rounded to the dtype of `rows`
    before they are compared. A norm within 2 roundings of the limit is not above it: a row that was scaled
    keeps its bits when it is limited again, however often and on whatever rank.

    Args:
        rows: [U, dim] float32 or float64.
        max_norm: limit.
        norm_type: p of the p-norm; any float, with inf, -inf and 0 (number of elements that are not zero).

    Returns:
        [U] bool: which rows were scaled.
    """
    if rows.dtype not in _VALUE_DTYPES:
        raise TypeError(f"rows must be float32 or float64, got {rows.dtype}")
    if rows.ndim != 2:
        raise ValueError(f"rows must have two dimensions, got shape {rows.shape}")
    writable(rows, "rows", rows.dtype, rows.shape)
    changed = np.zeros(len(rows), np.bool_)
    limit = float(max_norm) * (1 + 2 * np.finfo(rows.dtype).eps)
    _renorm(rows, limit, float(max_norm), float(norm_type), changed)
    return changed


@kernel
def _renorm(rows, limit, max_norm, norm_type, changed):
    dtype = rows.dtype.type
    for i in range(len(rows)):
        row = rows[i]
        norm = np.float64(dtype(_norm(row, norm_type)))
        if norm > limit:
            factor = dtype(max_norm / (norm + 1e-7))
            for j in range(row.size):
                row[j] *= factor
            changed[i] = True


@helper
def _norm(row, norm_type):
    total = 0.0
    if norm_type == 2.0:
        for j in range(row.size):
            total += np.float64(row[j]) * np.float64(row[j])
        return np.sqrt(total)
    if norm_type == 1.0:
        for j in range(row.size):
            total += abs(np.float64(row[j]))
        return total
    if norm_type == np.inf:
        for j in range(row.size):
            total = max(total, abs(np.float64(row[j])))
        return total
    if norm_type == -np.inf:
        total = np.inf
        for j in range(row.size):
            total = min(total, abs(np.float64(row[j])))
        return total
    if norm_type == 0.0:
        for j in range(row.size):
            total += row[j] != 0
        return total
    for j in range(row.size):
        total += abs(np.float64(row[j])) ** norm_type
    return total ** (1.0 / norm_type)
