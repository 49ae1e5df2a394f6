"""Random numbers that are a hash of what they are for, so that they do not depend on batches, ranks or workers.

A counter-based generator: number k of sample i in epoch e under a seed is `uniform(seed, e, i, k)`, whoever asks. So
the shares of a global batch on several ranks hold the same draws as the whole batch on one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_MASK64 = (1 << 64) - 1


@njit(cache=True)
def mix(z):
    """Scramble 64 bits (uint64, or an array of them): the output function of SplitMix64 (Steele, Lea & Flood 2014)."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, *counters: int | np.ndarray) -> np.ndarray:
    """Return float64 numbers in [0, 1), one for each entry of the integers `counters`, broadcast together."""
    state = np.array([seed & _MASK64], dtype=np.uint64)
    for counter in counters:
        state = mix(mix(state) ^ np.asarray(counter, dtype=np.int64).astype(np.uint64))
    return (mix(state) >> np.uint64(11)) * 2.0**-53


def integers(high: int, seed: int, *counters: int | np.ndarray) -> np.ndarray:
    """Return int64 numbers in [0, high), as `uniform`; even to one part in 2^53 / high."""
    return (uniform(seed, *counters) * high).astype(np.int64)


class Weighted:
    """Draws ids with probabilities proportional to `weights` (float64 `[n]`, not negative)."""

    def __init__(self, weights: np.ndarray):
        self._cumulative = np.cumsum(weights, dtype=np.float64)
        if not len(weights) or weights.min() < 0 or not 0 < self._cumulative[-1] < np.inf:
            raise ValueError("weights must not be negative and have a positive sum")
        self._last = int(np.flatnonzero(weights)[-1])

    def draw(self, numbers: np.ndarray) -> np.ndarray:
        """Return int64 ids for `numbers` (in [0, 1), any shape), by inversion."""
        drawn = np.searchsorted(self._cumulative, numbers * self._cumulative[-1], side="right")
        return np.minimum(drawn, self._last)  # rounding may reach the end


def zipf_weights(count: int, exponent: float) -> np.ndarray:
    """Return Zipf's popularities of `count` things, from the most popular one down, float64 `[count]`."""
    return np.arange(1, count + 1) ** -float(exponent)
