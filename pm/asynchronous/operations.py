"""Operations on keys: pull, push and set, at once where the keys are here, over other ranks where they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.asynchronous.holdings import SOMEBODY, THE_OWNER, Copy, Holdings
from pm.asynchronous.place_index import ABSENT
from pm.messages import Kind, Message, narrow, widen
from pm.partition import each_rank

if TYPE_CHECKING:
    from pm.asynchronous.node import Node


@unique
class Action(IntEnum):
    """What an operation does with its keys."""

    PULL = 0
    PUSH = 1
    SET = 2


@dataclass
class Operation:
    """One operation of a worker.

    Args:
        action: what it does.
        group: number of the group of its keys.
        keys: distinct, int64 `[n]`.
        values: `[n, width]`: updates or values, or where pulled values go.
        on_done: called when it is done.
        number: of the operation on this rank.
        remaining: how many keys are still to be done.
        order: that of the keys, once it is needed.
        places: where the keys were when last seen (`Holdings.places`), if known.
    """

    action: Action
    group: int
    keys: np.ndarray
    values: np.ndarray
    on_done: Callable[[], None] = lambda: None
    number: int = 0
    remaining: int = 0
    order: np.ndarray | None = None
    places: np.ndarray | None = None

    @property
    def is_done(self) -> bool:
        return self.remaining == 0

    def positions(self, keys: np.ndarray) -> np.ndarray:
        """Return where some of the operation's keys are among them."""
        if self.order is None:
            self.order = np.argsort(self.keys)
        return self.order[np.searchsorted(self.keys, keys, sorter=self.order)]


