"""What keys are drawn from: all keys alike, some keys, some by weight, or whatever a function of the user's draws.

A distribution knows `num_keys`, how many keys it can give, `draw`s independent keys, and gives the `rest` of a sample
without replacement when drawing and passing over repeats would take too long. Every sample without replacement here is
one of successive draws: each key is drawn by the distribution among those that are not in the sample yet (which is the
same as the first distinct keys of independent draws).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

import cuda_ops

Drawer = Callable[[np.random.Generator, int], np.ndarray]

_ROUNDS = 8
_MAX_TRIES = 1 << 20
_COUNTABLE_KEYS = 1 << 20
_NONE = np.empty(0, dtype=np.int64)


class Distribution(ABC):
    """A distribution over keys; `num_keys` of them have a positive probability, or may have one. `among` works where
    `is_countable`.
    """

    num_keys: int
    is_countable = True

    @abstractmethod
    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return `n` independent draws, int64 `[n]`."""

    @abstractmethod
    def rest(self, rng: np.random.Generator, n: int, taken: np.ndarray) -> np.ndarray:
        """Return `n` successive draws among the keys that are not in `taken` (int64 `[t]`); there are so many."""

    @abstractmethod
    def among(self, holds: Callable[[np.ndarray], np.ndarray]) -> Distribution | None:
        """Return this distribution given that `holds` (keys `[n]` -> bool `[n]`), which is asked of every key; None if
        it holds for none.
        """

    def draw_distinct(self, rng: np.random.Generator, n: int, taken: np.ndarray = _NONE) -> np.ndarray:
        """Return `n` successive draws among the keys that are not in `taken`; there are so many."""
        drawn = first_distinct(lambda count: self.draw(rng, count + count // 4 + 8), n, taken)
        if len(drawn) == n:
            return drawn
        return np.concatenate([drawn, self.rest(rng, n - len(drawn), np.concatenate([taken, drawn]))])


class Uniform(Distribution):
    """All of `keys` (int64 `[m]`, distinct) alike; or, with a number of keys, all from 0 up, in no memory of theirs."""

    def __init__(self, keys: np.ndarray | int):
        self._keys = None if isinstance(keys, int) else keys
        self.num_keys = keys if isinstance(keys, int) else len(keys)
        self.is_countable = self._keys is not None or self.num_keys <= _COUNTABLE_KEYS

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        drawn = rng.integers(self.num_keys, size=n)
        return drawn if self._keys is None else self._keys[drawn]

    def rest(self, rng: np.random.Generator, n: int, taken: np.ndarray) -> np.ndarray:
        if self._keys is None and 2 * (n + len(taken)) < self.num_keys:  # then most draws are new
            found = _NONE
            while len(found) < n:
                draws = self.draw(rng, 2 * (n - len(found)))
                found = np.concatenate([found, new_ones(draws, np.concatenate([taken, found]))[: n - len(found)]])
            return found
        keys = np.arange(self.num_keys) if self._keys is None else self._keys
        return rng.permutation(keys[~np.isin(keys, taken)])[:n]

    def among(self, holds: Callable[[np.ndarray], np.ndarray]) -> Distribution | None:
        keys = np.arange(self.num_keys) if self._keys is None else self._keys
        keys = keys[holds(keys)]
        return Uniform(keys) if len(keys) else None


class Weighted(Distribution):
    """`keys` (int64 `[m]`, distinct) with probabilities proportional to `weights` (float64 `[m]`), by alias tables.

    Raises ValueError for weights that are negative, not finite, or all 0.
    """

    def __init__(self, keys: np.ndarray, weights: np.ndarray):
        self._threshold, self._other = cuda_ops.alias_table(weights)
        self._keys, self._weights = keys, weights
        self.num_keys = int(np.count_nonzero(weights))

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        cells = rng.integers(len(self._keys), size=n)
        return self._keys[np.where(rng.random(n) < self._threshold[cells], cells, self._other[cells])]

    def rest(self, rng: np.random.Generator, n: int, taken: np.ndarray) -> np.ndarray:
        """The first of exponential clocks that run as fast as the weights (Efraimidis & Spirakis 2006)."""
        left = np.flatnonzero((self._weights > 0) & ~np.isin(self._keys, taken))
        # By logarithms, for clocks of weights that differ much would overflow.
        rings = np.log(rng.standard_exponential(len(left))) - np.log(self._weights[left])
        return self._keys[left[np.argsort(rings)[:n]]]

    def among(self, holds: Callable[[np.ndarray], np.ndarray]) -> Distribution | None:
        held = holds(self._keys) & (self._weights > 0)
        return Weighted(self._keys[held], self._weights[held]) if held.any() else None


class Drawn(Distribution):
    """Whatever `drawer` draws: (rng, n) -> keys `[n]`, which must be among `keys` (int64 `[m]`), or below a number."""

    is_countable = False

    def __init__(self, keys: np.ndarray | int, drawer: Drawer):
        self._keys = None if isinstance(keys, int) else np.sort(keys)
        self.num_keys = keys if isinstance(keys, int) else len(keys)
        self._drawer = drawer

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        drawn = np.asarray(self._drawer(rng, n))
        if drawn.shape != (n,) or drawn.dtype.kind not in "iu":
            raise ValueError(
                f"the distribution must return {n} integers when asked for {n} keys; got {drawn.dtype} "
                f"{list(drawn.shape)}"
            )
        if self._keys is None:
            wrong = np.flatnonzero((drawn < 0) | (drawn >= self.num_keys))
        else:
            at = np.minimum(np.searchsorted(self._keys, drawn), len(self._keys) - 1)
            wrong = np.flatnonzero(self._keys[at] != drawn)
        if wrong.size:
            what = f"[0, {self.num_keys})" if self._keys is None else f"the {self.num_keys} keys to sample from"
            raise ValueError(f"the distribution drew key {drawn[wrong[0]]}, which is not in {what}")
        return drawn.astype(np.int64)

    def rest(self, rng: np.random.Generator, n: int, taken: np.ndarray) -> np.ndarray:
        found, tries = _NONE, 0
        while len(found) < n:
            if tries > _MAX_TRIES:
                raise ValueError(
                    f"the distribution gave {len(found) + len(taken)} different keys in {tries} draws; "
                    f"{n + len(taken)} are wanted without replacement"
                )
            count = max(64, 4 * n, tries)
            draws, tries = self.draw(rng, count), tries + count
            found = np.concatenate([found, new_ones(draws, np.concatenate([taken, found]))[: n - len(found)]])
        return found

    def among(self, holds: Callable[[np.ndarray], np.ndarray]) -> Distribution | None:
        raise NotImplementedError("the keys that a function may draw cannot be counted up")


def make_distribution(num_keys: int, keys: np.ndarray | None, distribution: object) -> Distribution:
    """Return the distribution that a user asked for; see `pm.by_hand.sampling.Sampling`.

    Raises TypeError or ValueError, naming what is wrong, if keys are out of range or repeated, or weights are not one
    per key, negative, not finite or all 0.
    """
    if keys is not None:
        keys = _check_keys(keys, num_keys)
    if distribution is None:
        return Uniform(num_keys if keys is None else keys)
    if callable(distribution):
        return Drawn(num_keys if keys is None else keys, distribution)
    weights = _as_array(distribution)
    if weights.dtype.kind not in "fiub":
        raise TypeError(f"the distribution must be None, weights or a function, got {type(distribution).__name__}")
    size = num_keys if keys is None else len(keys)
    if weights.shape != (size,):
        raise ValueError(f"the distribution needs one weight per key, {size}; got weights {list(weights.shape)}")
    return Weighted(np.arange(num_keys) if keys is None else keys, weights.astype(np.float64))


def first_distinct(draw: Callable[[int], np.ndarray], n: int, taken: np.ndarray = _NONE) -> np.ndarray:
    """Return the first distinct keys that `draw` (count -> keys) gives and that are not in `taken`: `n`, or fewer if
    some rounds of drawing do not give as many.
    """
    found = _NONE
    for _ in range(_ROUNDS):
        if len(found) == n:
            break
        drawn = draw(n - len(found))
        found = np.concatenate([found, new_ones(drawn, np.concatenate([taken, found]))[: n - len(found)]])
    return found


def new_ones(drawn: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Return the keys of `drawn`, in order and each once, that are not in `taken`."""
    first = np.sort(np.unique(drawn, return_index=True)[1])
    fresh = drawn[first]
    return fresh[~np.isin(fresh, taken)]


def _check_keys(keys: object, num_keys: int) -> np.ndarray:
    array = _as_array(keys)
    if array.dtype.kind not in "iu" or array.ndim != 1 or not len(array):
        raise ValueError(f"keys to sample from must be integers [m], m at least 1; got {array.dtype} {array.shape}")
    wrong = np.flatnonzero((array < 0) | (array >= num_keys))
    if wrong.size:
        raise ValueError(f"keys[{wrong[0]}] is {array[wrong[0]]}, which is not in [0, {num_keys})")
    array = array.astype(np.int64)
    found, counts = np.unique(array, return_counts=True)
    if len(found) < len(array):
        raise ValueError(f"key {found[counts > 1][0]} occurs {counts.max()} times among keys; give each key once")
    return array


def _as_array(values: object) -> np.ndarray:
    return np.array(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
