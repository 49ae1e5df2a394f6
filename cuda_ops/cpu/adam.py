"""Adam, AdamW, AMSGrad, NAdam, RAdam and Adamax on records, rows that a step did not touch included (see gaps.py).

State: the first moment, the second (Adamax: the norm), and with AMSGrad the largest second moment so far. Columns of
the history: those of adam_steps.py, and running sums for the value and the two moments.

Why it may be cut short: at a step j without gradient the value moves by |u_j| = |c_j| |m_j| / (sqrt(v_j) / s_j + eps_j)
with s_j <= 1. While beta1^2 <= beta2 at every step, |m| / (sqrt(v) + eps) only shrinks, so that no later |u| is larger
than max|c| |m_j| / (sqrt(v_j) + min eps). Once that is below half the last place of the value, rounding leaves the
value as it is for good, but for decoupled decay; coupled decay makes a gradient of the value itself, so that only rows
that are zero may be cut short.
"""

import numpy as np

from cuda_ops.cpu.adam_steps import ADAMAX, AMSGRAD, EPS, NADAM, RADAM, VALUE_FACTOR, adam, adamax, nadam, radam
from cuda_ops.cpu.gaps import (
    COEFFICIENT,
    DIES_OUT,
    LEAST_EPS,
    LOGS,
    MOST_DECAY,
    decay_value,
    factor_between,
    next_look,
    rounding,
    scale_by,
)
from cuda_ops.cpu.kernels import ROWS_AHEAD, fused_kernel, helper, touch

COLUMNS = 10 + LOGS
_VALUE_LOG, _FIRST_LOG, _SECOND_LOG = 10, 11, 12


@helper
def _step(kind, value, m, v, largest, grad, scale, history, start, stop):
    if kind == NADAM:
        nadam(value, m, v, grad, scale, history, start, stop)
    elif kind == RADAM:
        radam(value, m, v, grad, scale, history, start, stop)
    elif kind == ADAMAX:
        adamax(value, m, v, grad, scale, history, start, stop)
    else:
        adam(value, m, v, largest, grad, scale, history, start, stop, kind == AMSGRAD)


@helper
def _is_over(kind, value, m, denominator, bounds, shrinks_to):
    """Whether no later step can move a value, which decays to `shrinks_to` times itself meanwhile."""
    least = rounding(value) * shrinks_to
    for j in range(value.size):
        moment, size = abs(np.float64(m[j])), np.float64(denominator[j])
        if size + bounds[LEAST_EPS] == 0:  # 0 / 0 is to come, as in PyTorch
            return False
        if moment == 0 and (bounds[MOST_DECAY] == 0 or value[j] == 0):
            continue
        if bounds[MOST_DECAY] > 0 or bounds[DIES_OUT] == 0:
            return False
        root = size if kind == ADAMAX else np.sqrt(size) + bounds[LEAST_EPS]
        if kind == RADAM:  # at times it does not divide
            root = min(root, 1.0)
        if not moment * bounds[COEFFICIENT] <= abs(np.float64(value[j])) * least * root:
            return False
    return True


@helper
def _skip(kind, value, m, v, history, at, stop):
    """Make the steps from `at` to `stop` in one."""
    decay_value(value, history, VALUE_FACTOR, _VALUE_LOG, at, stop)
    scale_by(m, factor_between(history, _FIRST_LOG, at, stop))
    scale_by(v, factor_between(history, _SECOND_LOG, at, stop))
    if kind == ADAMAX:
        eps = value.dtype.type(history[stop - 1, EPS])
        for j in range(v.size):
            v[j] = max(v[j], eps)


@fused_kernel
def advance(kind, words, stride, dim, longs, slots, grad, stepping, history, bounds, scale, version):
    """Catch records up; with `stepping`, to the step before the last, and then take that one with `grad`."""
    dtype = words.dtype.type
    record_longs = stride * words.itemsize // 8
    zeros = np.zeros(dim, words.dtype)
    stop = len(history) - 1 if stepping else len(history)
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            touch(words, slots[i + ROWS_AHEAD] * stride, stride)
        begin = slots[i] * stride
        last = (slots[i] + 1) * record_longs - 1
        value = words[begin : begin + dim]
        m = words[begin + dim : begin + 2 * dim]
        v = words[begin + 2 * dim : begin + 3 * dim]
        largest = words[begin + 3 * dim : begin + 4 * dim] if kind == AMSGRAD else v
        first = at = look = longs[last - 1]
        while at < stop:
            if at >= look:
                shrinks_to = factor_between(history, _VALUE_LOG, at, stop)
                if _is_over(kind, value, m, largest, bounds, shrinks_to):
                    _skip(kind, value, m, v, history, at, stop)
                    break
                look = next_look(at, first)
            _step(kind, value, m, v, largest, zeros, dtype(0), history, at, min(look, stop))
            at = min(look, stop)
        if stepping:
            _step(kind, value, m, v, largest, grad[i], dtype(scale), history, stop, stop + 1)
            longs[last] = version
        longs[last - 1] = len(history)
