"""Functions of PyTorch as `__torch_function__` is given them, whatever other libraries have put in their places, and
their names."""

from __future__ import annotations

from collections.abc import Callable

import torch


def native(name: str) -> Callable:
    """Return PyTorch's own `torch.<name>`. To go by what has that name now would be wrong where a library has replaced
    it by a function that calls it, as torch_geometric does with `index_select`.
    """
    here = getattr(torch, name)
    if f"{getattr(here, '__module__', None) or 'torch'}.".startswith("torch."):
        return here
    return getattr(torch._C._VariableFunctions, name)


def operation_name(func) -> str:
    """Return the name of what `__torch_function__` was asked for: `mul_`, `size`, `init.uniform_`."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return f"{func.__self__.__name__}.{name}"
    return f"init.{name}" if getattr(func, "__module__", None) == "torch.nn.init" else name
