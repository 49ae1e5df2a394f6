"""The asking side: the intents of a rank's workers, the keys that it claims by them, and its copies."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from intents.timing import ActionTiming
from pm.asynchronous.holdings import Copy, Holdings, joined_entries
from pm.asynchronous.place_index import ABSENT
from pm.messages import Kind, Message, narrow, request, widen
from pm.partition import each_rank

if TYPE_CHECKING:
    from pm.asynchronous.node import Node

_FOR_EVER = 1 << 62
_ASKED_AGAIN = -1  # in place of when the use is near
_MOST_ROUNDS_TO_ANSWER, _FORGOTTEN_IN_A_ROUND = 64.0, 0.02


@dataclass
class Intent:
    """Distinct keys (int64 `[n]`) of a group that a worker will access while its clock is in [start, end].

    `end` None: until it is said to be over. `places` is where the keys were when last seen (`Holdings.places`),
    `is_live` from when it is acted on. `generation` counts how often the
    intents for the group had been forgotten before.
    """

    group: int
    keys: np.ndarray
    start: int
    end: int | None
    places: np.ndarray | None = None
    is_live: bool = False
    is_over: bool = False
    generation: int = 0


@dataclass
class Clock:
    """A worker's clock, and its intents: those not acted on yet by start, those that are live by end.

    Entries are (start or end, order of arrival, intent).
    """

    timing: ActionTiming
    now: int = 0
    waiting: list[tuple[int, int, Intent]] = field(default_factory=list)
    live: list[tuple[int, int, Intent]] = field(default_factory=list)
    closed: bool = False


class Claims:
    """What this rank intends, and what it has got for it.

    Invariant: a key with a live intent here is owned, or it is in `copies`; there it is asked for in the next round,
    has been asked for, is active, or was refused; unless it is LEAVING, and will be WANTED again once the owner knows.
    """

    def __init__(self, node: Node):
        self._node = node
        self._order = itertools.count()
        self.clocks: list[Clock] = []  # of the workers that are not done
        self._fastest_closed = 0
        self.is_paused = False
        self._generations: Counter[int] = Counter()
        self._finished: list[Intent] = []
        self._wanted: list[tuple[Holdings, np.ndarray, np.ndarray]] = []  # keys, and their slots then
        self._ending: list[tuple[Holdings, np.ndarray, np.ndarray]] = []  # the same
        self._leaving: list[tuple[Holdings, np.ndarray, np.ndarray, int, int]] = []  # and owner, parcel that says so
        self._rounds_to_answer, self._came_late = node.rounds_to_answer, False
        self._put_off: dict[int, list[tuple[Holdings, np.ndarray, np.ndarray]]] = {}  # by `due`, as `_wanted`

    # Clocks and intents

    def add_clock(self) -> Clock:
        """Return the clock of another worker."""
        self.clocks.append(Clock(ActionTiming(enabled=self._node.acts_late), self.now))
        return self.clocks[-1]

    @property
    def now(self) -> int:
        """The rank's clock: that of the slowest of its workers."""
        return min((clock.now for clock in self.clocks), default=0)

    @property
    def fastest(self) -> int:
        """The clock of the fastest of the rank's workers, those that are done too: it never falls."""
        return max([self._fastest_closed, *(clock.now for clock in self.clocks)])

    @property
    def slowest(self) -> int:
        """The clock that others may have to wait for: a rank whose workers are all done keeps nobody waiting."""
        return self.now if self.clocks else _FOR_EVER

    def intend(self, clock: Clock, group: int, keys: np.ndarray, start: int, end: int | None) -> Intent:
        """A worker will access distinct `keys` while its clock is in [start, end], or from `start` on."""
        intent = Intent(group, keys, start, end, generation=self._generations[group])
        if len(keys) and (end is None or end >= clock.now) and self._node.techniques != "none":
            heapq.heappush(clock.waiting, (start, next(self._order), intent))
        return intent

    def finish(self, intent: Intent) -> None:
        """An intent without an end is over."""
        intent.is_over = True
        if intent.is_live and intent.generation == self._generations[intent.group]:
            self._finished.append(intent)

    def forget_group(self, number: int) -> None:
        """Let all intents for keys of a group end without notice, and forget what was asked for by them."""
        self._generations[number] += 1
        for clock in self.clocks:
            clock.waiting = [entry for entry in clock.waiting if entry[-1].group != number]
            clock.live = [entry for entry in clock.live if entry[-1].group != number]
            heapq.heapify(clock.waiting)
            heapq.heapify(clock.live)
        self._finished = [intent for intent in self._finished if intent.group != number]
        for name in ("_wanted", "_ending", "_leaving"):
            setattr(self, name, [entry for entry in getattr(self, name) if entry[0].group.number != number])
        for clock, entries in list(self._put_off.items()):
            self._put_off[clock] = [entry for entry in entries if entry[0].group.number != number]

    def close(self, clock: Clock) -> None:
        """A worker is done: its intents end, and nobody waits for its clock; again: does nothing."""
        if clock.closed:
            return
        clock.closed = True
        self._fastest_closed = max(self._fastest_closed, clock.now)
        self.clocks = [other for other in self.clocks if other is not clock]
        clock.waiting.clear()
        self._finished += [intent for _, _, intent in clock.live]
        clock.live.clear()

    @property
    def has_work(self) -> bool:
        changed = any(holdings.copies.changed for holdings in self._node.holdings)
        if (changed and self._node.exchange_is_due) or self._leaving:
            return True
        due = any(clock.live and clock.live[0][0] < clock.now for clock in self.clocks)
        due = due or min(self._put_off, default=_FOR_EVER) <= self.fastest
        moves = bool(due or self._finished or self._wanted or self._ending or self._has_due_intents())
        return moves and not self.is_paused

    @property
    def has_keys_to_ask_for(self) -> bool:
        """Whether the next round asks for keys."""
        return bool(self._wanted) and not self.is_paused

    def _has_due_intents(self) -> bool:
        return any(clock.waiting and clock.waiting[0][0] < self._acts_before(clock) for clock in self.clocks)

    def _acts_before(self, clock: Clock) -> float:
        return clock.timing.acts_before(clock.now)

    def round(self) -> None:
        """Act on intents that are due, give up keys whose intents have ended, ask for others, send changes."""
        for clock in self.clocks:
            clock.timing.round_begins(clock.now)
        self.settle_leaving()
        if self._rounds_to_answer is not None:
            self._put_off_less_or_more()
        if not self.is_paused:
            self._move_on()
        if self._node.exchange_is_due:
            for holdings in self._node.holdings:
                self._send_changes(holdings)

    def _move_on(self) -> None:
        """Begin the intents that are due, end those that are over, give up and ask for keys."""
        for clock in self.clocks:
            self._act(clock)
            while clock.live and clock.live[0][0] < clock.now:
                self._finished.append(heapq.heappop(clock.live)[-1])
        finished, self._finished = self._finished, []
        for intent in finished:
            self._unregister(self._node.holdings[intent.group], intent)
        self._end()
        self._take_up_again()
        self._ask()

    def _act(self, clock: Clock) -> None:
        """Act on the intents of a worker that are due."""
        limit = self._acts_before(clock)
        while clock.waiting and clock.waiting[0][0] < limit:
            start, order, intent = heapq.heappop(clock.waiting)
            if intent.is_over or (intent.end is not None and intent.end < clock.now):
                continue
            intent.is_live = True
            holdings = self._node.holdings[intent.group]
            self._register(holdings, intent, self._due(clock, start))
            if start <= clock.now:
                absent = np.flatnonzero(intent.places < 0)
                late = holdings.copies.states[-2 - intent.places[absent]] != Copy.ACTIVE
                self._node.count("late_intents", holdings.group, intent.keys[absent[late]])
            if intent.end is not None:
                heapq.heappush(clock.live, (intent.end, order, intent))

    def _due(self, clock: Clock, start: int) -> int:
        """Return the clock of the fastest worker from which keys that `clock` uses at `start` are to be asked for."""
        if self._rounds_to_answer is None:
            return 0
        to_answer = math.ceil(self._rounds_to_answer * clock.timing.likely_clocks_per_round)
        return self.fastest + start - clock.now - to_answer - 1

    @property
    def come_late(self) -> bool:
        """Whether keys that were put off have come late of late: ranks wait for each other."""
        return self._rounds_to_answer is not None and self._rounds_to_answer > 2.0 * self._node.rounds_to_answer

    def are_needed(self, holdings: Holdings, slots: np.ndarray) -> None:
        """A worker needs keys now (slots of copies, int64 `[n]`) that are not here: if they were put off, that was too
        long."""
        copies = holdings.copies
        self._came_late |= bool((copies.states[slots] == Copy.PUT_OFF).any())
        self._came_late |= bool((copies.due[slots] == _ASKED_AGAIN).any())

    def _put_off_less_or_more(self) -> None:
        """Where keys came late since the last round, others are put off less for some time."""
        if self._came_late:
            self._rounds_to_answer = min(2.0 * self._rounds_to_answer, _MOST_ROUNDS_TO_ANSWER)
            self._came_late = False
        else:
            self._rounds_to_answer -= _FORGOTTEN_IN_A_ROUND * (self._rounds_to_answer - self._node.rounds_to_answer)

    def _register(self, holdings: Holdings, intent: Intent, due: int) -> None:
        """Count an intent, whose use is near at clock `due`, for its keys, and note those that are to be asked for."""
        keys, places = intent.keys, holdings.places(intent.keys)
        absent = np.flatnonzero(places == ABSENT)
        if len(absent):
            made = self._node.grants.make_unmoved(holdings, keys[absent])
            places[absent] = made
            absent = absent[made < 0]
        if len(absent):
            made = holdings.copies.add_wanted(keys[absent], due)
            places[absent] = -2 - made
            self._wanted.append((holdings, keys[absent], made))
        cuda_ops.add_uses(places, holdings.owned.live, holdings.copies.live, 1)
        intent.places = places

    def _unregister(self, holdings: Holdings, intent: Intent) -> None:
        places = holdings.places(intent.keys, intent.places)
        idle = cuda_ops.add_uses(places, holdings.owned.live, holdings.copies.live, -1)
        self._node.grants.intents_ended(holdings, idle[idle >= 0])
        self._note_idle(holdings, -2 - idle[idle < 0])

    def _note_idle(self, holdings: Holdings, slots: np.ndarray) -> None:
        """Copies, or keys asked for, have no live intent any more."""
        if len(slots):
            self._ending.append((holdings, holdings.copies.keys[slots], slots))

    # Giving up

    def _end(self) -> None:
        """Give up keys without live intents, but those whose owner has not taken in changes that are under way."""
        ending, self._ending = self._ending, []
        for holdings, at in joined_entries(ending, _keys_of_copies):
            copies = holdings.copies
            at = at[copies.live[at] == 0]
            states = copies.states[at]
            active = states == Copy.ACTIVE
            if not active.all():
                copies.remove(at[(states == Copy.WANTED) | (states == Copy.PUT_OFF)])
                self._drop_refused(holdings, at[states == Copy.REFUSED])
                at = at[active]
            taken_in = copies.parcels[at] <= self._node.acknowledged[copies.owners[at]]
            if not taken_in.all():
                self._note_idle(holdings, at[~taken_in])
                at = at[taken_in]
            self._drop(holdings, at)

    def _drop(self, holdings: Holdings, slots: np.ndarray) -> None:
        """Tell owners that active copies are gone, with their last changes."""
        node, copies, group = self._node, holdings.copies, holdings.group.number
        for owner, part in copies.by_owner(slots):
            dirty = copies.dirty[part]
            changed, clean = part[dirty], part[~dirty]
            copies.forget_changes_under_way(clean)
            deltas = copies.take_changes(changed)
            parcel = node.next_parcel(owner)
            copies.states[part], copies.parcels[part] = Copy.LEAVING, parcel
            arrays = (narrow(copies.keys[clean]), narrow(copies.keys[changed]), deltas)
            node.emit(owner, Message(Kind.DROPS, (group, node.rank), arrays))
            self._leaving.append((holdings, copies.keys[part], part, owner, int(parcel)))

    def _drop_refused(self, holdings: Holdings, slots: np.ndarray) -> None:
        copies = holdings.copies
        for owner, part in copies.by_owner(slots):
            self._emit_drops(holdings, owner, copies.keys[part])
        copies.remove(slots)

    def _emit_drops(self, holdings: Holdings, owner: int, keys: np.ndarray) -> None:
        """Say that this rank wants nothing of keys any more, of which it has no changes."""
        none = np.empty((0, holdings.group.width), holdings.copies.store.words.dtype)
        arrays = (narrow(keys), narrow(keys[:0]), none)
        self._node.emit(owner, Message(Kind.DROPS, (holdings.group.number, self._node.rank), arrays))

    def settle_leaving(self) -> None:
        """Forget copies that owners know to be gone; ask again for those that are wanted again."""
        if not self._leaving:
            return
        leaving, self._leaving = self._leaving, []
        acknowledged = self._node.acknowledged.tolist()
        gone = []
        for entry in leaving:
            holdings, keys, at, owner, parcel = entry
            if parcel > acknowledged[owner]:
                self._leaving.append(entry)
            else:
                gone.append((holdings, keys, at))
        for holdings, at in joined_entries(gone, _keys_of_copies):
            copies = holdings.copies
            at = at[copies.states[at] == Copy.LEAVING]  # others came here as records
            is_wanted = copies.live[at] > 0
            if is_wanted.any():
                again, at = at[is_wanted], at[~is_wanted]
                copies.states[again], copies.parcels[again], copies.due[again] = Copy.WANTED, -1, 0
                self._wanted.append((holdings, copies.keys[again], again))
            copies.remove(at)

    # Asking

    def _ask(self) -> None:
        """Ask for the wanted keys, but those to which this rank has changes under way by another road."""
        wanted, self._wanted = self._wanted, []
        node = self._node
        for holdings, at in joined_entries(wanted, _keys_of_copies):
            copies, number = holdings.copies, holdings.group.number
            at = at[(copies.states[at] == Copy.WANTED) & (copies.live[at] > 0)]
            keys = copies.keys[at]
            target = node.locations[number].next_hop(keys, guess=True)
            ready = (target != node.rank) & ~node.operations.are_under_way(number, keys)
            if not ready.all():
                self._wanted.append((holdings, keys[~ready], at[~ready]))
            copies.states[at[ready]] = Copy.REQUESTED
            keys, target = keys[ready], target[ready]
            is_near = copies.due[at[ready]] <= self.fastest
            for owner, some in each_rank(target, node.ranks):
                node.emit(owner, request(number, node.rank, keys[some], is_near[some]))

    def on_put_off(self, source: int, message: Message) -> None:
        """PUT_OFF(group; keys): `source` owns them, others need them too, and our use is far: ask again when it is
        near."""
        holdings = self._node.holdings[message.numbers[0]]
        keys = widen(message.arrays[0])
        at, states = holdings.copies.find(keys)
        asked = states == Copy.REQUESTED
        keys, at = keys[asked], at[asked]
        holdings.copies.states[at] = Copy.PUT_OFF
        self._node.locations[holdings.group.number].learn(keys, source)
        due = holdings.copies.due[at]
        for clock in set(due.tolist()):
            some = np.flatnonzero(due == clock)
            self._put_off.setdefault(clock, []).append((holdings, keys[some], at[some]))
        self._ended_on_the_way(holdings, at)

    def _take_up_again(self) -> None:
        """Note the keys that are to be asked for again, since their use is near."""
        for clock in [clock for clock in self._put_off if clock <= self.fastest]:
            for holdings, keys, at in self._put_off.pop(clock):
                copies = holdings.copies
                at = at[(copies.keys[at] == keys) & (copies.states[at] == Copy.PUT_OFF)]
                copies.states[at], copies.due[at] = Copy.WANTED, _ASKED_AGAIN
                self._wanted.append((holdings, copies.keys[at], at))

    def on_copies(self, source: int, message: Message) -> None:
        """COPIES(group; keys, values): copies of what `source` owns."""
        holdings = self._node.holdings[message.numbers[0]]
        keys, values = widen(message.arrays[0]), message.arrays[1]
        at, states = holdings.copies.find(keys)
        asked = (states == Copy.REQUESTED) | (states == Copy.REFUSED)
        holdings.copies.install(at[asked], values[asked], source)
        self._note(holdings, "copied", keys[asked], source)
        self._node.locations[holdings.group.number].learn(keys, source)
        self._ended_on_the_way(holdings, at[asked])

    def _ended_on_the_way(self, holdings: Holdings, at: np.ndarray) -> None:
        self._note_idle(holdings, at[holdings.copies.live[at] == 0])

    def on_refused(self, source: int, message: Message) -> None:
        """REFUSED(group; keys): `source` owns them, knows of the intent, and makes no copies."""
        holdings = self._node.holdings[message.numbers[0]]
        keys = widen(message.arrays[0])
        at, states = holdings.copies.find(keys)
        asked = states == Copy.REQUESTED
        holdings.copies.states[at[asked]] = Copy.REFUSED
        holdings.copies.owners[at[asked]] = source
        self._node.locations[holdings.group.number].learn(keys, source)
        self._ended_on_the_way(holdings, at[asked])

    def on_refresh(self, source: int, message: Message) -> None:
        """REFRESH(group; keys, values): what `source` holds now of keys that this rank has copies of."""
        holdings = self._node.holdings[message.numbers[0]]
        at, states = holdings.copies.find(widen(message.arrays[0]))
        active = (states == Copy.ACTIVE) | (states == Copy.LEAVING)  # one that leaves may yet be promoted
        holdings.copies.refresh(at[active], message.arrays[1][active], int(self._node.acknowledged[source]))

    def on_records(self, source: int, message: Message) -> None:
        """RECORDS(group; keys, values, counters, holders): this rank owns them from now on."""
        self._own(source, message.numbers[0], *message.arrays)

    def on_promoted(self, source: int, message: Message) -> None:
        """PROMOTED(group; keys, counters): this rank owns them from now on, and its copies are what the records are."""
        keys, counters = message.arrays
        self._own(source, message.numbers[0], keys, None, counters, np.empty(0, np.int64))

    def _own(self, source: int, number: int, keys, values, counters, holders) -> None:
        node, holdings = self._node, self._node.holdings[number]
        keys, counters = widen(keys), widen(counters)
        holders = holders.view(np.uint64).reshape(-1, holdings.owned.holders.shape[1])
        slots = holdings.take_over(keys, values, counters, holders, int(node.acknowledged[source]))
        node.locations[number].arrived(keys, counters)
        self._note(holdings, "moved here", keys, source)
        node.grants.intents_ended(holdings, slots)

    def _note(self, holdings: Holdings, what: str, keys: np.ndarray, source: int) -> None:
        if self._node.record is not None:
            self._node.record(what, holdings.group.number, keys, source)

    # Changes

    def _send_changes(self, holdings: Holdings) -> None:
        """Send owners what has changed in copies, but what is held back, or waits for earlier changes to arrive."""
        copies, node = holdings.copies, self._node
        if not copies.changed:
            return
        slots, _ = cuda_ops.dedup(np.concatenate(copies.changed))
        slots = slots[copies.dirty[slots] & (copies.states[slots] == Copy.ACTIVE)]
        ready = copies.parcels[slots] <= node.acknowledged[copies.owners[slots]]
        later = [slots[~ready]]
        slots = slots[ready]
        if node.update_threshold > 0 and not node.syncing.is_flushing and len(slots):
            large = np.abs(copies.untold(slots, np.iinfo(np.int64).max)).max(axis=1) >= node.update_threshold
            later.append(slots[~large])
            slots = slots[large]
        copies.changed = [part for part in later if len(part)]
        for owner, part in copies.by_owner(slots):
            deltas = copies.take_changes(part)
            copies.parcels[part] = node.next_parcel(owner)
            arrays = (narrow(copies.keys[part]), deltas)
            node.emit(owner, Message(Kind.DELTAS, (holdings.group.number,), arrays))


def _keys_of_copies(holdings: Holdings) -> np.ndarray:
    return holdings.copies.keys
