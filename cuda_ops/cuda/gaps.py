"""What the kernels that catch rows up share; the source of cuda_ops/cpu/gaps.py, compiled for the device.

There a function gets a whole row, here the few words of it that a lane holds: what is asked of all words of a row
is put to the vote of its lanes (meeting.py).
"""

from __future__ import annotations

import numpy as np

from cuda_ops.cpu import gaps as host
from cuda_ops.cuda.launch import helper, helper_from

next_look = helper_from(host.next_look)
state_step = helper_from(host.state_step)
value_step = helper_from(host.value_step)
word_of = helper_from(host.word_of)
bound_at = helper_from(host.bound_at)
regime_end = helper_from(host.regime_end)
factor_between = helper_from(host.factor_between)
scale_by = helper_from(host.scale_by)
decay_value = helper_from(host.decay_value, factor_between=factor_between, scale_by=scale_by)
all_zero = helper_from(host.all_zero)

_ROUNDING_32 = 0.125 * float(np.finfo(np.float32).eps)
_ROUNDING_64 = 0.125 * float(np.finfo(np.float64).eps)


@helper
def rounding(value):
    """As the host's; Numba's CUDA target has no `finfo`."""
    return _ROUNDING_32 if value.itemsize == 4 else _ROUNDING_64


linear_part_is_over = helper_from(host.linear_part_is_over, bound_at=bound_at, all_zero=all_zero, rounding=rounding)
