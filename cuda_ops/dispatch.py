"""Choose the body of a function by where its arrays are.

NumPy arrays go straight to the CPU body. CPU tensors are viewed as NumPy arrays (same memory, no autograd),
and what the body returns is viewed back as tensors. CUDA tensors go to the function of the same name and file in
`cuda_ops/cuda`, which is imported when the first of them comes: a machine without a GPU never loads it. A tensor on any
other device is an error that names the function.
"""

import functools
import importlib

import numpy as np
import torch

from cuda_ops.cpu.checks import BFLOAT16

# Types seen among arguments that are no tensors. A set test over types costs less than looking at every
# argument.
_no_tensors = {np.ndarray, int, float, bool, type(None)}


def by_device(cpu_body):
    """Return `cpu_body` as a function that takes NumPy arrays and torch tensors alike.

    Raises:
        NotImplementedError: an argument is a tensor on a device for which the function has no body.
        ValueError: some arrays are on a CUDA device and some are not.
    """

    @functools.wraps(cpu_body)
    def call(*args, **kwargs):
        if _no_tensors.issuperset(map(type, args)) and _no_tensors.issuperset(map(type, kwargs.values())):
            return cpu_body(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not tensors:
            _no_tensors.update(map(type, (*args, *kwargs.values())))
            return cpu_body(*args, **kwargs)
        name = cpu_body.__name__
        for device_type in {tensor.device.type for tensor in tensors} & BODIES.keys():
            refuse_several_devices(args, kwargs, name)
            return BODIES[device_type](cpu_body)(*args, **kwargs)
        views = [as_array(value, name) for value in args]
        named_views = {key: as_array(value, name) for key, value in kwargs.items()}
        return _as_tensors(cpu_body(*views, **named_views))

    return call


@functools.lru_cache(None)
def cuda_body(cpu_body):
    """Return the CUDA body of a function: that of its name, in the file of its file's name.

    Raises:
        NotImplementedError: there is none.
        ImportError: there are none at all without Numba's CUDA target; says what to install.
    """
    name = cpu_body.__name__
    try:
        module = importlib.import_module("cuda_ops.cuda." + cpu_body.__module__.rpartition(".")[2])
    except Exception as error:  # where numba and numba-cuda do not fit, importing them raises anything
        if not isinstance(error, ModuleNotFoundError) or not str(error.name).startswith("cuda_ops."):
            raise ImportError(
                f"cuda_ops needs Numba's CUDA target for CUDA tensors ({type(error).__name__}: {error}); pip install "
                "--upgrade 'adaloader[cuda]'"
            ) from error
        module = None
    if not hasattr(module, name):
        raise NotImplementedError(f"cuda_ops.{name} has no body for CUDA devices yet; pass CPU tensors")
    return getattr(module, name)


BODIES = {"cuda": cuda_body}
"""By type of device that has bodies of its own: what gives the one that stands for a CPU body."""


def refuse_several_devices(args, kwargs, name):
    """Raise ValueError unless all arrays of a call are tensors of one device."""
    arrays = [value for value in (*args, *kwargs.values()) if isinstance(value, (torch.Tensor, np.ndarray))]
    places = {str(value.device) if isinstance(value, torch.Tensor) else "cpu (NumPy)" for value in arrays}
    if len(places) > 1:
        raise ValueError(f"cuda_ops.{name} got arrays on {', '.join(sorted(places))}; move them to one device")


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
    if value.dtype == torch.bfloat16:  # NumPy has none
        return value.detach().view(torch.int16).numpy().view(BFLOAT16)
    return value.detach().numpy()


def _as_tensors(result):
    if isinstance(result, np.ndarray):
        if result.dtype == BFLOAT16:
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(result)
    if isinstance(result, tuple):
        return tuple(_as_tensors(part) for part in result)
    return result
