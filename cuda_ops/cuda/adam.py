"""Adam, AdamW, AMSGrad, NAdam, RAdam and Adamax on records in device memory; see cuda_ops/cpu/adam.py.

The steps of a row, and the tests of when they may be cut short, are the CPU's own functions, compiled for the device
and given the words of one lane.
"""

from __future__ import annotations

import functools

from numba import cuda

from cuda_ops.cpu import adam as host
from cuda_ops.cpu import adam_steps
from cuda_ops.cpu.adam_steps import AMSGRAD, VALUE_FACTOR
from cuda_ops.cpu.gaps import LOOK_EVERY
from cuda_ops.cuda.gaps import (
    bound_at,
    decay_value,
    factor_between,
    next_look,
    regime_end,
    rounding,
    scale_by,
    state_step,
    value_step,
    word_of,
)
from cuda_ops.cuda.launch import helper_from, kernel
from cuda_ops.cuda.meeting import row_any
from cuda_ops.cuda.numpy_names import larger, smaller
from cuda_ops.cuda.words import move

_VALUE_LOG = host._VALUE_LOG
_moment = helper_from(adam_steps.first_moment)
_steps_of = {
    name: helper_from(getattr(adam_steps, name), first_moment=_moment) for name in ("adam", "nadam", "radam", "adamax")
}
_step = helper_from(host._step, **_steps_of)
_is_over = helper_from(host._is_over, bound_at=bound_at, rounding=rounding)
_skip = helper_from(host._skip, factor_between=factor_between, scale_by=scale_by)


@functools.lru_cache(None)
def advancer(optimizer: int, kind: type, wide: int):
    """Return the kernel of one of adam_steps' optimizers, for words of a NumPy scalar type, `wide` at a time."""
    largest_at = 3 if optimizer == AMSGRAD else 2  # the largest second moment, or the second moment itself

    @kernel
    def advance_adam(
        words, longs, slots, grad, history, bounds, stride, dim, record_longs, stepping, scale, version, whole
    ):
        value = cuda.local.array(wide, kind)
        m = cuda.local.array(wide, kind)
        v = cuda.local.array(wide, kind)
        largest = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        lane, lanes = cuda.threadIdx.x, cuda.blockDim.x
        stop = history.shape[0] - stepping
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, slots.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            begin = slots[i] * stride
            last = (slots[i] + 1) * record_longs - 1
            at, caught = state_step(longs[last - 1]), value_step(longs[last - 1])
            while at < stop:
                going_on = caught <= at
                if going_on and at % LOOK_EVERY == 0:
                    going_on = False
                    for j in range(lane * wide, dim, lanes * wide):
                        of_value = words[begin + j : begin + j + wide]
                        of_m = words[begin + dim + j : begin + dim + j + wide]
                        of_largest = words[begin + largest_at * dim + j : begin + largest_at * dim + j + wide]
                        if not _is_over(optimizer, of_value, of_m, of_largest, history, at, bounds):
                            going_on = True
                            break
                    going_on = row_any(going_on, lane, cuda.threadIdx.y, lanes)
                if going_on:
                    until = smaller(next_look(at), stop)
                    for k in range(wide):
                        row[k] = 0
                    for j in range(lane * wide, dim, lanes * wide):
                        move(value, 0, words, begin + j, wide)
                        move(m, 0, words, begin + dim + j, wide)
                        move(v, 0, words, begin + 2 * dim + j, wide)
                        move(largest, 0, words, begin + largest_at * dim + j, wide)
                        _step(optimizer, value, m, v, largest, row, kind(0), history, at, until)
                        move(words, begin + j, value, 0, wide)
                        move(words, begin + dim + j, m, 0, wide)
                        move(words, begin + 2 * dim + j, v, 0, wide)
                        if optimizer == AMSGRAD:
                            move(words, begin + 3 * dim + j, largest, 0, wide)
                    at = until
                else:
                    end = regime_end(history, at, stop)
                    start = larger(at, caught)
                    for j in range(lane * wide, dim, lanes * wide):
                        if start < end:
                            move(value, 0, words, begin + j, wide)
                            decay_value(value, history, VALUE_FACTOR, _VALUE_LOG, start, end)
                            move(words, begin + j, value, 0, wide)
                        if end < stop or whole:
                            move(m, 0, words, begin + dim + j, wide)
                            move(v, 0, words, begin + 2 * dim + j, wide)
                            _skip(optimizer, value, m, v, history, at, end)
                            move(words, begin + dim + j, m, 0, wide)
                            move(words, begin + 2 * dim + j, v, 0, wide)
                    caught = end
                    if caught == stop and not whole:
                        break
                    at = caught
            if stepping:
                for j in range(lane * wide, dim, lanes * wide):
                    move(value, 0, words, begin + j, wide)
                    move(m, 0, words, begin + dim + j, wide)
                    move(v, 0, words, begin + 2 * dim + j, wide)
                    move(largest, 0, words, begin + largest_at * dim + j, wide)
                    move(row, 0, grad, i * dim + j, wide)
                    _step(optimizer, value, m, v, largest, row, scale, history, stop, stop + 1)
                    move(words, begin + j, value, 0, wide)
                    move(words, begin + dim + j, m, 0, wide)
                    move(words, begin + 2 * dim + j, v, 0, wide)
                    if optimizer == AMSGRAD:
                        move(words, begin + 3 * dim + j, largest, 0, wide)
                at = caught = stop + 1
            row_any(False, lane, cuda.threadIdx.y, lanes)  # all lanes have read the record's word
            if lane == 0:
                longs[last - 1] = word_of(at, larger(at, caught))
                if stepping:
                    longs[last] = version

    return advance_adam
