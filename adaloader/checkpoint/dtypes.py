"""The dtypes of the safetensors format by their names there, in NumPy and in PyTorch."""

from __future__ import annotations

import numpy as np
import torch

NUMPY_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
BY_NAME = {name: getattr(torch, of) for name, of in _TORCH_NAMES.items() if hasattr(torch, of)}
TORCH_DTYPES = {dtype: name for name, dtype in BY_NAME.items()}
_NAMES_OF_NUMPY = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def dtype_name(tensor: np.ndarray | torch.Tensor) -> str:
    """Return the format's name of an array's or tensor's dtype."""
    return TORCH_DTYPES[tensor.dtype] if isinstance(tensor, torch.Tensor) else _NAMES_OF_NUMPY[tensor.dtype]


def item_bytes(name: str) -> int:
    """Return the bytes of one element of the dtype that the format calls `name`."""
    return BY_NAME[name].itemsize


def as_bytes(tensor: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return the elements in order as uint8 `[bytes]`, without a copy where they lie so."""
    if isinstance(tensor, torch.Tensor):
        return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
