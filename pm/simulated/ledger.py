"""What simulated workers have written, kept so that every value that is read says which writes are in it.

Keys are of two kinds. To a *shared* key every rank adds: its j-th addition is 4 ** j, in words of its own, so the
digits of what is read, to base 4, name the additions that are in it; a digit other than 0 and 1 is one that was applied
twice, or that was never made. A *versioned* key is written by one rank alone, which adds 1 or sets it: its value is the
number of its writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pm.asynchronous.holdings import Group

_TWICE = 0x2AAAAAAAAAAAAAAA  # the upper bit of each digit


class Violation(AssertionError):
    """The protocol has broken a promise."""


@dataclass
class Reading:
    """A read that has begun.

    Args:
        rank, group, keys: whose, and of what.
        floor: writes that it must contain (see `Ledger`), int64 `[n, ranks]`.
    """

    rank: int
    group: int
    keys: np.ndarray
    floor: np.ndarray


class Ledger:
    """Writes by group, in arrays of int64 `[capacity, ranks]`: for shared keys, sets of additions as digits, by rank;
    for versioned ones the number of writes in every place.

    Args:
        groups: of keys; their records have at least one word for each rank.
        ranks: how many write.
        staleness: how many clocks a reader may be behind; None: any number.
    """

    def __init__(self, groups: list[Group], ranks: int, staleness: int | None):
        self.groups, self.ranks, self.staleness = groups, ranks, staleness
        shapes = [(group.capacity, ranks) for group in groups]
        self.versioned = [np.arange(group.capacity)[:, None] % 4 == 3 for group in groups]
        self.written = [np.zeros(shape, np.int64) for shape in shapes]
        self._counts = [np.zeros(shape, np.int64) for shape in shapes]
        self._by_clock: list[dict[int, np.ndarray]] = [{} for _ in groups]
        self._seen = [[np.zeros(shape, np.int64) for _ in range(ranks)] for shape in shapes]
        self.synced = [np.zeros(shape, np.int64) for shape in shapes]
        self._own = np.eye(ranks, dtype=bool)

    # Writes

    def writes_of(self, group: int, rank: int) -> np.ndarray:
        """Return what `rank` has written so far, `[capacity, ranks]`."""
        return np.where(self._is_own(group, slice(None), rank), self.written[group], 0)

    def _is_own(self, group: int, keys: np.ndarray | slice, rank: int) -> np.ndarray:
        everything = np.arange(self.groups[group].capacity)
        return np.where(self.versioned[group][keys], (everything[keys] % self.ranks == rank)[:, None], self._own[rank])

    def push(self, rank: int, clock: int, group: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (those of `keys` that may be pushed to, updates), and note that they are."""
        most = (np.finfo(self.groups[group].record_class.dtype).nmant + 1) // 2 - 1
        versioned = self.versioned[group][keys, 0]
        keys = keys[np.where(versioned, keys % self.ranks == rank, self._counts[group][keys, rank] < most)]
        versioned = self.versioned[group][keys]
        power = 4 ** self._counts[group][keys, rank]
        self._counts[group][keys, rank] += ~versioned[:, 0]
        changes = np.where(versioned, 1, self._own[rank] * power[:, None])
        self._note(group, keys, clock, self.written[group][keys] + changes)
        return keys, self._spread(group, changes)

    def set(self, rank: int, clock: int, group: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (those of `keys` that may be set, values), and note that they are."""
        keys = keys[self.versioned[group][keys, 0] & (keys % self.ranks == rank)]
        values = self.written[group][keys] + 1
        self._note(group, keys, clock, values)
        return keys, self._spread(group, values)

    def _note(self, group: int, keys: np.ndarray, clock: int, written: np.ndarray) -> None:
        at_clock = self._by_clock[group].setdefault(clock, np.zeros_like(self.written[group]))
        fresh = np.where(self.versioned[group][keys], written, written ^ self.written[group][keys])
        at_clock[keys] = self._join(group, keys, at_clock[keys], fresh)
        self.written[group][keys] = written

    def _spread(self, group: int, of_ranks: np.ndarray) -> np.ndarray:
        """Return a record's words: word w is that of rank w modulo the number of ranks."""
        info = self.groups[group]
        return of_ranks[:, np.arange(info.width) % self.ranks].astype(info.record_class.dtype)

    def total(self, group: int) -> np.ndarray:
        """Return the values that all writes together make, `[capacity, width]`."""
        return self._spread(group, self.written[group])

    # Reads

    def begin_read(self, rank: int, clock: int, group: int, keys: np.ndarray) -> Reading:
        """A worker of `rank` at `clock` begins to read keys. It must see what this rank has written and has seen, what
        was synchronised, and with a bound on staleness all that was written at clocks before it.
        """
        own = np.where(self._is_own(group, keys, rank), self.written[group][keys], 0)
        parts = [self._seen[group][rank][keys], self.synced[group][keys]]
        if self.staleness is not None:
            parts += [part[keys] for at, part in self._by_clock[group].items() if at < clock - self.staleness]
        for part in parts:
            own = self._join(group, keys, own, part)
        return Reading(rank, group, keys, own)

    def end_read(self, reading: Reading, values: np.ndarray) -> None:
        """Values `[n, width]` were read.

        Raises:
            Violation: if they lack a write that they must contain, or contain one that was not made, or one twice.
        """
        rank, group, keys = reading.rank, reading.group, reading.keys
        held = self.held(group, keys, values, f"read on rank {rank}")
        self._demand(reading.floor, held, group, keys, f"rank {rank} read too little", values)
        self._seen[group][rank][keys] = self._join(group, keys, self._seen[group][rank][keys], held)

    def held(self, group: int, keys: np.ndarray, values: np.ndarray, where: str) -> np.ndarray:
        """Return the writes that values `[n, width]` contain.

        Raises:
            Violation: if the values are not the sum of writes that were made, each once.
        """
        whole = values.astype(np.int64)
        held = whole[:, : self.ranks]
        torn = (self._spread(group, held) != values).any(axis=1) | (whole < 0).any(axis=1)
        twice = ((held & _TWICE) != 0).any(axis=1) & ~self.versioned[group][keys, 0]
        for broken, what in ((torn, "torn"), (twice, "applied twice")):
            if broken.any():
                raise Violation(f"{where}: {what}: {_show(group, keys, values, broken)}")
        self._demand(held, self.written[group][keys], group, keys, f"{where}: more than was written", values)
        return held

    def demand(self, floor: np.ndarray, group: int, keys: np.ndarray, values: np.ndarray, where: str) -> None:
        """Raise a Violation unless `values` of `keys` contain the writes `floor` `[n, ranks]`."""
        self._demand(floor, self.held(group, keys, values, where), group, keys, where, values)

    def sync(self, group: int, writes: np.ndarray) -> None:
        """Whoever reads from now on must see `writes` `[capacity, ranks]`."""
        self.synced[group] = self._join(group, slice(None), self.synced[group], writes)

    def _join(self, group: int, keys: np.ndarray | slice, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.where(self.versioned[group][keys], np.maximum(left, right), left | right)

    def _demand(self, less: np.ndarray, more: np.ndarray, group: int, keys, what: str, values: np.ndarray) -> None:
        missing = np.where(self.versioned[group][keys], less > more, (less & ~more) != 0).any(axis=1)
        if missing.any():
            at = np.flatnonzero(missing)[0]
            raise Violation(f"{what}: {_show(group, keys, values, missing)}: {less[at]} is not in {more[at]}")


def _show(group: int, keys: np.ndarray, values: np.ndarray, which: np.ndarray) -> str:
    at = np.flatnonzero(which)[0]
    return f"group {group} key {keys[at]} holds {values[at]} ({which.sum()} of {len(keys)} keys)"
