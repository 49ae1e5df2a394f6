"""What the kernels that catch rows up share: the parts of a record, the closed form of decay, and when it may be used.

A dense optimizer moves every row at every step, whether it was looked up or not. Here a record says up to which step
of its table it is caught up (an int64 word before the last-step word), and the table's history says with which
scalars each step was made. A row is brought up to date when it is next needed, by the very arithmetic of a step with
a zero gradient, once for each step that it missed. That is cut short where the rest cannot change the value any more:
then its state decays by a product that the history knows.

What a row becomes must not depend on when it was looked at in between, to the bit: other ranks ask for rows at times of
their own. So whether a row is over is judged at fixed steps only, by what was known of the steps up to there; and its
state stays at the step where it was found over, until the step of its next gradient. Therefore the word holds two
numbers: the step of the state, and that of the value. (Only a value that decays for more than `EXACT_STEPS` steps
between two looks is rounded differently with other looks.)

History: float64 `[steps, columns]`, one row per step. The last column is the step's regime: the row of `bounds` float64
`[regimes, 4]` (see below) that holds for all steps up to it; it grows from step to step, or stays. The `LOGS` columns
before it are running sums of the logarithms of the factors by which a step without gradient multiplies the value
(decoupled decay) and up to three parts of the state, each rounded to the value dtype as the step itself uses it.
"""

import numpy as np

from cuda_ops.cpu.kernels import inlined

LOGS = 4
"""Columns of running sums in each row of a history: of the value, and of three parts of the state."""
REGIME = -1
"""Column of the regime."""

COEFFICIENT, LEAST_EPS, MOST_DECAY, DIES_OUT = range(4)
"""Bounds: the largest |factor| of the first moment in any step's update; the smallest eps; the largest coupled weight
decay; 1 where, at every step, the update that is left of a gradient shrinks at least as fast as the value, and no
factor is negative, else 0."""

EXACT_STEPS = 2048
"""A value that only decays is multiplied step by step, as PyTorch does, for this many steps; then by one product."""

LOOK_EVERY = 32
"""Whether a row has died out is looked at where its step is a multiple of this."""


@inlined
def next_look(at):
    return at + LOOK_EVERY - at % LOOK_EVERY


@inlined
def state_step(word):
    """Up to which step the state of a record is caught up."""
    return word & 0xFFFFFFFF


@inlined
def value_step(word):
    """Up to which step the value of a record is caught up: beyond that of its state, it is over."""
    return word >> 32


@inlined
def word_of(of_state, of_value):
    return of_value << 32 | of_state


@inlined
def bound_at(history, bounds, at, which):
    """One of the bounds of all steps up to `at`."""
    return bounds[np.int64(history[at, history.shape[1] + REGIME]), which]


@inlined
def regime_end(history, at, stop):
    """First step in (at, stop) of another regime than that of step `at`, or `stop`."""
    column = history.shape[1] + REGIME
    regime = history[at, column]
    if history[stop - 1, column] == regime:
        return stop
    same, other = at, stop - 1
    while other - same > 1:
        middle = (same + other) // 2
        if history[middle, column] == regime:
            same = middle
        else:
            other = middle
    return other


@inlined
def factor_between(history, column, start, stop):
    """Product of the factors of `column` over steps [start, stop)."""
    total = history[stop - 1, column]
    if start > 0:
        total -= history[start - 1, column]
    return np.exp(total)


@inlined
def scale_by(row, factor):
    f = row.dtype.type(factor)
    for j in range(row.size):
        row[j] *= f


@inlined
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


@inlined
def rounding(value):
    """A quarter of half the last place, relative to a value: adding less than this to one leaves its bits."""
    return 0.125 * np.finfo(value.dtype).eps


@inlined
def all_zero(row):
    for j in range(row.size):
        if row[j] != 0:
            return False
    return True


@inlined
def linear_part_is_over(value, moving, history, at, bounds):
    """Whether a momentum buffer's updates, coefficient * `moving`, are below rounding from step `at` on."""
    most_decay = bound_at(history, bounds, at, MOST_DECAY)
    if most_decay > 0 or bound_at(history, bounds, at, DIES_OUT) == 0:
        return all_zero(moving) and (most_decay == 0 or all_zero(value))
    least, coefficient = rounding(value), bound_at(history, bounds, at, COEFFICIENT)
    for j in range(value.size):
        if not abs(np.float64(moving[j])) * coefficient <= abs(np.float64(value[j])) * least:
            return False
    return True
