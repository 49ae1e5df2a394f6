"""Checks that public functions make before a kernel runs. The messages are those of `cuda_ops/cpu/checks.py`."""

from __future__ import annotations

import torch

from cuda_ops.trust import is_trusted

_VALUE_DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype as NumPy has it."""
    return str(dtype).removeprefix("torch.")


def int_vector(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a contiguous int64 vector; raise TypeError or ValueError that names the argument."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {name_of(tensor.dtype)}; convert with .to(torch.int64)")
    if tensor.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(tensor.shape)}")
    return tensor.contiguous()


def float_matrix(tensor: torch.Tensor, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a contiguous float32 or float64 matrix; raise TypeError or ValueError that names it."""
    if tensor.dtype not in _VALUE_DTYPES if dtype is None else tensor.dtype != dtype:
        wanted = "float32 or float64" if dtype is None else name_of(dtype)
        raise TypeError(f"{name} must be {wanted}, got {name_of(tensor.dtype)}")
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(tensor.shape)}")
    return tensor.contiguous()


def writable(tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return `tensor` if a kernel can write it in place; raise TypeError or ValueError that says why not."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {name_of(dtype)}, got {name_of(tensor.dtype)}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, aligned and writeable: results are written into it in place")
    return tensor


def in_range(indices: torch.Tensor, bound: int, name: str) -> None:
    """Raise IndexError naming the first of `indices` (int64 vector) that is not in [0, bound)."""
    if is_trusted() or not indices.numel():
        return
    outside = (indices < 0) | (indices >= bound)
    if outside.any():
        position = int(outside.to(torch.uint8).argmax())
        raise IndexError(f"{name}[{position}] is {int(indices[position])}, which is not in [0, {bound})")


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor of halves as int16, as kernels get them; return any other as it is."""
    return tensor.view(torch.int16) if tensor.dtype in HALF_DTYPES else tensor


def record_count(words: torch.Tensor, stride: int, copied: bool = False) -> int:
    """Number of records in the region `words` (`stride` words a record), after checking both.

    Where they are only `copied`, words may be halves.
    """
    if words.dtype not in _VALUE_DTYPES and not (copied and words.dtype in HALF_DTYPES):
        kinds = "float32, float64, float16 or bfloat16" if copied else "float32 or float64"
        raise TypeError(f"words must be {kinds}, got {name_of(words.dtype)}")
    if words.ndim != 1 or not words.is_contiguous():
        raise ValueError("words must be one contiguous, aligned and writeable vector")
    if stride <= 0:
        raise ValueError(f"stride must be a positive number of words, got {stride}")
    return words.numel() // stride


def word_range(stride: int, offset: int, width: int) -> None:
    """Raise ValueError unless words [offset, offset + width) lie inside a record of `stride` words."""
    if offset < 0 or offset + width > stride:
        raise ValueError(f"words [{offset}, {offset + width}) do not lie in a record of {stride} words")
