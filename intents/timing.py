"""When to act on an intent: as late as is safe, from how many clocks pass in a round."""

from __future__ import annotations

import math
from functools import lru_cache

SMOOTHING = 0.1
QUANTILE = 0.9999
FIRST_ESTIMATE, FIRST_LIKELY = 10.0, 2.0


class ActionTiming:
    """Estimates how far ahead intents must be acted on, for one worker (AdaPM, arXiv 2206.00470, section 4.2).

    The clocks that pass in a round are taken to be Poisson-distributed. Their mean is estimated by exponential
    smoothing (0.1) and never below the last round's count. An intent that is not acted on in this round gets its next
    chance one round later, and its rows arrive with the one after: so the quantile (0.9999) is that of a Poisson
    distribution with twice the mean.

    `clocks_per_round` begins far above what is usual, so that the first intents are acted on at once;
    `likely_clocks_per_round` begins near it, for decisions that may be wrong once in a while.

    Args:
        enabled: False acts on every intent at once (for comparison).
    """

    def __init__(self, *, enabled: bool = True):
        self.enabled = enabled
        self.clocks_per_round, self.likely_clocks_per_round = FIRST_ESTIMATE, FIRST_LIKELY
        self._last_clock = 0

    def round_begins(self, clock: int) -> None:
        """A round begins while the worker is at `clock`."""
        passed = clock - self._last_clock
        self._last_clock = clock
        if passed:  # rounds while nothing is computed (a pause, an evaluation) say nothing of the pace
            self.clocks_per_round = _smoothed(self.clocks_per_round, passed)
            self.likely_clocks_per_round = _smoothed(self.likely_clocks_per_round, passed)

    def acts_before(self, clock: int) -> float:
        """Return the clock before which an intent must start to be acted on in a round at `clock`."""
        if not self.enabled:
            return math.inf
        return clock + max(1, poisson_quantile(round(2 * self.clocks_per_round, 2), QUANTILE))


def _smoothed(estimate: float, passed: int) -> float:
    return max((1 - SMOOTHING) * estimate + SMOOTHING * passed, float(passed))


@lru_cache(maxsize=4096)
def poisson_quantile(mean: float, probability: float) -> int:
    """Return the smallest k with P(X <= k) >= `probability` for X Poisson-distributed with `mean` >= 0.

    Raises:
        ValueError: if the mean is negative, or the probability not in (0, 1).
    """
    if not mean >= 0 or not 0 < probability < 1:
        raise ValueError(f"a Poisson quantile needs a mean >= 0 and a probability in (0, 1); got {mean}, {probability}")
    if mean == 0:
        return 0
    log_mean, total, k = math.log(mean), 0.0, -1
    while total < probability:
        k += 1
        total += math.exp(
            k * log_mean - mean - math.lgamma(k + 1)
        )  # a product of terms would underflow for large means
    return k
