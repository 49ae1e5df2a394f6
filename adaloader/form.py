"""Attributes of a tensor that say something of its form, and need none of its values."""

from __future__ import annotations

import inspect
import types

import torch

# Those that are made of values, or are handled by themselves.
_OF_VALUES = {"T", "mT", "H", "mH", "real", "imag", "data", "grad", "_grad"}

QUESTIONS = {
    attribute.__get__
    for name in dir(torch.Tensor)
    if name not in _OF_VALUES
    and isinstance(attribute := inspect.getattr_static(torch.Tensor, name), (types.GetSetDescriptorType, property))
}
"""Their getters, as `__torch_function__` is given them."""
