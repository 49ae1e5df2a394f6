"""Functions of tensors that ask for their form alone (shape, dtype, device ...), which need no value."""

from __future__ import annotations

import inspect
import types

import torch

from adaloader.overrides.native import native

# Attributes that are made of values, or are handled by themselves; all others are questions about a tensor's form.
_OF_VALUES = {"T", "mT", "H", "mH", "real", "imag", "data", "grad", "_grad"}
_ATTRIBUTES = [
    attribute
    for name in dir(torch.Tensor)
    if name not in _OF_VALUES
    and isinstance(attribute := inspect.getattr_static(torch.Tensor, name), (types.GetSetDescriptorType, property))
]
_METHODS = """size dim ndimension numel nelement stride storage_offset is_floating_point is_complex is_contiguous
element_size get_device is_signed is_conj is_neg is_inference is_same_size __len__ new_zeros new_ones new_full new_empty
new_tensor is_shared data_ptr untyped_storage _is_view""".split()
_FUNCTIONS = """is_floating_point is_complex numel is_same_size result_type is_conj is_neg is_signed is_inference
_has_compatible_shallow_copy_type rand_like randn_like randint_like""".split()

FORM = (
    {attribute.__get__ for attribute in _ATTRIBUTES}
    | {getattr(torch.Tensor, name) for name in _METHODS if hasattr(torch.Tensor, name)}
    | {native(name) for name in _FUNCTIONS if hasattr(torch, name)}
)
"""What `__torch_function__` is given for them."""
