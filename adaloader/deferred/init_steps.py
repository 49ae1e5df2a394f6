"""What PyTorch's functions do to a tensor, as steps of an initialisation program.

Each function here takes the arguments that PyTorch's takes after the tensor, and returns a list of steps
(kind, arguments...) for `InitProgram.then`. What no step can express raises `Irreproducible`, with the
reason.
"""

import math

import torch

from adaloader.deferred.init_program import Irreproducible


def scalar(value) -> float:
    """Return a number, or a tensor of no dimensions, as a float."""
    if isinstance(value, torch.Tensor):
        if value.ndim or value.requires_grad:
            raise Irreproducible("an operand is a tensor; only a number is the same for every row")
        value = value.item()
    if isinstance(value, complex) or not hasattr(value, "__float__"):
        raise Irreproducible(f"an operand is {value!r}; only a real number will do")
    return float(value)


def _normal(mean=0.0, std=1.0, generator=None):
    return [("normal", scalar(mean), scalar(std))]


def _uniform(low=0.0, high=1.0, generator=None, **bounds):
    return [("uniform", scalar(bounds.get("from", low)), scalar(bounds.get("to", high)))]


def _fill(value):
    return [("fill", scalar(value))]


def _zero():
    return [("fill", 0.0)]


def _mul(other):
    return [("mul", scalar(other))]


def _div(other, rounding_mode=None):
    if rounding_mode is not None:
        raise Irreproducible(f"rounding_mode={rounding_mode!r}")
    return [("div", scalar(other))]


def _add(other, alpha=1):
    return [("add", scalar(alpha) * scalar(other))]


def _sub(other, alpha=1):
    return [("add", -scalar(alpha) * scalar(other))]


def _rsub(other, alpha=1):
    return [("mul", -scalar(alpha)), ("add", scalar(other))]


def _neg():
    return [("mul", -1.0)]


def _clamp(min=None, max=None):
    return [("clamp", -math.inf if min is None else scalar(min), math.inf if max is None else scalar(max))]


def _erfinv():
    return [("erfinv",)]


_ARITHMETIC = {
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    "divide": _div,
    "true_divide": _div,
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "neg": _neg,
    "negative": _neg,
    "clamp": _clamp,
    "clip": _clamp,
    "erfinv": _erfinv,
}
_OPERATORS = {"mul": _mul, "truediv": _div, "div": _div, "add": _add, "sub": _sub}

# Functions by the name that __torch_function__ sees.
IN_PLACE = {
    "normal_": _normal,
    "uniform_": _uniform,
    "fill_": _fill,
    "zero_": _zero,
    **{f"{name}_": steps for name, steps in _ARITHMETIC.items()},
    **{f"__i{name}__": steps for name, steps in _OPERATORS.items()},
}
OUT_OF_PLACE = {
    **_ARITHMETIC,
    **{f"__{name}__": steps for name, steps in _OPERATORS.items()},
    "__rmul__": _mul,
    "__radd__": _add,
    "__rsub__": _rsub,
    "rsub": _rsub,
    "__neg__": _neg,
}


def _init_normal(shape, mean=0.0, std=1.0, generator=None):
    """Steps of `nn.init.normal_`, one of the four that PyTorch shows whole to tensor subclasses. So are those
    below."""
    return _normal(mean, std)


def _init_uniform(shape, a=0.0, b=1.0, generator=None):
    """Steps of `nn.init.uniform_`."""
    return _uniform(a, b)


def _init_constant(shape, val):
    """Steps of `nn.init.constant_`."""
    return _fill(val)


def _init_kaiming_uniform(shape, a=0, mode="fan_in", nonlinearity="leaky_relu", generator=None):
    """Steps of `nn.init.kaiming_uniform_` (He, Zhang, Ren and Sun 2015): uniform within sqrt(3) standard
    deviations."""
    mode = mode.lower()
    if len(shape) != 2 or mode not in ("fan_in", "fan_out"):
        raise ValueError(f"kaiming_uniform_ needs 2 dimensions and mode fan_in or fan_out, got {list(shape)}, {mode!r}")
    fan = shape[1] if mode == "fan_in" else shape[0]
    bound = math.sqrt(3.0) * torch.nn.init.calculate_gain(nonlinearity, a) / math.sqrt(fan)
    return _uniform(-bound, bound)


def _init_trunc_normal(shape, mean=0.0, std=1.0, a=-2.0, b=2.0, generator=None):
    """Steps of `nn.init.trunc_normal_`, which PyTorch does not show: see
    `deferred_operations.show_trunc_normal`."""
    return [("trunc_normal", scalar(mean), scalar(std), scalar(a), scalar(b))]


NN_INIT = {
    "init.normal_": _init_normal,
    "init.uniform_": _init_uniform,
    "init.constant_": _init_constant,
    "init.kaiming_uniform_": _init_kaiming_uniform,
    "init.trunc_normal_": _init_trunc_normal,
}
