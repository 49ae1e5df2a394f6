"""RMSprop, Adadelta, and Adagrad with weight decay on records in device memory; see cuda_ops/cpu/root_mean_square.py.

The steps of a row, and the test of when they may be cut short, are the CPU's own functions, compiled for the device and
given the words of one lane.
"""

from __future__ import annotations

import functools

from numba import cuda

from cuda_ops.cpu import root_mean_square as host
from cuda_ops.cuda.gaps import (
    all_zero,
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

_step = helper_from(
    host._step,
    _rmsprop=helper_from(host._rmsprop),
    _adadelta=helper_from(host._adadelta),
    _adagrad=helper_from(host._adagrad),
)
_is_over = helper_from(host._is_over, bound_at=bound_at, linear_part_is_over=linear_part_is_over, all_zero=all_zero)
_skip = helper_from(host._skip, factor_between=factor_between, scale_by=scale_by)


@functools.lru_cache(None)
def advancer(optimizer: int, has_second: bool, has_third: bool, kind: type, wide: int):
    """Return the kernel of one of these optimizers, for words of a NumPy scalar type, `wide` at a time.

    Args:
        optimizer: RMSPROP, ADADELTA or ADAGRAD of the CPU's file.
        has_second, has_third: whether there is a buffer (Adadelta: the average of deltas); an average of gradients.
    """
    second_words, third_words = wide * has_second, wide * has_third

    @kernel
    def advance_root_mean_square(
        words, longs, slots, grad, history, bounds, stride, dim, record_longs, stepping, scale, version, whole
    ):
        value = cuda.local.array(wide, kind)
        squares = cuda.local.array(wide, kind)
        room_2 = cuda.local.array(wide, kind)
        room_3 = cuda.local.array(wide, kind)
        row = cuda.local.array(wide, kind)
        second, third = room_2[:second_words], room_3[:third_words]
        lane, lanes = cuda.threadIdx.x, cuda.blockDim.x
        stop = history.shape[0] - stepping
        for i in range(
            cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, slots.size, cuda.gridDim.x * cuda.blockDim.y
        ):
            begin = slots[i] * stride
            second_at = begin + 2 * dim
            third_at = second_at + dim * has_second
            last = (slots[i] + 1) * record_longs - 1
            at, caught = state_step(longs[last - 1]), value_step(longs[last - 1])
            while at < stop:
                going_on = caught <= at
                if going_on:
                    going_on = False
                    for j in range(lane * wide, dim, lanes * wide):
                        of_value = words[begin + j : begin + j + wide]
                        of_second = words[second_at + j : second_at + j + second_words]
                        if not _is_over(optimizer, of_value, of_second, history, at, bounds):
                            going_on = True
                            break
                    going_on = row_any(going_on, lane, cuda.threadIdx.y, lanes)
                if going_on:
                    until = smaller(next_look(at), stop)
                    for k in range(wide):
                        row[k] = 0
                else:
                    until = regime_end(history, at, stop)
                    caught = until
                    if caught == stop and not whole:
                        break
                for j in range(lane * wide, dim, lanes * wide):
                    move(value, 0, words, begin + j, wide)
                    move(squares, 0, words, begin + dim + j, wide)
                    if has_second:
                        move(room_2, 0, words, second_at + j, wide)
                    if has_third:
                        move(room_3, 0, words, third_at + j, wide)
                    if going_on:
                        _step(optimizer, value, squares, second, third, row, kind(0), history, at, until)
                        move(words, begin + j, value, 0, wide)
                    else:
                        _skip(optimizer, squares, second, third, history, at, until)
                    move(words, begin + dim + j, squares, 0, wide)
                    if has_second:
                        move(words, second_at + j, room_2, 0, wide)
                    if has_third:
                        move(words, third_at + j, room_3, 0, wide)
                at = until
            if stepping:
                for j in range(lane * wide, dim, lanes * wide):
                    move(value, 0, words, begin + j, wide)
                    move(squares, 0, words, begin + dim + j, wide)
                    if has_second:
                        move(room_2, 0, words, second_at + j, wide)
                    if has_third:
                        move(room_3, 0, words, third_at + j, wide)
                    move(row, 0, grad, i * dim + j, wide)
                    _step(optimizer, value, squares, second, third, row, scale, history, stop, stop + 1)
                    move(words, begin + j, value, 0, wide)
                    move(words, begin + dim + j, squares, 0, wide)
                    if has_second:
                        move(words, second_at + j, room_2, 0, wide)
                    if has_third:
                        move(words, third_at + j, room_3, 0, wide)
                at = caught = stop + 1
            row_any(False, lane, cuda.threadIdx.y, lanes)  # all lanes have read the record's word
            if lane == 0:
                longs[last - 1] = word_of(at, larger(at, caught))
                if stepping:
                    longs[last] = version

    return advance_root_mean_square
