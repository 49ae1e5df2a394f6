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

DEFAULT_CACHE_KEYS = 1 << 20


class RankOfKey:
    """A map from keys to (rank, number) that grows and shrinks. Keys are distinct within a call."""

    def __init__(self):
        self._index = cuda_ops.KeyIndex()
        self._rank = np.empty(16, np.int32)
        self._number = np.empty(16, np.int64)
        self._free = np.arange(15, -1, -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def memory_bytes(self) -> int:
        return self._index.memory_bytes + self._rank.nbytes + self._number.nbytes + self._free.nbytes

    def get(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ranks, numbers), int64 `[n]` each; rank -1 where a key is not there."""
        slots = self._index.find(keys)
        known = slots >= 0
        ranks = np.where(known, self._rank[slots], -1)
        return ranks.astype(np.int64), np.where(known, self._number[slots], -1)

    def put(self, keys: np.ndarray, ranks: np.ndarray | int, numbers: np.ndarray | int) -> None:
        slots = self._index.find(keys)
        absent = np.flatnonzero(slots < 0)
        if len(absent):
            self._make_room(len(absent))
            cut = len(self._free) - len(absent)
            made, self._free = self._free[cut:], self._free[:cut]
            self._index.add(keys[absent], made)
            slots[absent] = made
        self._rank[slots] = ranks
        self._number[slots] = numbers

    def put_newer(self, keys: np.ndarray, ranks: np.ndarray | int, numbers: np.ndarray) -> None:
        """As `put`, but for keys that are there with a number that is not smaller."""
        slots = self._index.find(keys)
        absent = slots < 0
        if absent.any():
            self._make_room(int(absent.sum()))
            cut = len(self._free) - int(absent.sum())
            made, self._free = self._free[cut:], self._free[:cut]
            self._index.add(keys[absent], made)
            slots[absent] = made
            self._number[made] = -1
        newer = numbers > self._number[slots]
        slots = slots[newer]
        self._rank[slots] = ranks if np.isscalar(ranks) else ranks[newer]
        self._number[slots] = numbers[newer]

    def remove(self, keys: np.ndarray) -> None:
        slots = self._index.remove(keys)
        self._free = np.concatenate([self._free, slots[slots >= 0]])

    def items(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (keys, ranks, numbers)."""
        keys, slots = self._index.items()
        return keys, self._rank[slots].astype(np.int64), self._number[slots]

    def _make_room(self, count: int) -> None:
        if count <= len(self._free):
            return
        old = len(self._rank)
        new = max(2 * old, old + count)
        self._rank = np.concatenate([self._rank, np.empty(new - old, np.int32)])
        self._number = np.concatenate([self._number, np.empty(new - old, np.int64)])
        self._free = np.concatenate([self._free, np.arange(new - 1, old - 1, -1, dtype=np.int64)])


class Locations:
    """What one rank knows of where the keys of one group are.

    Invariant: `_moved` has every key that is at home here and was ever owned by another rank, with its owner and the
    highest relocation counter heard of; `_given_away` every key that this rank has given away and whose home has not
    confirmed that yet.

    Args:
        group: number of the group of keys.
        cache_keys: most keys in the cache; it is emptied when it is full. 0: no cache.
    """

    def __init__(self, rank: int, ranks: int, group: int, cache_keys: int = DEFAULT_CACHE_KEYS):
        self._rank, self._ranks, self._group = rank, ranks, group
        self._cache_keys = cache_keys
        self._moved = RankOfKey()
        self._given_away = RankOfKey()
        self._cache = RankOfKey()

    @property
    def memory_bytes(self) -> int:
        return self._moved.memory_bytes + self._given_away.memory_bytes + self._cache.memory_bytes

    def home_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the home of each key: int64 `[n]` -> int64 `[n]`."""
        return cuda_ops.owners(make_keys(self._group, keys), self._ranks)

    def is_unmoved_home(self, keys: np.ndarray) -> np.ndarray:
        """Return, bool `[n]`, which keys are at home here and have never been anywhere else."""
        unmoved = self.home_of(keys) == self._rank
        if len(self._moved):
            at_home = np.flatnonzero(unmoved)
            unmoved[at_home] = self._moved.get(keys[at_home])[0] < 0
        return unmoved

    def next_hop(self, keys: np.ndarray, *, guess: bool = False) -> np.ndarray:
        """Return where to send a message for keys (int64 `[n]`) that this rank does not own.

        This rank itself where it is their home and they are on their way here. With `guess` (for the first hop only)
        the cache counts.
        """
        home = self.home_of(keys)
        target = home.copy()
        if guess and len(self._cache):
            cached, _ = self._cache.get(keys)
            target = np.where(cached >= 0, cached, target)
        if len(self._given_away):
            pointed, _ = self._given_away.get(keys)
            target = np.where(pointed >= 0, pointed, target)
        mine = np.flatnonzero(home == self._rank)
        if len(mine):
            owner, _ = self._moved.get(keys[mine])
            target[mine] = np.where(owner >= 0, owner, self._rank)
        return target

    def are_coming(self, keys: np.ndarray, source: int) -> np.ndarray:
        """Return which keys, that are not here, are on their way here, as `source` has sent on a question about them.

        Those that are at home on `source`, and to whose next place nothing points: a home sends questions on to where
        it has heard that a key went, and what this rank has given away it points to until the home has taken that in.
        """
        coming = self.home_of(keys) == source
        if source == self._rank:
            return coming & (self._moved.get(keys)[0] == self._rank)
        if len(self._given_away):
            coming &= self._given_away.get(keys)[0] < 0
        return coming

    def learn(self, keys: np.ndarray, owner: int) -> None:
        """Remember for later that `owner` owns `keys` (but for those that it, or this rank, is the home of)."""
        if not self._cache_keys:
            return
        home = self.home_of(keys)
        keys = keys[(home != owner) & (home != self._rank)]
        if not len(keys):
            return
        if len(self._cache) + len(keys) > self._cache_keys:
            self._cache = RankOfKey()
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
            known["moves"] = max(0, int(self._moved.get(keys)[1][0]))
        return known
