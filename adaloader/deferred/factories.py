"""Reading a call that makes a tensor: its shape, dtype and device, and the steps that give its values."""

import operator
from dataclasses import dataclass

import torch

_SHAPE_FIRST = {
    "empty": (),
    "zeros": (("fill", 0.0),),
    "ones": (("fill", 1.0),),
    "rand": (("uniform", 0.0, 1.0),),
    "randn": (("normal", 0.0, 1.0),),
}
_NAMES = {*_SHAPE_FIRST, "full", "normal", "empty_strided"}
METHODS = {"new", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}


@dataclass(frozen=True)
class Factory:
    """A tensor [num_rows, dim] of float32 or float64 that a call asks for, and how its elements start."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    steps: tuple[tuple, ...]


def read_factory(name: str, args: tuple, kwargs: dict) -> Factory | None:
    """Return what the call `name(*args, **kwargs)` makes, or None where it is no table: another shape, dtype
    or kind of call."""
    if name not in _NAMES and name not in METHODS or kwargs.get("out") is not None or kwargs.get("names") is not None:
        return None
    if kwargs.get("layout", torch.strided) not in (torch.strided, None):
        return None
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if name in METHODS:
        dtype, device = args[0].dtype, args[0].device
        args = args[1:]
        if name == "new" and len(args) == 1 and not isinstance(args[0], torch.Size):
            return None  # the legacy constructor takes a list for data
        name = "empty" if name == "new" else name.removeprefix("new_")
    shape, steps = _shape_and_steps(name, args, dict(kwargs))
    dtype = kwargs.get("dtype") or dtype
    device = torch.device(device if kwargs.get("device") is None else kwargs["device"])
    if shape is None or dtype not in (torch.float32, torch.float64) or device.type == "meta":
        return None
    return Factory(shape, dtype, device, bool(kwargs.get("requires_grad")), steps)


def _shape_and_steps(name: str, args: tuple, kwargs: dict):
    """Return (shape, steps), shape None where the call makes something else than a table."""
    if name == "normal":
        mean, std, size = _bind(("mean", "std", "size"), args, kwargs)
        if size is None or isinstance(mean, torch.Tensor) or isinstance(std, torch.Tensor):
            return None, ()
        mean, std = (0.0 if mean is None else mean), (1.0 if std is None else std)
        return _two_dimensions(size), (("normal", mean, std),)
    if name == "full":
        size, value = _bind(("size", "fill_value"), args, kwargs)
        if not isinstance(value, float) and kwargs.get("dtype") is None:
            return None, ()  # the dtype would follow the value: an integer, a boolean, a tensor
        return _two_dimensions(size), (("fill", value),)
    if name == "empty_strided":
        size, stride = _bind(("size", "stride"), args, kwargs)
        shape = _two_dimensions(size)
        return (shape if shape and tuple(stride) == (shape[1], 1) else None), ()
    size = kwargs.get("size", args[0] if len(args) == 1 else args)
    return _two_dimensions(size), _SHAPE_FIRST[name]


def _bind(names, args, kwargs):
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _two_dimensions(size) -> tuple[int, int] | None:
    if isinstance(size, torch.Tensor) or not hasattr(size, "__len__") or len(size) != 2:
        return None
    try:
        return operator.index(size[0]), operator.index(size[1])
    except TypeError:
        return None  # PyTorch says what is wrong with it
