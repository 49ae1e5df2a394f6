"""What a call of `to`, `float`, `cpu` or a relative asks for: tables and their gradients stay as and where they are."""

from __future__ import annotations

import torch

from adaloader.errors import ManagedTableError


def check_stays(name: str, dtype: torch.dtype, at: torch.device, args: tuple, kwargs: dict) -> None:
    """Raise ManagedTableError if `to(*args, **kwargs)` would change the `dtype` or the device `at` of table `name`."""
    with torch._C.DisableTorchFunctionSubclass():
        device, wanted, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    moves = device is not None and (device.type != at.type or device.index not in (None, at.index))
    if (wanted or dtype) != dtype or moves:
        raise ManagedTableError(
            f"table {name!r} is {dtype} on {at} and stays there; convert the model to {wanted or dtype} on "
            f"{device or at} before the loader is built"
        )


METHODS: dict[object, dict[str, object]] = {
    torch.Tensor.cpu: {"device": "cpu"},
    torch.Tensor.cuda: {"device": "cuda"},
    torch.Tensor.float: {"dtype": torch.float32},
    torch.Tensor.double: {"dtype": torch.float64},
    torch.Tensor.half: {"dtype": torch.float16},
    torch.Tensor.bfloat16: {"dtype": torch.bfloat16},
}
"""The methods that are `to` under another name, and what they ask for."""
