"""What functions of the CPU use as `np.name`, `min` and `max`, in the form that Numba's CUDA compilers take on scalars.

`launch.helper_from` puts these in the places of NumPy and of Python's own functions, which Numba 0.68 gives tuples of
arguments that its own CUDA target does not take.
"""

from math import exp, sqrt

from numba import cuda
from numpy import float32, float64, inf, int16, int32, int64, uint16, uint32, uint64

__all__ = [
    "exp",
    "float32",
    "float64",
    "inf",
    "int16",
    "int32",
    "int64",
    "larger",
    "smaller",
    "sqrt",
    "uint16",
    "uint32",
    "uint64",
]


@cuda.jit(device=True)
def larger(one, other):
    """`max(one, other)`: the first, unless the other is larger."""
    return other if other > one else one


@cuda.jit(device=True)
def smaller(one, other):
    """`min(one, other)`: the first, unless the other is smaller."""
    return other if other < one else one
