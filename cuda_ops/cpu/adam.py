"""Adam, AdamW, AMSGrad, NAdam, RAdam and Adamax on records, rows that a step did not touch included (see gaps.py).

State: the first moment, the second (Adamax: the norm), and with AMSGrad the largest second moment so far. Columns of
the history: those of adam_steps.py, and running sums for the value and the two moments.

Why it may be cut short: at a step j without gradient the value moves by |u_j| = |c_j| |m_j| / (sqrt(v_j) / s_j + eps_j)
with s_j <= 1. |m| / (sqrt(v) + eps) shrinks by beta1 / sqrt(beta2) a step, or faster. While the value's own decay is
slower than that at every step, |u| in parts of the value is at most max|c| |m_j| / (sqrt(v_j) + min eps) / |value_j|
from step j on. Once that is below half the last place, rounding leaves the value as it is for good, but for decoupled
decay; coupled decay makes a gradient of the value itself, so that only rows that are zero may be cut short.
"""

import numpy as np

from cuda_ops.cpu.adam_steps import ADAM, ADAMAX, AMSGRAD, EPS, NADAM, RADAM, VALUE_FACTOR, adam, adamax, nadam, radam
from cuda_ops.cpu.gaps import (
    COEFFICIENT,
    DIES_OUT,
    LEAST_EPS,
    LOGS,
    LOOK_EVERY,
    MOST_DECAY,
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
from cuda_ops.cpu.kernels import ROWS_AHEAD, fused_kernel, inlined, own_row, part, touch_all, unowned

COLUMNS = 10 + LOGS + 1
_VALUE_LOG, _FIRST_LOG, _SECOND_LOG = 10, 11, 12


@inlined
def _step(kind, value, m, v, largest, grad, scale, history, start, stop):
    if kind == NADAM:
        nadam(value, m, v, grad, scale, history, start, stop)
    elif kind == RADAM:
        radam(value, m, v, grad, scale, history, start, stop)
    elif kind == ADAMAX:
        adamax(value, m, v, grad, scale, history, start, stop)
    else:
        adam(value, m, v, largest, grad, scale, history, start, stop, kind == AMSGRAD)


@inlined
def _is_over(kind, value, m, denominator, history, at, bounds):
    """Whether no later step can do more to a value than let it decay."""
    if at % LOOK_EVERY != 0:
        return False
    least_eps, most_decay = bound_at(history, bounds, at, LEAST_EPS), bound_at(history, bounds, at, MOST_DECAY)
    coefficient, dies_out = bound_at(history, bounds, at, COEFFICIENT), bound_at(history, bounds, at, DIES_OUT)
    least = rounding(value)
    for j in range(value.size):
        moment, size = abs(np.float64(m[j])), np.float64(denominator[j])
        if size + least_eps == 0:  # 0 / 0 is to come, as in PyTorch
            return False
        if moment == 0 and (most_decay == 0 or value[j] == 0):
            continue
        if most_decay > 0 or dies_out == 0:
            return False
        root = size if kind == ADAMAX else np.sqrt(size) + least_eps
        if kind == RADAM:  # at times it does not divide
            root = min(root, 1.0)
        if not moment * coefficient <= abs(np.float64(value[j])) * least * root:
            return False
    return True


@inlined
def _skip(kind, value, m, v, history, at, stop):
    """Make the steps from `at` to `stop` in one, as far as the state is concerned."""
    scale_by(m, factor_between(history, _FIRST_LOG, at, stop))
    scale_by(v, factor_between(history, _SECOND_LOG, at, stop))
    if kind == ADAMAX:
        eps = value.dtype.type(history[stop - 1, EPS])
        for j in range(v.size):
            v[j] = max(v[j], eps)


@fused_kernel
def advance(kind, words, stride, dim, longs, slots, grad, zeros, stepping, history, bounds, scale, version, whole):
    """Catch records up; with `stepping`, to the step before the last, and then take that one with `grad`."""
    dtype = words.dtype.type
    record_longs = stride * words.itemsize // 8
    zeros, history, bounds = unowned(zeros), unowned(history), unowned(bounds)
    stop = len(history) - 1 if stepping else len(history)
    last_step = own_row(history, len(history) - 1, COLUMNS)
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            touch_all(words, slots[i + ROWS_AHEAD] * stride, stride)
        begin = slots[i] * stride
        last = (slots[i] + 1) * record_longs - 1
        value = part(words, begin, dim)
        m = part(words, begin + dim, dim)
        v = part(words, begin + 2 * dim, dim)
        largest = part(words, begin + (3 if kind == AMSGRAD else 2) * dim, dim)
        at, caught = state_step(longs[last - 1]), value_step(longs[last - 1])
        while at < stop:
            if caught > at or _is_over(kind, value, m, largest, history, at, bounds):
                end = regime_end(history, at, stop)
                start = max(at, caught)
                if start < end:
                    decay_value(value, history, VALUE_FACTOR, _VALUE_LOG, start, end)
                caught = end
                if caught == stop and not whole:
                    break
                _skip(kind, value, m, v, history, at, caught)
                at = caught
            else:
                until = min(next_look(at), stop)
                _step(kind, value, m, v, largest, zeros, dtype(0), history, at, until)
                at = until
        if stepping:
            row = part(grad, i * dim, dim)
            if kind == ADAM:  # its scalars stay in registers; those of RAdam would be rounded otherwise
                adam(value, m, v, v, row, dtype(scale), last_step, 0, 1, False)
            else:
                _step(kind, value, m, v, largest, row, dtype(scale), history, stop, stop + 1)
            longs[last] = version
            at = caught = len(history)
        longs[last - 1] = word_of(at, max(at, caught))
