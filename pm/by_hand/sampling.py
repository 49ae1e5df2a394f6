"""Sampling of keys by their values' place: AdaPM's primitives and NuPS's schemes (arXiv 2206.00470, 2104.00501)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pm.by_hand.arguments import check_integer
from pm.by_hand.distributions import Distribution, first_distinct, make_distribution, new_ones

SCHEMES = ("naive", "preloc", "pool", "local")
DEFAULT_POOL_SIZE = 250
DEFAULT_REUSE = 16
_MASK64 = (1 << 64) - 1
_NONE = np.empty(0, dtype=np.int64)
# Draws that may turn out not to be local before all keys are looked through, or taken from elsewhere if they are too
# many for that: so many in any case, and more for each key that was found.
_FEW_TRIES, _MANY_TRIES, _TRIES_EACH = 1 << 10, 1 << 18, 64
_TRIES_AT_ONCE = 1 << 14


class KeyAccess(Protocol):
    """What sampling needs of a thread's access to a parameter manager; `stream` is the thread's number on its rank."""

    rank: int
    stream: int
    num_keys: int

    @property
    def current_clock(self) -> int: ...

    def intend(self, keys: np.ndarray, start: int, end: int) -> None:
        """Keys (int64 `[n]`, distinct) will be used while the clock is in [start, end]."""

    def is_local(self, keys: np.ndarray) -> np.ndarray:
        """Return which keys can be pulled now without a message, bool `[n]`."""

    def pull(self, keys: np.ndarray, out: object) -> None:
        """Read the values of keys into `out`, and wait until they are there."""


@dataclass
class _Sample:
    """A prepared sample: `left` of its `n` keys have not been pulled. `keys` are those to pull, None if they are drawn
    when they are pulled; `pulled` those that must not come again.
    """

    n: int
    left: int
    keys: np.ndarray | None
    pulled: np.ndarray = field(default_factory=lambda: _NONE)


_OVER = _Sample(0, 0, _NONE)


class Sampling:
    """Draws samples of keys and pulls their values, by one of four schemes. For one thread at a time.

    A sample is `prepare`d before it is needed, and `pull`ed at once or in parts. What distribution each scheme keeps:

    - "naive": draws are independent and have the given distribution; keys are pulled from wherever they are.
    - "preloc": the same draws, made and intended when a sample is prepared, so that keys are local when it is pulled.
    - "pool": `pool_size` keys are drawn independently, intended, and used `reuse` times each, in an order shuffled anew
      for every use; then come others. Each draw on its own has the given distribution, but draws are dependent, within
      a sample and between samples. Keys of a sample are intended too.
    - "local": draws are made when a sample is pulled, among the keys that are local then: they are independent and have
      the given distribution given that the key is local. This is not the given distribution, and which keys are local
      may depend on the values. Where no key is local (or, without replacement, too few), or none is found in 2^18 draws
      (only for more than 2^20 keys without weights, or a function), draws come from the whole distribution;
      `draws_not_local` counts these.

    Without replacement, a sample is the first n distinct keys of such draws: each key has the given distribution among
    those that are not in the sample yet ("pool": the first distinct keys that come from pools, and if 8 rounds of
    drawing do not give enough, others drawn as by "naive"). Samples do not exclude each other.

    Draws depend on (seed, rank, stream) and on what was drawn before; those of "local" also on what is local.

    Args:
        access: of the thread that samples.
        seed: any integer.
        keys: int64 `[m]`, distinct, to sample from; None for all, which takes no memory for them if the distribution is
            uniform.
        distribution: None (uniform), weights `[m]` (one for each key, not negative, copied), or a function (generator,
            n) -> n independent keys.
        scheme: as above.
        replacement: whether a sample may have a key twice.
        pool_size, reuse: as above.

    Raises:
        ValueError, TypeError: if an argument is not as described.
    """

    def __init__(
        self,
        access: KeyAccess,
        *,
        seed: int,
        keys: np.ndarray | None = None,
        distribution: object = None,
        scheme: str = "naive",
        replacement: bool = True,
        pool_size: int = DEFAULT_POOL_SIZE,
        reuse: int = DEFAULT_REUSE,
    ):
        if scheme not in SCHEMES:
            raise ValueError(f"sampling scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
        for name, number in (("pool_size", pool_size), ("reuse", reuse)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.draws_not_local = 0
        self._access, self._scheme, self._replacement = access, scheme, bool(replacement)
        self._distribution = make_distribution(access.num_keys, keys, distribution)
        self._rng = np.random.default_rng([int(seed) & _MASK64, access.rank, access.stream])
        self._pool = _Pool(self._distribution, self._rng, pool_size, reuse)
        self._samples: dict[int, _Sample] = {}
        self._prepared = 0

    def prepare(self, n: int, start: int | None = None, end: int | None = None) -> int:
        """Prepare a sample of `n` keys to be pulled while the clock is in [start, end]; return its handle.

        `start` is the current clock if not given, and `end` is `start`. It is a hint: when the sample is pulled does
        not change what it holds ("local": it is what is local then).

        Raises:
            ValueError: for n below 0, an end before its start, and more keys than there are, without replacement.
            TypeError: if an argument is no integer.
        """
        n = check_integer("n", n, "how many keys a sample has (an int)")
        start = self._access.current_clock if start is None else check_integer("start", start, "a clock (an int)")
        end = start if end is None else check_integer("end", end, "a clock (an int)")
        if n < 0:
            raise ValueError(f"a sample has 0 keys or more; got n={n}")
        if end < start:
            raise ValueError(f"a sample's clocks must not end before they start; got start {start}, end {end}")
        if not self._replacement and n > self._distribution.num_keys:
            raise ValueError(
                f"{n} keys cannot be drawn without replacement: {self._distribution.num_keys} have a positive weight"
            )
        keys = None
        if self._scheme != "local":
            keys = self._draw(n, start, end)
            if self._scheme != "naive" and n:
                self._access.intend(np.unique(keys), start, end)
        self._prepared += 1
        if n:
            self._samples[self._prepared] = _Sample(n, n, keys)
        return self._prepared

    def pull(self, handle: int, keys_out: np.ndarray, values_out: object) -> None:
        """Take the next keys of a sample: write them to `keys_out` (int64 `[k]`), and their values to `values_out`.

        `values_out` is what the manager's `pull` takes (so that its shape is known, sample from keys of one length). A
        sample is over when all its keys were pulled.

        Raises:
            ValueError: for an unknown handle, or more keys than are left.
            TypeError: if `keys_out` is not a writeable int64 vector. What is left of the sample is then as before.
        """
        if not 0 < handle <= self._prepared:
            raise ValueError(f"handle {handle} is of no sample that was prepared here")
        _check_out(keys_out)
        sample, count = self._samples.get(handle, _OVER), len(keys_out)
        if sample is _OVER and count:
            raise ValueError(f"sample {handle} is over; {count} more keys were asked for: prepare more")
        if count > sample.left:
            raise ValueError(
                f"sample {handle} has {sample.left} keys left of {sample.n}; {count} were asked for: prepare more"
            )
        not_local = 0
        if sample.keys is None:
            keys, not_local = self._draw_local(count, sample.pulled)
        else:
            done = sample.n - sample.left
            keys = sample.keys[done : done + count]
        self._access.pull(keys, values_out)
        keys_out[:] = keys
        self.draws_not_local += not_local
        sample.left -= count
        if sample.keys is None and not self._replacement:
            sample.pulled = np.concatenate([sample.pulled, keys])
        if not sample.left:
            self.finish(handle)

    def finish(self, handle: int) -> None:
        """Forget a sample of which no more keys will be pulled; unknown handles are none."""
        self._samples.pop(handle, None)

    def _draw(self, n: int, start: int, end: int) -> np.ndarray:
        """Return the keys of a sample, by any scheme but "local"."""
        if self._scheme != "pool":
            draw = self._distribution.draw if self._replacement else self._distribution.draw_distinct
            return draw(self._rng, n)

        def take(count: int) -> np.ndarray:
            keys, new = self._pool.take(count)
            if len(new):
                self._access.intend(np.unique(new), start, end)
            return keys

        if self._replacement:
            return take(n)
        keys = first_distinct(take, n)
        return np.concatenate([keys, self._distribution.draw_distinct(self._rng, n - len(keys), keys)])

    def _draw_local(self, n: int, taken: np.ndarray) -> tuple[np.ndarray, int]:
        """Return `n` keys for now, and how many of them could not be drawn among the local ones."""
        countable = self._distribution.is_countable
        tries = min(_FEW_TRIES, 4 * self._distribution.num_keys) if countable else _MANY_TRIES
        keys = self._draw_and_keep_local(n, taken, tries)
        if len(keys) < n and countable:
            keys = self._look_through(n, taken, keys)
        missing = n - len(keys)
        if missing and self._replacement:
            return np.concatenate([keys, self._distribution.draw(self._rng, missing)]), missing
        if missing:
            rest = self._distribution.draw_distinct(self._rng, missing, np.concatenate([taken, keys]))
            return np.concatenate([keys, rest]), missing
        return keys, 0

    def _draw_and_keep_local(self, n: int, taken: np.ndarray, few: int) -> np.ndarray:
        """Return the first `n` draws that are local; fewer if, after `few`, less than one in `_TRIES_EACH` is."""
        keys, tries = _NONE, 0
        while len(keys) < n and tries < few + _TRIES_EACH * len(keys):
            share = (len(keys) + 1) / (tries + 1)
            count = int(min(_TRIES_AT_ONCE, max(64, 1.2 * (n - len(keys)) / share)))
            drawn, tries = self._distribution.draw(self._rng, count), tries + count
            drawn = drawn[self._access.is_local(drawn)]
            if not self._replacement:
                drawn = new_ones(drawn, np.concatenate([taken, keys]))
            keys = np.concatenate([keys, drawn[: n - len(keys)]])
        return keys

    def _look_through(self, n: int, taken: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return `keys` and further local ones, `n` in all if there are so many; all keys are looked at."""
        used = _NONE if self._replacement else np.concatenate([taken, keys])
        local = self._distribution.among(lambda asked: self._access.is_local(asked) & ~np.isin(asked, used))
        if local is None:
            return keys
        if self._replacement:
            return np.concatenate([keys, local.draw(self._rng, n - len(keys))])
        return np.concatenate([keys, local.draw_distinct(self._rng, min(n - len(keys), local.num_keys))])


