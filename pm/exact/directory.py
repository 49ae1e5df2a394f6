"""The directory: where this rank believes each key's main copy to be, and what it must know for others to find it.

Every key has a fixed home, a hash of the key, which is told of every move and so gets to the truth in the end. A key
that was never moved is with its home. Beside that a rank has pointers to rows that it gave away, until their homes have
heard of it, and a bounded cache of what it was told. After Renz-Wieland et al. 2022 (AdaPM, arXiv 2206.00470), with
messages for many keys at once.
"""

from __future__ import annotations

from collections import deque

import numpy as np

import cuda_ops
from pm.rank_index import MOST_RANKS, NOBODY, RankIndex


class Directory:
    """Where keys are, as far as rank `rank` of `ranks` knows. Its users hold the lock of the manager's structure.

    Invariants: of every key of which this rank is the home and whose record is not here (and was made) `_away` has the
    rank that the last move known here took it to, with the number of that move; of every key that this rank gave away,
    and whose home may not know of it yet, `_given` has the rank that it went to. A request that follows `forward_to`
    from rank to rank therefore meets only ever later moves, and gets to the owner.

    Memory: proportional to the rows away from this home, to those given away within a step or two, and to the cache.

    Args:
        cached_keys: most keys whose whereabouts are remembered without need.
    """

    def __init__(self, rank: int, ranks: int, cached_keys: int):
        if ranks > MOST_RANKS:
            raise ValueError(f"{ranks} ranks are too many: a key's owner is noted as one of {MOST_RANKS}")
        self.rank, self.ranks = rank, ranks
        self.cached_keys = cached_keys
        self._away = RankIndex()
        self._given = RankIndex()
        self._cache = RankIndex()
        self._unconfirmed: list[deque[tuple[int, int, np.ndarray]]] = [deque() for _ in range(ranks)]
        self._gifts = 0

    def home_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the home rank of each key: int64 `[n]` -> int64 `[n]`. Needs no lock."""
        return cuda_ops.owners(keys, self.ranks)

    @property
    def memory_bytes(self) -> int:
        return self._away.memory_bytes + self._given.memory_bytes + self._cache.memory_bytes

    @property
    def keys_given(self) -> int:
        """Number of keys whose homes may not know yet that this rank gave them away."""
        return len(self._given)

    @property
    def keys_away(self) -> int:
        """Number of keys of which this rank is the home, and which were moved away."""
        return len(self._away)

    @property
    def keys_cached(self) -> int:
        return len(self._cache)

    def is_away(self, keys: np.ndarray) -> np.ndarray:
        """Return for each key, of which this rank is the home, whether it was given away (bool `[n]`)."""
        return self._away.find(keys)[0] >= 0

    def forward_to(self, keys: np.ndarray, source: int) -> np.ndarray:
        """Return the rank to send requests of `source` on to, for keys that are not here: int64 `[n]`.

        `NOBODY` says to keep the request: a home sends it only to a rank that was given the record, and this rank has
        not given it away, so that the record is on its way here.
        """
        ranks, homes, given = self._known_at(keys)
        ranks[(homes == source) & ~given] = NOBODY
        return ranks

    def _known_at(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (rank that is nearer to the key, home, whether this rank gave it away) of keys that are not here."""
        homes = self.home_of(keys)
        ranks, _ = self._given.find(keys)
        given = ranks >= 0
        ranks[~given] = homes[~given]
        mine = np.flatnonzero(homes == self.rank)
        if len(mine):
            ranks[mine], _ = self._away.find(keys[mine])
            if (ranks[mine] < 0).any():
                raise RuntimeError(f"rank {self.rank} is home to key {keys[mine][ranks[mine] < 0][0]} and has lost it")
        return ranks, homes, given

    def ask_at(self, keys: np.ndarray) -> np.ndarray:
        """Return the rank that probably has each key, for keys that are not here: int64 `[n]`; never this rank."""
        ranks, homes, _ = self._known_at(keys)
        if len(self._cache):
            cached, _ = self._cache.find(keys)
            guessed = (cached >= 0) & (ranks == homes) & (cached != self.rank)
            ranks[guessed] = cached[guessed]
        return ranks

    def remember(self, keys: np.ndarray, rank: int) -> None:
        """Distinct `keys` were seen at `rank`: ask there next time. What is remembered may be wrong."""
        if len(self._cache) + len(keys) > self.cached_keys:
            self._cache.clear()
            keys = keys[: self.cached_keys]
        if len(keys):
            self._cache.put(keys, rank, 0)

    # Moves

    def gave(self, keys: np.ndarray, rank: int, moves: np.ndarray) -> list[np.ndarray]:
        """This rank gives `keys` (int64 `[n]`) to `rank`, in their `moves`-th moves (int32 `[n]`).

        Returns:
            positions: by rank, those of the keys whose home it is and which it must be told of with MOVED.
        """
        homes = self.home_of(keys)
        mine = np.flatnonzero(homes == self.rank)
        self._away.put(keys[mine], rank, moves[mine].astype(np.int64))
        others = np.flatnonzero(homes != self.rank)
        self._gifts += 1
        if len(others):
            self._given.put(keys[others], rank, self._gifts)
        told = [np.flatnonzero(homes == home) for home in range(self.ranks)]
        told[self.rank] = told[rank] = np.empty(0, np.int64)  # `rank` knows when it gets them
        self.remember(keys[(homes != self.rank) & (homes != rank)], rank)
        return told

    def await_homes(self, keys: np.ndarray, step: int) -> None:
        """The homes of `keys`, just given away, will have heard of it when they are ready after `step`."""
        homes = self.home_of(keys)
        for home in np.unique(homes).tolist():
            if home != self.rank:
                self._unconfirmed[home].append((step, self._gifts, keys[homes == home]))

    def home_is_ready(self, home: int, version: int) -> None:
        """`home` has applied all steps below `version`, and heard whatever was sent before them."""
        waiting = self._unconfirmed[home]
        while waiting and waiting[0][0] < version:
            _, gift, keys = waiting.popleft()
            ranks, gifts = self._given.find(keys)
            self._given.remove(keys[(ranks >= 0) & (gifts == gift)])  # others have come and gone again since

    def arrived(self, keys: np.ndarray) -> None:
        """The records of `keys` are here."""
        mine = self.home_of(keys) == self.rank
        self._away.remove(keys[mine])
        self._given.remove(keys[~mine])

    def moved(self, keys: np.ndarray, rank: int, moves: np.ndarray, held: np.ndarray) -> None:
        """MOVED: `keys` of which this rank is the home went to `rank` in their `moves`-th moves.

        `held` (bool `[n]`) says which are here; of these, and of others that have moved on since, it is old news.
        """
        ranks, known = self._away.find(keys)
        news = ~held & ((ranks < 0) | (known < moves))
        self._away.put(keys[news], rank, moves[news].astype(np.int64))
