"""SGD with momentum or weight decay on records in device memory; see cuda_ops/cpu/momentum.py.

The steps of a row, and the test of when they may be cut short, are the CPU's own functions, compiled for the device and
given the words of one lane.
"""

from __future__ import annotations

import functools

from numba import cuda

from cuda_ops.cpu import momentum as host
from cuda_ops.cpu.gaps import LOOK_EVERY
from cuda_ops.cuda.gaps import (
    bound_at,
    factor_between,
    linear_part_is_over,
    next_look,
    regime_end,
    scale_by,
    state_step,
    value_step,
    word_of,
)
from cuda_ops.cuda.launch import helper_from, kernel
from cuda_ops.cuda.meeting import row_any
from cuda_ops.cuda.numpy_names import larger, smaller
from cuda_ops.cuda.words import move

_BUFFER_LOG = host._BUFFER_LOG
_step = helper_from(host._step)
_decay = helper_from(host._decay, _step=_step, bound_at=bound_at, scale_by=scale_by, factor_between=factor_between)
_is_over = helper_from(host._is_over, linear_part_is_over=linear_part_is_over, bound_at=bound_at)


@functools.lru_cache(None)
def decayer(kind: type, wide: int):
    """Return the kernel of SGD without a buffer, for words of a NumPy scalar type, `wide` at a time."""

    @kernel
    def advance_decay(
        words, longs, slots, grad, history, bounds, stride, dim, record_longs, stepping, scale, version, whole
    ):
        value = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        buffer = row[:0]
        lane, lanes = cuda.threadIdx.x, cuda.blockDim.x
        stop = history.shape[0] - stepping
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, slots.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            begin = slots[i] * stride
            last = (slots[i] + 1) * record_longs - 1
            at, caught = state_step(longs[last - 1]), value_step(longs[last - 1])
            for j in range(lane * wide, dim, lanes * wide):
                move(value, 0, words, begin + j, wide)
                if at < stop:
                    for k in range(wide):
                        row[k] = 0
                    _decay(value, buffer, row, history, at, stop, bounds)
                if stepping:
                    move(row, 0, grad, i * dim + j, wide)
                    _step(value, buffer, row, scale, history, stop, stop + 1)
                move(words, begin + j, value, 0, wide)
            if at < stop:
                at = stop
            if stepping:
                at = caught = stop + 1
            row_any(False, lane, cuda.threadIdx.y, lanes)  # all lanes have read the record's word
            if lane == 0:
                longs[last - 1] = word_of(at, larger(at, caught))
                if stepping:
                    longs[last] = version

    return advance_decay


@functools.lru_cache(None)
def advancer(kind: type, wide: int):
    """Return the kernel of SGD with a buffer, for words of a NumPy scalar type, `wide` at a time."""

    @kernel
    def advance_momentum(
        words, longs, slots, grad, history, bounds, stride, dim, record_longs, stepping, scale, version, whole
    ):
        value = cuda.local.array(wide, kind)
        buffer = cuda.local.array(wide, kind)
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
                        of_buffer = words[begin + dim + j : begin + dim + j + wide]
                        if not _is_over(of_value, of_buffer, history, at, bounds):
                            going_on = True
                            break
                    going_on = row_any(going_on, lane, cuda.threadIdx.y, lanes)
                if going_on:
                    until = smaller(next_look(at), stop)
                    for k in range(wide):
                        row[k] = 0
                    for j in range(lane * wide, dim, lanes * wide):
                        move(value, 0, words, begin + j, wide)
                        move(buffer, 0, words, begin + dim + j, wide)
                        _step(value, buffer, row, kind(0), history, at, until)
                        move(words, begin + j, value, 0, wide)
                        move(words, begin + dim + j, buffer, 0, wide)
                    at = until
                else:
                    caught = regime_end(history, at, stop)
                    if caught == stop and not whole:
                        break
                    factor = factor_between(history, _BUFFER_LOG, at, caught)
                    for j in range(lane * wide, dim, lanes * wide):
                        move(buffer, 0, words, begin + dim + j, wide)
                        scale_by(buffer, factor)
                        move(words, begin + dim + j, buffer, 0, wide)
                    at = caught
            if stepping:
                for j in range(lane * wide, dim, lanes * wide):
                    move(value, 0, words, begin + j, wide)
                    move(buffer, 0, words, begin + dim + j, wide)
                    move(row, 0, grad, i * dim + j, wide)
                    _step(value, buffer, row, scale, history, stop, stop + 1)
                    move(words, begin + j, value, 0, wide)
                    move(words, begin + dim + j, buffer, 0, wide)
                at = caught = stop + 1
            row_any(False, lane, cuda.threadIdx.y, lanes)  # all lanes have read the record's word
            if lane == 0:
                longs[last - 1] = word_of(at, larger(at, caught))
                if stepping:
                    longs[last] = version

    return advance_momentum
