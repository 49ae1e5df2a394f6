"""Checks that public functions make before a kernel runs, and the one form in which kernels get arrays."""

import numpy as np

from cuda_ops.cpu.kernels import first_outside

_INT64 = np.dtype(np.int64)
_VALUE_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
BFLOAT16 = np.dtype([("bfloat16", np.int16)])
"""What stands for torch.bfloat16 where NumPy has no such dtype: `dispatch.py` views tensors so, and back."""
HALF_DTYPES = (np.dtype(np.float16), BFLOAT16)


def plain_input(array):
    """Return `array` itself if it is contiguous, aligned and writeable, else a copy that is."""
    return array if array.flags.carray else np.array(array, order="C")


def int_vector(array, name):
    """Return an int64 vector in plain form; raise TypeError or ValueError that names the argument."""
    if array.dtype != _INT64:
        raise TypeError(f"{name} must be int64, got {array.dtype}; convert with .astype(np.int64)")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    return plain_input(array)


def float_matrix(array, name, dtype=None):
    """Return a float32 or float64 matrix in plain form; raise TypeError or ValueError that names it."""
    if array.dtype not in _VALUE_DTYPES if dtype is None else array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype or 'float32 or float64'}, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {array.shape}")
    return plain_input(array)


def writable(array, name, dtype, shape):
    """Return `array` if a kernel can write it in place; raise TypeError or ValueError that says why not."""
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not array.flags.carray:
        raise ValueError(f"{name} must be contiguous, aligned and writeable: results are written into it in place")
    return array


def in_range(indices, bound, name):
    """Raise IndexError naming the first of `indices` (plain int64 vector) that is not in [0, bound)."""
    position = first_outside(indices, bound)
    if position >= 0:
        raise IndexError(f"{name}[{position}] is {indices[position]}, which is not in [0, {bound})")


def as_bits(array):
    """View a plain array of halves as int16, as kernels get them; return any other as it is."""
    return array.view(np.int16) if array.dtype in HALF_DTYPES else array


def record_count(words, stride, copied=False):
    """Number of records in the region `words` (`stride` words a record), after checking both.

    Where they are only `copied`, words may be halves.
    """
    if words.dtype not in _VALUE_DTYPES and not (copied and words.dtype in HALF_DTYPES):
        kinds = "float32, float64, float16 or bfloat16" if copied else "float32 or float64"
        raise TypeError(f"words must be {kinds}, got {words.dtype}")
    if words.ndim != 1 or not words.flags.carray:
        raise ValueError("words must be one contiguous, aligned and writeable vector")
    if stride <= 0:
        raise ValueError(f"stride must be a positive number of words, got {stride}")
    return words.size // stride


def word_range(stride, offset, width):
    """Raise ValueError unless words [offset, offset + width) lie inside a record of `stride` words."""
    if offset < 0 or offset + width > stride:
        raise ValueError(f"words [{offset}, {offset + width}) do not lie in a record of {stride} words")