class Operations:
    """Carries out operations.

    What a rank has done it also sees: as long as its own changes to a key are on their way to the owner, what it asks
    of that key waits; so do operations on keys that have been asked for, until they are here. Waiting parts are taken
    up again in their order.
    """

    def __init__(self, node: Node):
        self._node = node
        self._numbers = 0
        self._open: dict[int, Operation] = {}
        self._under_way: dict[int, dict[tuple[int, Action], list[np.ndarray]]] = {}
        self.waiting: list[tuple[Operation, np.ndarray]] = []

    def run(self, operation: Operation) -> Operation:
        """Begin an operation; it is done when `is_done` says so."""
        self._numbers += 1
        self._node.events += 1
        operation.number = self._numbers
        operation.remaining = len(operation.keys)
        if self._pulls_at_once(operation):
            return operation
        everything = np.arange(len(operation.keys))
        blocked = self._are_waiting(operation.group, operation.keys)
        if blocked.any():
            self.waiting.append((operation, everything[blocked]))
            everything = everything[~blocked]
        self._advance(operation, everything)
        if not len(operation.keys):
            operation.on_done()
        return operation

    def _pulls_at_once(self, operation: Operation) -> bool:
        """Do a pull whose keys are all here, as most are, in one go; return whether it is done."""
        holdings = self._node.holdings[operation.group]
        if (
            operation.action != Action.PULL
            or operation.places is None
            or self.waiting
            or self._under_way.get(operation.group)
            or holdings.group.before_reading is not None
        ):
            return False
        places = holdings.places(operation.keys, operation.places)
        copied = -2 - places[places < 0]
        if len(copied) and (copied.min() < 0 or (holdings.copies.states[copied] != Copy.ACTIVE).any()):
            return False
        records, copies = holdings.owned.store, holdings.copies.store
        cuda_ops.gather_places(places, records.words, records.stride, copies.words, copies.stride, operation.values)
        self._did(operation, len(operation.keys))
        return True

    def pull_if_local(self, group: int, keys: np.ndarray, out: np.ndarray) -> bool:
        """Write distinct keys to `out` `[n, width]` if all are here; return whether they are."""
        holdings = self._node.holdings[group]
        slots = self._node.grants.find_or_make(holdings, keys)
        mine = slots >= 0
        at, states = holdings.copies.find(keys)
        active = states == Copy.ACTIVE
        if not (mine | active).all() or (self.are_under_way(group, keys) | self._are_waiting(group, keys)).any():
            return False
        out[mine] = holdings.owned.values(slots[mine])
        out[active] = holdings.copies.values(at[active])
        return True

    def is_local(self, group: int, keys: np.ndarray) -> np.ndarray:
        """Return which keys can be pulled without a message (bool `[n]`)."""
        holdings = self._node.holdings[group]
        mine = holdings.owned.find(keys) >= 0
        mine |= self._node.locations[group].is_unmoved_home(keys)
        return mine | (holdings.copies.find(keys)[1] == Copy.ACTIVE)

    @property
    def are_waited_for(self) -> bool:
        """Whether there are operations that are not done."""
        return bool(self._open or self.waiting)

    @property
    def pushes_under_way(self) -> set[int]:
        """Return the numbers of operations that change keys elsewhere and are not done."""
        return {number for number, operation in self._open.items() if operation.action != Action.PULL} | {
            operation.number for operation, _ in self.waiting if operation.action != Action.PULL
        }

    def are_under_way(self, group: int, keys: np.ndarray, *, sets_only: bool = False) -> np.ndarray:
        """Return for which keys this rank has changes on their way to their owner (bool `[n]`)."""
        if not self._under_way.get(group):
            return np.zeros(len(keys), bool)
        parts = [
            part
            for (_, action), of_number in self._under_way[group].items()
            if not sets_only or action == Action.SET
            for part in of_number
        ]
        return np.isin(keys, np.concatenate(parts)) if parts else np.zeros(len(keys), bool)

    def _are_waiting(self, group: int, keys: np.ndarray) -> np.ndarray:
        """Return for which keys there are operations that wait (bool `[n]`)."""
        parts = [operation.keys[at] for operation, at in self.waiting if operation.group == group]
        return np.isin(keys, np.concatenate(parts)) if parts else np.zeros(len(keys), bool)

    def retry(self) -> None:
        """Take up what waits."""
        waiting, self.waiting = self.waiting, []
        for operation, positions in waiting:
            blocked = self._are_waiting(operation.group, operation.keys[positions])  # its elders, which wait again
            if blocked.any():
                self.waiting.append((operation, positions[blocked]))
                positions = positions[~blocked]
            self._advance(operation, positions)

    def _advance(self, operation: Operation, positions: np.ndarray) -> None:
        """Do what can be done of an operation, send what must be, and let the rest wait."""
        if not len(positions):
            return
        holdings = self._node.holdings[operation.group]
        keys = operation.keys[positions]
        places = holdings.places(keys, None if operation.places is None else operation.places[positions])
        absent = np.flatnonzero(places == ABSENT)
        if len(absent):
            places[absent] = self._node.grants.make_unmoved(holdings, keys[absent])
        if operation.places is not None:
            operation.places[positions] = places
        mine = places >= 0
        under_way = self.are_under_way(operation.group, keys, sets_only=operation.action == Action.PUSH)
        mine &= ~under_way  # the record may have come here after this rank's changes left for its former owner
        if mine.any():
            self._on_owned(operation, holdings, places[mine], positions[mine])
            if mine.all():
                return
            keys, positions, under_way, places = keys[~mine], positions[~mine], under_way[~mine], places[~mine]
        at = np.where(places < -1, -2 - places, -1)  # an owned record that waits for our own changes is no copy
        states = np.where(at >= 0, holdings.copies.states[at], Copy.FREE)
        active = (states == Copy.ACTIVE) & (operation.action != Action.SET)
        active &= ~self.are_under_way(operation.group, keys, sets_only=True)
        if active.any():
            self._on_copies(operation, holdings, at[active], positions[active])
            if active.all():
                return
        elsewhere = ~active
        if self._node.rounds_to_answer is not None:
            self._node.claims.are_needed(holdings, at[elsewhere & (at >= 0)])
        waits = under_way | np.isin(states, (Copy.WANTED, Copy.REQUESTED, Copy.LEAVING))
        target = self._node.locations[operation.group].next_hop(keys, guess=True)
        if operation.action == Action.SET:  # the owner of a copy is known
            target = np.where(states == Copy.ACTIVE, holdings.copies.owners[at], target)
        waits |= target == self._node.rank
        later = elsewhere & waits
        if later.any():
            self.waiting.append((operation, positions[later]))
        away = elsewhere & ~waits
        if away.any():
            if operation.action == Action.SET:  # what this rank had added before, and not told, is overwritten
                holdings.copies.forget_untaken(at[away & (states == Copy.ACTIVE)])
            self._send(operation, positions[away], target[away])

    def _on_owned(self, operation: Operation, holdings: Holdings, slots: np.ndarray, positions: np.ndarray) -> None:
        owned = holdings.owned
        whole = len(positions) == len(operation.keys)
        if operation.action == Action.PULL:
            owned.values(slots, operation.values, positions)
        else:
            values = operation.values if whole else operation.values[positions]
            self._change(holdings, operation.action, slots, values, self._node.rank)
        self._did(operation, len(positions))

    def _change(self, holdings: Holdings, action: Action, slots: np.ndarray, values: np.ndarray, origin: int) -> None:
        """Add to records that are owned here, or set them."""
        grants = self._node.grants
        if action == Action.PUSH:
            grants.take_in(holdings, slots, values, THE_OWNER if origin == self._node.rank else SOMEBODY)
        else:
            holdings.owned.put(slots, values)
            if origin != self._node.rank:
                grants.refresh(holdings, origin, slots)  # before it hears that they are set
            grants.changed_from_afar(holdings, slots)

    def _on_copies(self, operation: Operation, holdings: Holdings, slots: np.ndarray, positions: np.ndarray) -> None:
        if operation.action == Action.PULL:
            holdings.copies.values(slots, operation.values, positions)
        else:
            holdings.copies.add(slots, operation.values[positions])
        self._did(operation, len(positions))

    # Elsewhere

    def _send(self, operation: Operation, positions: np.ndarray, target: np.ndarray) -> None:
        node, group = self._node, operation.group
        self._open[operation.number] = operation
        keys = operation.keys[positions]
        is_pull = operation.action == Action.PULL
        if not is_pull:
            under_way = self._under_way.setdefault(group, {})
            under_way.setdefault((operation.number, operation.action), []).append(keys)
        node.counts["remote_pulls" if is_pull else "remote_pushes"] += len(keys)
        for peer, some in each_rank(target, node.ranks):
            if is_pull:
                numbers = (group, node.rank, operation.number, operation.values.shape[1])
                message = Message(Kind.FETCH, numbers, (narrow(keys[some]),))
            else:
                numbers = (group, node.rank, operation.number, int(operation.action))
                arrays = (narrow(keys[some]), operation.values[positions[some]])
                message = Message(Kind.PUSH, numbers, arrays)
            node.emit(peer, message)

    def on_fetch(self, source: int, message: Message) -> None:
        """FETCH(group, origin, operation, words; keys): `origin` pulls the first words of keys."""
        group, origin, number, words = message.numbers
        holdings = self._node.holdings[group]
        keys = widen(message.arrays[0])
        slots = self._node.grants.find_or_make(holdings, keys)
        mine = slots >= 0
        others = keys[~mine]
        self._node.grants.forward(
            source, group, others, lambda some: Message(Kind.FETCH, message.numbers, (narrow(others[some]),))
        )
        if mine.any():
            values = np.empty((int(mine.sum()), words), holdings.owned.store.words.dtype)
            arrays = (narrow(keys[mine]), holdings.owned.values(slots[mine], values))
            self._answer(origin, Message(Kind.FETCHED, (group, number), arrays))

    def on_fetched(self, source: int, message: Message) -> None:
        """FETCHED(group, operation; keys, values): the owner's answer.

        Where a copy has come here meanwhile, which others of this rank read, the copy is what is read: it has all that
        the operation must see, and the answer may be newer than what is read here next.
        """
        group, number = message.numbers
        keys, values = widen(message.arrays[0]), message.arrays[1]
        operation = self._open[number]
        positions = operation.positions(keys)
        operation.values[positions] = values
        copies = self._node.holdings[group].copies
        at, states = copies.find(keys)
        active = states == Copy.ACTIVE
        if active.any():
            copies.values(at[active], operation.values, positions[active])
        self._done(operation, source, keys)

    def on_push(self, source: int, message: Message) -> None:
        """PUSH(group, origin, operation, action; keys, values): `origin` adds to keys, or sets them."""
        group, origin, number, action = message.numbers
        holdings = self._node.holdings[group]
        keys, values = widen(message.arrays[0]), message.arrays[1]
        slots = self._node.grants.find_or_make(holdings, keys)
        mine = slots >= 0
        others, theirs = keys[~mine], values[~mine]
        self._node.grants.forward(
            source,
            group,
            others,
            lambda some: Message(Kind.PUSH, message.numbers, (narrow(others[some]), theirs[some])),
        )
        if mine.any():
            self._change(holdings, Action(action), slots[mine], values[mine], origin)
            self._answer(origin, Message(Kind.PUSHED, (group, number), (narrow(keys[mine]),)))

    def on_pushed(self, source: int, message: Message) -> None:
        """PUSHED(group, operation; keys): the owner has taken them in."""
        group, number = message.numbers
        keys = widen(message.arrays[0])
        operation = self._open[number]
        entry = (number, operation.action)
        under_way = self._under_way[group]
        left = np.setdiff1d(np.concatenate(under_way.pop(entry)), keys, assume_unique=True)
        if len(left):
            under_way[entry] = [left]
        self._done(operation, source, keys)

    def _answer(self, origin: int, message: Message) -> None:
        if origin == self._node.rank:  # the keys have come here meanwhile
            self._node.handle(origin, message)
        else:
            self._node.emit(origin, message)

    def _done(self, operation: Operation, source: int, keys: np.ndarray) -> None:
        if source != self._node.rank:
            self._node.locations[operation.group].learn(keys, source)
        self._did(operation, len(keys))

    def _did(self, operation: Operation, count: int) -> None:
        operation.remaining -= count
        if operation.is_done:
            self._open.pop(operation.number, None)
            operation.on_done()
