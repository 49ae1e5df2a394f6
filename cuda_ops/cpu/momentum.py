"""SGD with momentum or weight decay on records, rows that a step did not touch included (see gaps.py).

Columns of the history: lr, momentum, 1 - dampening (1 at the step that starts the buffer), weight_decay, whether
Nesterov's; running sums of: the value's factor without momentum (1 - lr * weight_decay), the buffer's factor.
"""

from cuda_ops.cpu.gaps import (
    DIES_OUT,
    EXACT_STEPS,
    LOGS,
    LOOK_EVERY,
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
from cuda_ops.cpu.kernels import ROWS_AHEAD, fused_kernel, inlined, part, touch, unowned

LR, MOMENTUM, KEPT, WEIGHT_DECAY, NESTEROV = range(5)
COLUMNS = 5 + LOGS + 1
_VALUE_LOG, _BUFFER_LOG = 5, 6


@inlined
def _step(value, buffer, grad, scale, history, start, stop):
    """Steps [start, stop) of torch.optim.SGD with one gradient; `buffer` is empty where there is none."""
    dtype = value.dtype.type
    for at in range(start, stop):
        minus_lr, momentum, kept = dtype(-history[at, LR]), dtype(history[at, MOMENTUM]), dtype(history[at, KEPT])
        decay = dtype(history[at, WEIGHT_DECAY])
        if buffer.size == 0 or history[at, MOMENTUM] == 0:
            for j in range(value.size):
                g = scale * grad[j]
                if decay != 0:
                    g += decay * value[j]
                value[j] += minus_lr * g
        elif history[at, NESTEROV] != 0:
            for j in range(value.size):
                g = scale * grad[j]
                if decay != 0:
                    g += decay * value[j]
                b = buffer[j] * momentum + kept * g
                buffer[j] = b
                value[j] += minus_lr * (g + momentum * b)
        else:
            for j in range(value.size):
                g = scale * grad[j]
                if decay != 0:
                    g += decay * value[j]
                b = buffer[j] * momentum + kept * g
                buffer[j] = b
                value[j] += minus_lr * b


@inlined
def _decay(value, buffer, zeros, history, at, stop, bounds):
    """Steps [at, stop) where there is no buffer: the value only decays."""
    exact = stop
    if stop - at > EXACT_STEPS and bound_at(history, bounds, stop - 1, DIES_OUT) != 0:
        exact = at + EXACT_STEPS
    _step(value, buffer, zeros, value.dtype.type(0), history, at, exact)
    if exact < stop:
        scale_by(value, factor_between(history, _VALUE_LOG, exact, stop))


@inlined
def _is_over(value, buffer, history, at, bounds):
    return at % LOOK_EVERY == 0 and linear_part_is_over(value, buffer, history, at, bounds)


@fused_kernel
def advance(
    words, stride, dim, longs, state_parts, slots, grad, zeros, stepping, history, bounds, scale, version, whole
):
    """Catch records up; with `stepping`, to the step before the last, and then take that one with `grad`."""
    dtype = words.dtype.type
    record_longs = stride * words.itemsize // 8
    zeros, history, bounds = unowned(zeros), unowned(history), unowned(bounds)
    stop = len(history) - 1 if stepping else len(history)
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            touch(words, slots[i + ROWS_AHEAD] * stride, stride)
        begin = slots[i] * stride
        last = (slots[i] + 1) * record_longs - 1
        value = part(words, begin, dim)
        buffer = part(words, begin + dim, dim * state_parts)
        at, caught = state_step(longs[last - 1]), value_step(longs[last - 1])
        if buffer.size == 0 and at < stop:
            _decay(value, buffer, zeros, history, at, stop, bounds)
            at = stop
        while at < stop:
            if caught > at or _is_over(value, buffer, history, at, bounds):
                caught = regime_end(history, at, stop)
                if caught == stop and not whole:
                    break
                scale_by(buffer, factor_between(history, _BUFFER_LOG, at, caught))
                at = caught
            else:
                until = min(next_look(at), stop)
                _step(value, buffer, zeros, dtype(0), history, at, until)
                at = until
        if stepping:
            _step(value, buffer, part(grad, i * dim, dim), dtype(scale), history, stop, stop + 1)
            longs[last] = version
            at = caught = len(history)
        longs[last - 1] = word_of(at, max(at, caught))
