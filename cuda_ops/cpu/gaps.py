"""What the kernels that catch rows up share: the parts of a record, the closed form of decay, and when it may be used.

A dense optimizer moves every row at every step, whether it was looked up or not. Here a record says up to which step
of its table it is caught up (an int64 word before the last-step word), and the table's history says with which
scalars each step was made. A row is brought up to date when it is next needed, by the very arithmetic of a step with
a zero gradient, once for each step that it missed. That is cut short where the rest cannot change the value any more:
then its state decays by a product that the history knows.

History: float64 `[steps, columns]`, one row per step; the last `LOGS` columns are running sums of the logarithms of the
factors by which a step without gradient multiplies the value (decoupled decay) and up to three parts of the state,
each rounded to the value dtype as the step itself uses it. Bounds over all of it: float64 `[4]`, see below.
"""

import numpy as np

from cuda_ops.cpu.kernels import helper

LOGS = 4
"""Columns of running sums at the end of each row of a history: of the value, and of three parts of the state."""

COEFFICIENT, LEAST_EPS, MOST_DECAY, DIES_OUT = range(4)
"""Bounds: the largest |factor| of the first moment in any step's update; the smallest eps; the largest coupled weight
decay; 1 where, at every step, the update that is left of a gradient shrinks and no factor is negative, else 0."""

EXACT_STEPS = 2048
"""A value that only decays is multiplied step by step, as PyTorch does, for this many steps; then by one product."""

_FIRST_LOOK = 16
_MOST_BETWEEN_LOOKS = 256


@helper
def next_look(at, first):
    """When to look again, at step `at`, whether a row that began at step `first` has died out."""
    return at + min(max(_FIRST_LOOK, at - first), _MOST_BETWEEN_LOOKS)


@helper
def factor_between(history, column, start, stop):
    """Product of the factors of `column` over steps [start, stop)."""
    total = history[stop - 1, column]
    if start > 0:
        total -= history[start - 1, column]
    return np.exp(total)


@helper
def scale_by(row, factor):
    f = row.dtype.type(factor)
    for j in range(row.size):
        row[j] *= f


@helper
def decay_value(value, history, factors, logs, start, stop):
    """Multiply by the decoupled decay of steps [start, stop): `factors` is its column, `logs` that of its sums."""
    if factor_between(history, logs, start, stop) == 1.0:
        return
    exact = min(stop, start + EXACT_STEPS)
    for at in range(start, exact):
        f = value.dtype.type(history[at, factors])
        for j in range(value.size):
            value[j] *= f
    if exact < stop:
        scale_by(value, factor_between(history, logs, exact, stop))


@helper
def rounding(value):
    """A quarter of half the last place, relative to a value: adding less than this to one leaves its bits."""
    return 0.125 * np.finfo(value.dtype).eps


@helper
def all_zero(row):
    for j in range(row.size):
        if row[j] != 0:
            return False
    return True


@helper
def linear_part_is_over(value, moving, bounds):
    """Whether a momentum buffer's updates, coefficient * `moving`, are below rounding from here on."""
    if bounds[MOST_DECAY] > 0 or bounds[DIES_OUT] == 0:
        return all_zero(moving) and (bounds[MOST_DECAY] == 0 or all_zero(value))
    least = rounding(value)
    for j in range(value.size):
        if not abs(np.float64(moving[j])) * bounds[COEFFICIENT] <= abs(np.float64(value[j])) * least:
            return False
    return True
