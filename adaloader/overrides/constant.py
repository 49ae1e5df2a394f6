"""Tensors that have a shape and no memory: what stands for a table in PyTorch's eyes."""

from __future__ import annotations

import torch


def constant_tensor(shape, value, *, dtype, device, requires_grad=False) -> torch.Tensor:
    """Return a plain tensor of any shape whose elements are all one element in memory (every stride is 0)."""
    with torch._C.DisableTorchFunction():  # no mode, of ours or the user's, has a say in it
        element = torch.full((1,) * len(shape), value, dtype=dtype, device=device)
        return element.expand(shape).requires_grad_(requires_grad)