class _Pool:
    """A stream of keys: `size` independent draws, in `reuse` orders one after the other, then others.

    Args:
        distribution, rng: of the draws.
        size, reuse: as said.
    """

    def __init__(self, distribution: Distribution, rng: np.random.Generator, size: int, reuse: int):
        self._distribution, self._rng, self._size, self._reuse = distribution, rng, size, reuse
        self._keys = self._order = _NONE
        self._uses_left = 0

    def take(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the next `n` keys, and the keys of the pools that began with them."""
        taken, new, count = [], [], 0
        while count < n:
            if not len(self._order):
                if not self._uses_left:
                    self._keys, self._uses_left = self._distribution.draw(self._rng, self._size), self._reuse
                    new.append(self._keys)
                self._order, self._uses_left = self._rng.permutation(self._keys), self._uses_left - 1
            taken.append(self._order[: n - count])
            self._order = self._order[n - count :]
            count += len(taken[-1])
        return np.concatenate([_NONE, *taken]), np.concatenate([_NONE, *new])


def _check_out(keys_out: object) -> None:
    if not isinstance(keys_out, np.ndarray) or keys_out.dtype != np.int64 or keys_out.ndim != 1:
        given = f"{keys_out.dtype} {list(keys_out.shape)}" if isinstance(keys_out, np.ndarray) else type(keys_out)
        raise TypeError(f"keys are written to an int64 array [k]; got {given}")
    if not keys_out.flags.writeable:
        raise TypeError("keys are written to keys_out, which is not writeable")
