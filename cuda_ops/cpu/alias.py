"""Weighted draws in constant time each: the alias method (Walker 1977), with Vose's construction (1991)."""

import numpy as np

from cuda_ops.cpu.checks import plain_input
from cuda_ops.cpu.kernels import kernel


def alias_table(weights):
    """Return the table by which things are drawn with probabilities proportional to their weights.

    To draw, choose one of the n cells evenly, and in it the thing of the cell's own number with probability
    `threshold[cell]`, else `other[cell]`. Time and memory of construction are proportional to n.

    Args:
        weights: [n] float64, finite, not negative, at least one positive. Things of weight 0 are never drawn.

    Returns:
        threshold: [n] float64 in [0, 1].
        other: [n] int64 in [0, n).

    Raises:
        TypeError, ValueError: the weights are not as described; the message names the first one that is not.
    """
    if weights.dtype != np.float64:
        raise TypeError(f"weights must be float64, got {weights.dtype}")
    if weights.ndim != 1 or not weights.size:
        raise ValueError(f"weights must have shape [n], n at least 1, got {list(weights.shape)}")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if wrong.size:
        raise ValueError(f"weights[{wrong[0]}] is {weights[wrong[0]]}; weights must be finite and not negative")
    heaviest = int(weights.argmax())
    if weights[heaviest] == 0:
        raise ValueError(f"all {weights.size} weights are 0; at least one must be positive")
    relative = plain_input(weights) / weights[heaviest]  # the sum of these is finite
    scaled = relative * (weights.size / relative.sum())
    threshold, other = np.empty(weights.size), np.empty(weights.size, np.int64)
    _fill(scaled, heaviest, threshold, other)
    return threshold, other


@kernel
def _fill(scaled, heaviest, threshold, other):
    """`scaled` has mean 1, and is changed."""
    n = scaled.size
    waiting = np.empty(n, np.int64)  # light cells from the left, heavy ones from the right
    light, heavy = 0, n
    for i in range(n):
        if scaled[i] < 1.0:
            waiting[light] = i
            light += 1
        else:
            heavy -= 1
            waiting[heavy] = i
    while light > 0 and heavy < n:
        light -= 1
        small, large = waiting[light], waiting[heavy]
        threshold[small], other[small] = scaled[small], large
        scaled[large] = (scaled[large] + scaled[small]) - 1.0
        if scaled[large] < 1.0:
            heavy += 1
            waiting[light] = large
            light += 1
    for at in range(heavy, n):
        threshold[waiting[at]], other[waiting[at]] = 1.0, waiting[at]
    for at in range(light):  # what rounding has left over: cells that are full, or empty ones
        i = waiting[at]
        threshold[i], other[i] = (1.0, i) if scaled[i] > 0.5 else (scaled[i], heaviest)
