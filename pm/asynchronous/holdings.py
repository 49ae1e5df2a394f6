"""What one rank holds of one group of keys: records that it owns, and copies of records that others own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, unique

import numpy as np

import cuda_ops
from pm import masks
from pm.asynchronous.place_index import PlaceIndex
from pm.partition import each_rank
from pm.storage.store import RecordClass, RecordStore, reserve_zeros

NO_KEY = -1
SOMEBODY, THE_OWNER = -1, -2


@dataclass(frozen=True)
class Group:
    """Keys whose records have one layout.

    Args:
        number: the group's number, the same on all ranks.
        capacity: how many keys there are.
        record_class: the records' layout.
        make: called with (keys int64 `[n]`, out `[n, width]`): writes the records of keys that nobody has touched.
        moves: whether records move; else their state stays with the owner, copies have values alone, and what is added
            to a copy is no change of its value but something that `take_in` of the owner makes one of.
        made: called with (keys, slots) once records of keys are made, to fill in what does not travel.
        before_reading: called with the slots of owned records before their values are read.
        take_in: called with (slots, changes `[n, width]`) that others have sent, in place of adding them to records.
        firsts: the first key of each of the parts that are counted by themselves (int64, ascending); None: it has none.
        bound: its keys are below this; None: below `capacity`.
    """

    number: int
    capacity: int
    record_class: RecordClass
    make: Callable[[np.ndarray, np.ndarray], None]
    moves: bool = True
    made: Callable[[np.ndarray, np.ndarray], None] | None = None
    before_reading: Callable[[np.ndarray], None] | None = None
    take_in: Callable[[np.ndarray, np.ndarray], None] | None = None
    firsts: np.ndarray | None = None
    bound: int | None = None

    @property
    def key_bound(self) -> int:
        """All keys are below this."""
        return self.capacity if self.bound is None else self.bound

    @property
    def width(self) -> int:
        """Words of a record that travel: value and state; where records do not move, the value alone."""
        return self.record_class.dim + (self.record_class.state_words if self.moves else 0)


@unique
class Copy(IntEnum):
    """What a slot of a copy is at.

    WANTED: an intent is live and its owner has not been asked yet; REQUESTED: it has; ACTIVE: the copy is here;
    REFUSED: the owner gives no copy, and knows of the intent; LEAVING: the owner has been told that the copy is gone,
    with its last changes, and has not said yet that it knows; PUT_OFF: its owner, which knows nothing of the intent, is
    asked again when the use is near.
    """

    FREE = 0
    WANTED = 1
    REQUESTED = 2
    ACTIVE = 3
    REFUSED = 4
    LEAVING = 5
    PUT_OFF = 6


_HERE = int(Copy.ACTIVE), int(Copy.LEAVING)


class Owned:
    """The records that this rank owns.

    By slot: `keys`; `live` counts the intents of this rank's workers; `holders` is the set of ranks with a live intent
    (which hold a copy, where copies are made); `counters` how often the key has moved; `behind` those of the
    holders that have not been sent all changes by others, with `late` the slots where there are any (and others);
    `shared_until` the clock that `pm.decision.shared_longer` has counted copies up to.
    """

    def __init__(self, group: Group, ranks: int, places: PlaceIndex):
        self.group = group
        self.store = RecordStore(group.record_class, group.capacity, index=places.records)
        words = masks.words_for(ranks)
        notes = reserve_zeros(group.capacity * (2 + 2 * words), np.int64).reshape(-1, 2 + 2 * words)
        self.keys = notes[:, 0]  # what is known of a slot lies together: to look at all of it is one miss of the cache
        self.live, self.counters = (notes.view(np.int32)[:, column] for column in (2, 3))
        self.holders = notes.view(np.uint64)[:, 2 : 2 + words]
        self.behind = notes.view(np.uint64)[:, 2 + words :]
        self.shared_until = reserve_zeros(group.capacity, np.int32)
        self.notes_bytes = notes.strides[0] + self.shared_until.itemsize
        self.late: list[np.ndarray] = []
        self._used: dict[int, list[np.ndarray]] = {}  # since the last exchange, by whom: what holders changed,
        self._told_all: list[np.ndarray] = []  # and of what all holders are told

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the slots of keys, -1 where they are not owned: int64 `[n]`."""
        return self.store.index.find(keys)

    def values(
        self, slots: np.ndarray, out: np.ndarray | None = None, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the words that travel, `[n, width]`; or write (the first of) them to rows `positions` of `out`."""
        if self.group.before_reading is not None:
            self.group.before_reading(slots)
        store = self.store
        if out is None:
            return cuda_ops.gather(store.words, store.stride, slots, width=self.group.width)
        return cuda_ops.gather(store.words, store.stride, slots, out, positions)

    def add_records(self, keys: np.ndarray, values: np.ndarray, counters: np.ndarray | int) -> np.ndarray:
        """Take in records of keys that are not here, or of which there were copies; return their slots."""
        slots = self.store.allocate(len(keys))
        self.store.put(slots, values)
        self.keys[slots], self.live[slots], self.counters[slots] = keys, 0, counters
        self.holders[slots], self.behind[slots], self.shared_until[slots] = 0, 0, 0
        self.store.index.put(keys, slots)
        return slots

    def make(self, keys: np.ndarray) -> np.ndarray:
        """Make records of keys that nobody has touched; return their slots."""
        values = np.empty((len(keys), self.group.width), self.store.words.dtype)
        self.group.make(keys, values)
        slots = self.add_records(keys, values, 0)
        if self.group.made is not None:
            self.group.made(keys, slots)
        return slots

    def add(self, slots: np.ndarray, deltas: np.ndarray) -> None:
        """Add `deltas` `[n, width]` to records."""
        self.store.keep(slots)
        cuda_ops.merge(self.store.words, self.store.stride, slots, deltas)

    def put(self, slots: np.ndarray, values: np.ndarray) -> None:
        """Set records to `values` `[n, width]`."""
        self.store.put(slots, values)

    def mark_changed(self, slots: np.ndarray, by: int) -> None:
        """Note that the holder `by` has changed records, or `THE_OWNER`, or `SOMEBODY`: then all holders are told in
        the next exchange."""
        late = cuda_ops.mark_behind(slots, self.holders, self.behind, by)
        if len(late):
            self.late.append(late)
        if by == SOMEBODY:
            slots = slots[~masks.are_empty(self.behind[slots])]
            self._told_all += [slots] if len(slots) else []
        elif by != THE_OWNER:
            self._used.setdefault(by, []).append(slots)

    @property
    def has_changed(self) -> bool:
        """Whether an exchange would have some holders sent something, perhaps."""
        return bool(self._used or self._told_all)

    def add_holder(self, slots: np.ndarray, holder: np.ndarray) -> None:
        """The one rank in the set `holder` has a live intent for records, and is about to be sent what they are."""
        self.holders[slots] |= holder
        self.behind[slots] &= ~holder

    def remove_holder(self, slots: np.ndarray, holder: np.ndarray) -> None:
        """The one rank in the set `holder` has no live intent for records any more."""
        self.holders[slots] &= ~holder
        self.behind[slots] &= ~holder

    def take_refreshes(self, peers: Sequence[int], everything: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (peer, slots int64 `[n]`) of what holders are sent in an exchange: of what they have changed themselves
        since the last, and so use, what others have changed too; or `everything` that they lack."""
        used, told_all = self._used, self._told_all
        self._used, self._told_all = {}, []
        if everything:
            told_all, self.late = self.late, []
        for peer in peers:
            slots = [*told_all, *used.get(peer, ())]
            if slots:
                yield peer, cuda_ops.take_behind(np.concatenate(slots), self.behind, peer)

    @property
    def notes(self) -> tuple[np.ndarray, ...]:
        """What is noted by slot, as `cuda_ops.take_over` and `cuda_ops.give_up` have it."""
        return (
            self.keys,
            self.live,
            self.counters,
            self.holders,
            self.behind,
            self.shared_until,
        )

    def give_up(self, slots: np.ndarray, receiver: np.ndarray, *, promotes: bool) -> tuple:
        """Forget records, which the one rank in the set `receiver` is going to own; see `cuda_ops.give_up`."""
        store = self.store
        given = cuda_ops.give_up(slots, receiver, (store.words, store.stride, self.group.width), self.notes, promotes)
        store.index.remove(given[1])
        store.release_slots(slots)
        return given


class Copies:
    """Copies of records that others own, and keys that this rank waits for.

    A copy's record is [what it holds now | what it held when changes were last taken from it | changes on their way to
    the owner], `width` words each. By slot: `keys`; `states` (a `Copy`); `live` counts the intents of this rank's
    workers; `owners` is who has made the copy, `parcels` the number of the parcel to the owner that carries the changes
    on their way (-1: none are), `dirty` whether there may be changes to take; `due` the clock of the rank's fastest
    worker from which a use is near.
    """

    def __init__(self, group: Group, ranks: int, places: PlaceIndex):
        self.group, self.ranks = group, ranks
        self.width = group.width
        words = 3 * group.width - group.record_class.dim
        record_class = replace(group.record_class, state_words=words, catches_up=False)
        self.store = RecordStore(record_class, group.capacity, index=places.copies)
        notes = reserve_zeros(group.capacity * 4, np.int64).reshape(-1, 4)
        self.keys, self.parcels = notes[:, 0], notes[:, 1]
        self.live, self.owners = (notes.view(np.int32)[:, column] for column in (4, 5))
        self.states, self.dirty = notes.view(np.int8)[:, 24], notes.view(np.bool_)[:, 25]
        self.due = notes.view(np.int32)[:, 7]
        self.notes_bytes = notes.strides[0]
        self.changed: list[np.ndarray] = []

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (slots, states) of keys, -1 and FREE where they are not here."""
        slots = self.store.index.find(keys)
        return slots, np.where(slots >= 0, self.states[slots], Copy.FREE)

    def add_wanted(self, keys: np.ndarray, due: int) -> np.ndarray:
        """Make room for keys that this rank asks for, and whose use is near from `due` on; return their slots."""
        slots = self.store.allocate(len(keys))
        self.store.index.add(keys, slots)
        self.keys[slots], self.states[slots], self.live[slots] = keys, Copy.WANTED, 0
        self.owners[slots], self.parcels[slots], self.dirty[slots] = -1, -1, False
        self.due[slots] = due
        return slots

    def remove(self, slots: np.ndarray) -> None:
        """Forget keys that this rank has no copy of any more."""
        if len(slots):
            self.store.index.remove(self.keys[slots])
            self.states[slots], self.live[slots], self.dirty[slots] = Copy.FREE, 0, False
            self.store.release_slots(slots)
            self.keys[slots] = NO_KEY

    def by_owner(self, slots: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Return (owner, its part of `slots`) for each owner that has any."""
        return [(owner, slots[some]) for owner, some in each_rank(self.owners[slots].astype(np.int64), self.ranks)]

    def _part(self, slots: np.ndarray, part: int) -> np.ndarray:
        store = self.store
        return cuda_ops.gather(store.words, store.stride, slots, width=self.width, offset=part * self.width)

    def _put(self, slots: np.ndarray, part: int, values: np.ndarray) -> None:
        cuda_ops.scatter(self.store.words, self.store.stride, slots, values, offset=part * self.width)

    def values(
        self, slots: np.ndarray, out: np.ndarray | None = None, positions: np.ndarray | None = None
    ) -> np.ndarray:
        """Return what copies hold now, `[n, width]`; or write (the first words of) it to rows `positions` of `out`."""
        if out is None:
            return self._part(slots, 0)
        return cuda_ops.gather(self.store.words, self.store.stride, slots, out, positions)

    def add(self, slots: np.ndarray, deltas: np.ndarray) -> None:
        """Add `deltas` `[n, width]` to what copies hold."""
        cuda_ops.merge(self.store.words, self.store.stride, slots, deltas)
        self.mark_changed(slots)

    def mark_changed(self, slots: np.ndarray) -> None:
        """Note that copies hold changes that their owners do not know of."""
        fresh = slots[~self.dirty[slots]]
        if len(fresh):
            self.dirty[fresh] = True
            self.changed.append(fresh)

    def install(self, slots: np.ndarray, values: np.ndarray, owner: int) -> None:
        """Begin active copies of what `owner` holds."""
        self._put(slots, 0, values)
        self._put(slots, 1, values)
        self.states[slots], self.owners[slots] = Copy.ACTIVE, owner
        self.parcels[slots], self.dirty[slots] = -1, False

    def untold(self, slots: np.ndarray, acknowledged: int) -> np.ndarray:
        """Return the changes, `[n, width]`, that an owner which has taken in parcels up to `acknowledged` lacks."""
        changes = self._part(slots, 0)
        changes -= self._part(slots, 1)
        under_way = np.flatnonzero(self.parcels[slots] > acknowledged)
        if len(under_way):
            changes[under_way] += self._part(slots[under_way], 2)
        return changes

    def refresh(self, slots: np.ndarray, values: np.ndarray, acknowledged: int) -> None:
        """The owner holds `values` `[n, width]`, and has taken in parcels up to `acknowledged`."""
        changes = self._part(slots, 0)
        changes -= self._part(slots, 1)
        base = values.copy()
        under_way = np.flatnonzero(self.parcels[slots] > acknowledged)
        if len(under_way):
            base[under_way] += self._part(slots[under_way], 2)
        changes += base
        self._put(slots, 0, changes)
        self._put(slots, 1, base)

    def take_changes(self, slots: np.ndarray) -> np.ndarray:
        """Return what has changed in copies since this was last asked, `[n, width]`, and keep it as under way."""
        now = self._part(slots, 0)
        changes = now - self._part(slots, 1)
        self._put(slots, 1, now)
        self._put(slots, 2, changes)
        self.dirty[slots] = False
        return changes

    def forget_untaken(self, slots: np.ndarray) -> None:
        """What has changed in copies since changes were last taken is of no concern to owners."""
        self._put(slots, 1, self._part(slots, 0))
        self.dirty[slots] = False

    def forget_changes_under_way(self, slots: np.ndarray) -> None:
        """The owner has taken in what was under way."""
        self._put(slots, 2, np.zeros((len(slots), self.width), self.store.words.dtype))


class CopiesOfValues(Copies):
    """Copies of records that do not move: [value | sum of what was added to the copy | unused].

    What is added (gradients) changes no value here: the owner is sent the sum, and sends back what it made of it.
    """

    def add(self, slots: np.ndarray, deltas: np.ndarray) -> None:
        cuda_ops.merge(self.store.words, self.store.stride, slots, deltas, offset=self.width)
        self.mark_changed(slots)

    def install(self, slots: np.ndarray, values: np.ndarray, owner: int) -> None:
        super().install(slots, values, owner)
        self._put(slots, 1, np.zeros_like(values))

    def untold(self, slots: np.ndarray, acknowledged: int) -> np.ndarray:
        return self._part(slots, 1)

    def refresh(self, slots: np.ndarray, values: np.ndarray, acknowledged: int) -> None:
        self._put(slots, 0, values)

    def take_changes(self, slots: np.ndarray) -> np.ndarray:
        changes = self._part(slots, 1)
        self._put(slots, 1, np.zeros_like(changes))
        self.dirty[slots] = False
        return changes


class Holdings:
    """A group's `owned` records and `copies` on one rank. A key is in one of them at most.

    Args:
        group, ranks: as there.
        by_key: whether places are kept in an array of all keys below the group's bound (see `PlaceIndex`).
    """

    def __init__(self, group: Group, ranks: int, *, by_key: bool = False):
        self.group = group
        self.by_key = by_key
        self._index = PlaceIndex(group.key_bound if by_key else None)
        self.owned = Owned(group, ranks, self._index)
        self.copies = (Copies if group.moves else CopiesOfValues)(group, ranks, self._index)

    def places(self, keys: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
        """Return where keys are: the slot of an owned record, -2 - slot of a copy, or -1; int64 `[n]`.

        `known`: what this returned for the same keys before, which is brought up to date and returned. Those that are
        still there cost no search.
        """
        if known is None:
            return self._index.find(keys)
        moved = cuda_ops.moved_places(keys, known, self.owned.keys, self.copies.keys)
        if len(moved):
            known[moved] = self._index.find(keys[moved])
        return known

    def take_over(
        self, keys: np.ndarray, values: np.ndarray | None, counters: np.ndarray, holders: np.ndarray, acknowledged: int
    ) -> np.ndarray:
        """Own records of keys from now on; return their slots.

        Args:
            values: what was sent of them, `[n, width]`; None: the copies here are what they are.
            counters: how often they have moved.
            holders: of their copies elsewhere, uint64 `[n, words]`, or none where all are empty.
            acknowledged: the parcels up to this one the former owner had taken in.
        """
        owned, copies = self.owned, self.copies
        slots = owned.store.allocate(len(keys))
        owned.store.keep(slots)
        freed = cuda_ops.take_over(
            keys,
            self._index.find(keys),
            values,
            counters,
            holders,
            slots,
            (owned.store.words, owned.store.stride, self.group.width),
            owned.notes,
            (copies.store.words, copies.store.stride),
            (copies.keys, copies.live, copies.states, copies.dirty, copies.parcels),
            _HERE,
            acknowledged,
        )
        owned.store.index.put(keys, slots)
        copies.store.release_slots(freed)
        return slots

    @property
    def memory_bytes(self) -> int:
        owned, copies = self.owned, self.copies
        return (
            owned.store.memory_bytes
            + copies.store.memory_bytes
            + owned.notes_bytes * owned.store.slots_in_use
            + copies.notes_bytes * copies.store.slots_in_use
        )


def joined_entries(
    entries: list[tuple[Holdings, np.ndarray, np.ndarray]], keys_of: Callable[[Holdings], np.ndarray]
) -> list[tuple[Holdings, np.ndarray]]:
    """Return (holdings, slots, each once) for all of the entries (holdings, keys int64 `[n]`, the slots int64 `[n]` in
    which they were) whose keys are still there, where `keys_of(holdings)` has keys by slot."""
    alike: dict[int, tuple[Holdings, list[np.ndarray], list[np.ndarray]]] = {}
    for holdings, keys, slots in entries:
        _, all_keys, all_slots = alike.setdefault(id(holdings), (holdings, [], []))
        all_keys.append(keys)
        all_slots.append(slots)
    joined = []
    for holdings, keys, slots in alike.values():
        at = slots[0] if len(slots) == 1 else np.concatenate(slots)
        at = at[keys_of(holdings)[at] == (keys[0] if len(keys) == 1 else np.concatenate(keys))]
        joined.append((holdings, at if len(slots) == 1 else cuda_ops.dedup(at)[0]))
    return joined
