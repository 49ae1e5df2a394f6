"""Where keys are: what a home knows of the keys that are at home on it, what others believe, and what they remember.

Messages may overtake each other on their way over different ranks, so beliefs can be old. What keeps them from doing
harm: every move of a key has a number (its relocation counter), and a home keeps the newest; a rank that has given a
key away points to where it went until the home has confirmed that it knows; whoever is asked for a key that it does not
own sends the question there, or to the home. Beliefs that are only kept to save a hop (the cache) are never used to
forward, so that no two old beliefs can send a message round in a circle.
"""

from __future__ import annotations

import numpy as np

import cuda_ops
from pm.keys import make_keys
from pm.rank_index import RankArray, RankIndex

DEFAULT_CACHE_KEYS = 1 << 20


class Locations:
    """What one rank knows of where the keys of one group are.

    Invariant: `_moved` has every key that is at home here and was ever owned by another rank, with its owner and the
    highest relocation counter heard of; `_given_away` every key that this rank has given away and whose home has not
    confirmed that yet.

    Args:
        group: number of the group of keys.
        cache_keys: most keys in the cache; it is emptied when it is full. 0: no cache.
        keys: how many keys there may be, where what a home knows is to be kept in an array of them all; else None.
    """

    def __init__(
        self, rank: int, ranks: int, group: int, cache_keys: int = DEFAULT_CACHE_KEYS, keys: int | None = None
    ):
        self._rank, self._ranks, self._group = rank, ranks, group
        self._cache_keys = cache_keys
        self._moved = RankIndex() if keys is None else RankArray(keys)
        self._given_away = RankIndex()
        self._cache = RankIndex()

    @property
    def memory_bytes(self) -> int:
        return self._moved.memory_bytes + self._given_away.memory_bytes + self._cache.memory_bytes

    def home_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the home of each key: int64 `[n]` -> int64 `[n]`."""
        return cuda_ops.owners(make_keys(self._group, keys), self._ranks)

    def is_unmoved_home(self, keys: np.ndarray) -> np.ndarray:
        """Return, bool `[n]`, which keys are at home here and have never been anywhere else."""
        unmoved = self.home_of(keys) == self._rank
        if self._moved:
            at_home = np.flatnonzero(unmoved)
            unmoved[at_home] = self._moved.find(keys[at_home])[0] < 0
        return unmoved

    def next_hop(self, keys: np.ndarray, *, guess: bool = False) -> np.ndarray:
        """Return where to send a message for keys (int64 `[n]`) that this rank does not own.

        This rank itself where it is their home and they are on their way here. With `guess` (for the first hop only)
        the cache counts.
        """
        home = self.home_of(keys)
        target = home.copy()
        if guess and len(self._cache):
            cached, _ = self._cache.find(keys)
            target = np.where(cached >= 0, cached, target)
        if len(self._given_away):
            pointed, _ = self._given_away.find(keys)
            target = np.where(pointed >= 0, pointed, target)
        mine = np.flatnonzero(home == self._rank)
        if len(mine):
            owner, _ = self._moved.find(keys[mine])
            target[mine] = np.where(owner >= 0, owner, self._rank)
        return target

    def are_coming(self, keys: np.ndarray, source: int | np.ndarray) -> np.ndarray:
        """Return which keys, that are not here, are on their way here, as `source` (of all keys, or of each: int64
        `[n]`) has sent on a question about them.

        Those that are at home on `source`, and to whose next place nothing points: a home sends questions on to where
        it has heard that a key went, and what this rank has given away it points to until the home has taken that in.
        """
        home = self.home_of(keys)
        coming = home == source
        if not coming.any():
            return coming
        if len(self._given_away):
            coming &= (self._given_away.find(keys)[0] < 0) | (home == self._rank)
        own = np.flatnonzero(coming & (home == self._rank))
        if len(own):
            coming[own] = self._moved.find(keys[own])[0] == self._rank
        return coming

    def learn(self, keys: np.ndarray, owner: int) -> None:
        """Remember for later that `owner` owns `keys` (but for those that it, or this rank, is the home of)."""
        if not self._cache_keys or self._ranks == 2:  # of two ranks, a key's owner or whoever asks is its home
            return
        home = self.home_of(keys)
        keys = keys[(home != owner) & (home != self._rank)]
        if not len(keys):
            return
        if len(self._cache) + len(keys) > self._cache_keys:
            self._cache = RankIndex()
        self._cache.put(keys[: self._cache_keys], owner, 0)

    def moved(self, keys: np.ndarray, owner: np.ndarray | int, counters: np.ndarray) -> None:
        """Note, as the home of `keys`, where they went; news that is older than what is known is dropped."""
        self._moved.put_newer(keys, owner, counters)

    def gave_away(self, keys: np.ndarray, owner: int, parcels: np.ndarray) -> None:
        """Point to the new `owner` of keys that were ours until their homes have taken in the `parcels` that say so."""
        self._given_away.put(keys, owner, parcels)

    def arrived(self, keys: np.ndarray, counters: np.ndarray) -> None:
        """Keys have come here: this rank owns them now."""
        if len(self._given_away):
            self._given_away.remove(keys)
        mine = np.flatnonzero(self.home_of(keys) == self._rank)
        if len(mine):
            self.moved(keys[mine], self._rank, counters[mine])

    @property
    def waits_for_homes(self) -> bool:
        """Whether there are pointers that homes have not confirmed."""
        return len(self._given_away) > 0

    def confirm(self, acknowledged: np.ndarray) -> None:
        """Forget pointers that are not needed: `acknowledged` (int64 `[ranks]`) parcels were taken in by each rank."""
        if len(self._given_away):
            keys, owners, parcels = self._given_away.items()
            done = parcels <= acknowledged[self.home_of(keys)]
            self._given_away.remove(keys[done])
            if self._cache_keys:
                for owner in np.unique(owners[done]).tolist():
                    self.learn(keys[done & (owners == owner)], owner)

    def where(self, key: int) -> dict[str, object]:
        """Return what this rank knows of one key, for people."""
        keys = np.array([key], np.int64)
        home = int(self.home_of(keys)[0])
        known = {"home": home, "believed owner": int(self.next_hop(keys, guess=True)[0])}
        if home == self._rank:
            known["moves"] = max(0, int(self._moved.find(keys)[1][0]))
        return known
