"""What functions of the CPU use as `np.name`, in the form that Numba's CUDA compiler takes on scalars.

`launch.helper_from` puts this module in NumPy's place.
"""

from math import exp, sqrt

from numpy import float32, float64, inf, int16, int32, int64, uint16, uint32, uint64

__all__ = ["exp", "float32", "float64", "inf", "int16", "int32", "int64", "sqrt", "uint16", "uint32", "uint64"]
