"""RMSprop, Adadelta, and Adagrad with weight decay on records, rows that a step did not touch included (see gaps.py).

RMSprop: Tieleman, Hinton 2012 (centered: Graves 2013); Adadelta: Zeiler 2012; Adagrad: Duchi, Hazan, Singer 2011.
Columns of the history: lr (Adagrad: after its decay), the average's factor (alpha, rho; else 1), 1 - that, eps,
weight decay, momentum; running sums for RMSprop's buffer, the averages of squares, and of gradients.
"""

import numpy as np

from cuda_ops.cpu.gaps import (
    LEAST_EPS,
    LOGS,
    LOOK_EVERY,
    MOST_DECAY,
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
from cuda_ops.cpu.kernels import ROWS_AHEAD, fused_kernel, inlined, part, touch_all, unowned

LR, KEPT, WEIGHT, EPS, WEIGHT_DECAY, MOMENTUM = range(6)
COLUMNS = 6 + LOGS + 1
_BUFFER_LOG, _SQUARES_LOG, _AVERAGE_LOG = 7, 8, 9
RMSPROP, ADADELTA, ADAGRAD = range(3)


@inlined
def _rmsprop(value, squares, buffer, average, grad, scale, history, start, stop):
    """`buffer` and `average` are empty where the optimizer has none."""
    dtype = value.dtype.type
    for at in range(start, stop):
        minus_lr, alpha, weight = dtype(-history[at, LR]), dtype(history[at, KEPT]), dtype(history[at, WEIGHT])
        eps, decay, momentum = dtype(history[at, EPS]), dtype(history[at, WEIGHT_DECAY]), dtype(history[at, MOMENTUM])
        rest = dtype(1) - weight
        has_buffer = buffer.size > 0 and history[at, MOMENTUM] > 0
        for j in range(value.size):
            g = scale * grad[j]
            if decay != 0:
                g += decay * value[j]
            square = squares[j] * alpha + weight * g * g
            squares[j] = square
            if average.size:
                mean = average[j]
                mean = mean + weight * (g - mean) if weight < 0.5 else g - (g - mean) * rest
                average[j] = mean
                square = square - mean * mean
            root = np.sqrt(square) + eps
            if has_buffer:
                b = buffer[j] * momentum + g / root
                buffer[j] = b
                value[j] += minus_lr * b
            else:
                value[j] += minus_lr * g / root


@inlined
def _adadelta(value, squares, deltas, grad, scale, history, start, stop):
    dtype = value.dtype.type
    for at in range(start, stop):
        minus_lr, rho, weight = dtype(-history[at, LR]), dtype(history[at, KEPT]), dtype(history[at, WEIGHT])
        eps, decay = dtype(history[at, EPS]), dtype(history[at, WEIGHT_DECAY])
        for j in range(value.size):
            g = scale * grad[j]
            if decay != 0:
                g += decay * value[j]
            square = squares[j] * rho + weight * g * g
            squares[j] = square
            delta = np.sqrt(deltas[j] + eps) / np.sqrt(square + eps) * g
            deltas[j] = deltas[j] * rho + weight * delta * delta
            value[j] += minus_lr * delta


@inlined
def _adagrad(value, total, grad, scale, history, start, stop):
    dtype = value.dtype.type
    for at in range(start, stop):
        minus_lr, eps, decay = dtype(-history[at, LR]), dtype(history[at, EPS]), dtype(history[at, WEIGHT_DECAY])
        for j in range(value.size):
            g = scale * grad[j]
            if decay != 0:
                g += decay * value[j]
            square = total[j] + g * g
            total[j] = square
            value[j] += minus_lr * g / (np.sqrt(square) + eps)


@inlined
def _step(kind, value, squares, second, third, grad, scale, history, start, stop):
    if kind == RMSPROP:
        _rmsprop(value, squares, second, third, grad, scale, history, start, stop)
    elif kind == ADADELTA:
        _adadelta(value, squares, second, grad, scale, history, start, stop)
    else:
        _adagrad(value, squares, grad, scale, history, start, stop)


@inlined
def _is_over(kind, value, buffer, history, at, bounds):
    """Whether no later step can move a value: without gradient only momentum and weight decay do."""
    if bound_at(history, bounds, at, LEAST_EPS) == 0:  # 0 / 0 may be to come, as in PyTorch
        return False
    if kind == RMSPROP and buffer.size:
        return at % LOOK_EVERY == 0 and linear_part_is_over(value, buffer, history, at, bounds)
    return bound_at(history, bounds, at, MOST_DECAY) == 0 or (at % LOOK_EVERY == 0 and all_zero(value))


@inlined
def _skip(kind, squares, second, third, history, at, stop):
    """Make the steps from `at` to `stop` in one."""
    if kind == ADAGRAD:
        return
    kept = factor_between(history, _SQUARES_LOG, at, stop)
    scale_by(squares, kept)
    if kind == ADADELTA:
        scale_by(second, kept)
    else:
        scale_by(second, factor_between(history, _BUFFER_LOG, at, stop))
        scale_by(third, factor_between(history, _AVERAGE_LOG, at, stop))


@fused_kernel
def advance(
    kind, words, stride, dim, longs, parts, slots, grad, zeros, stepping, history, bounds, scale, version, whole
):
    """Catch records up; with `stepping`, to the step before the last, and then take that one with `grad`."""
    buffered, centered = parts
    dtype = words.dtype.type
    record_longs = stride * words.itemsize // 8
    zeros, history, bounds = unowned(zeros), unowned(history), unowned(bounds)
    stop = len(history) - 1 if stepping else len(history)
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            touch_all(words, slots[i + ROWS_AHEAD] * stride, stride)
        begin = slots[i] * stride
        last = (slots[i] + 1) * record_longs - 1
        value = part(words, begin, dim)
        squares = part(words, begin + dim, dim)
        begin += 2 * dim
        second = part(words, begin, dim * (buffered or kind == ADADELTA))
        begin += second.size
        third = part(words, begin, dim * centered)
        at, caught = state_step(longs[last - 1]), value_step(longs[last - 1])
        while at < stop:
            if caught > at or _is_over(kind, value, second, history, at, bounds):
                caught = regime_end(history, at, stop)
                if caught == stop and not whole:
                    break
                _skip(kind, squares, second, third, history, at, caught)
                at = caught
            else:
                until = min(next_look(at), stop)
                _step(kind, value, squares, second, third, zeros, dtype(0), history, at, until)
                at = until
        if stepping:
            _step(kind, value, squares, second, third, part(grad, i * dim, dim), dtype(scale), history, stop, stop + 1)
            longs[last] = version
            at = caught = len(history)
        longs[last - 1] = word_of(at, max(at, caught))
