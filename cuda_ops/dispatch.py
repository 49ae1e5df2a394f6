"""Choose the body of a function by where its arrays are.

NumPy arrays go straight to the CPU body. CPU tensors are viewed as NumPy arrays (same memory, no autograd),
and what the body returns is viewed back as tensors. A tensor on any other device is an error that names the
function.
"""

import functools

import numpy as np
import torch

# Types seen among arguments that are no tensors. A set test over types costs less than looking at every
# argument.
_no_tensors = {np.ndarray, int, float, bool, type(None)}


def by_device(cpu_body):
    """Return `cpu_body` as a function that takes NumPy arrays and torch tensors alike.

    Raises:
        NotImplementedError: an argument is a tensor on a device for which the function has no body.
    """

    @functools.wraps(cpu_body)
    def call(*args, **kwargs):
        if _no_tensors.issuperset(map(type, args)) and _no_tensors.issuperset(map(type, kwargs.values())):
            return cpu_body(*args, **kwargs)
        if not any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            _no_tensors.update(map(type, (*args, *kwargs.values())))
            return cpu_body(*args, **kwargs)
        name = cpu_body.__name__
        views = [as_array(value, name) for value in args]
        named_views = {key: as_array(value, name) for key, value in kwargs.items()}
        return _as_tensors(cpu_body(*views, **named_views))

    return call


def as_array(value, function_name):
    """View a CPU tensor as a NumPy array of the same memory; return anything else as it is.

    Raises:
        NotImplementedError: `value` is a tensor on another device; the message names the function.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type != "cpu":
        raise NotImplementedError(
            f"cuda_ops.{function_name} has no body for device {value.device} yet; pass CPU tensors"
        )
    return value.detach().numpy()


def _as_tensors(result):
    if isinstance(result, np.ndarray):
        return torch.from_numpy(result)
    if isinstance(result, tuple):
        return tuple(_as_tensors(part) for part in result)
    return result
