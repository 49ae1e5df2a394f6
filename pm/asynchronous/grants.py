"""The owner's side: what a rank does with the keys that it owns, and with questions for those that it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pm import masks
from pm.asynchronous.holdings import SOMEBODY, THE_OWNER, Holdings, joined_entries
from pm.decision import are_restless, copies_are_made, moves_to_asker, moves_to_last, shared_longer
from pm.messages import Kind, Message, narrow, request, widen
from pm.partition import each_rank

if TYPE_CHECKING:
    from pm.asynchronous.node import Node

_NOBODY = -1


class Grants:
    """Answers intents with records or copies, merges changes, and keeps copies up to date.

    Invariant: a key has one owner, but for the time that its record travels; the ranks in `holders` are those whose
    intent has arrived here and whose DROPS have not. A change that a holder of a copy sends either finds its owner
    here, or the record has gone to that very holder meanwhile, which has kept the change: then it is not merged.
    """

    def __init__(self, node: Node):
        self._node = node
        self._questions: list[tuple[int, Message]] = []
        self._early: list[tuple[int, Message]] = []
        self._ended: list[tuple[Holdings, np.ndarray, np.ndarray]] = []  # keys, and their slots then

    @property
    def has_work(self) -> bool:
        if self._early or ((self._questions or self._ended) and not self._node.claims.is_paused):
            return True
        if not self._node.exchange_is_due:
            return False
        owned = [holdings.owned for holdings in self._node.holdings]
        return any(one.has_changed for one in owned) or (self._node.refreshes_all and any(one.late for one in owned))

    def forget_group(self, number: int) -> None:
        """A group's keys get other slots."""
        self._ended = [entry for entry in self._ended if entry[0].group.number != number]

    @property
    def has_questions(self) -> bool:
        """Whether there are questions that wait for records, or for a pause to end."""
        return bool(self._questions or self._early)

    def find_or_make(self, holdings: Holdings, keys: np.ndarray) -> np.ndarray:
        """Return the slots of distinct keys that this rank owns, -1 for others; make what was never touched."""
        slots = holdings.owned.find(keys)
        absent = np.flatnonzero(slots < 0)
        if len(absent):
            slots[absent] = self.make_unmoved(holdings, keys[absent])
        return slots

    def make_unmoved(self, holdings: Holdings, keys: np.ndarray) -> np.ndarray:
        """Make records of those keys that are at home here and were never touched; return slots, -1 for the others."""
        slots = np.full(len(keys), -1, np.int64)
        fresh = np.flatnonzero(self._node.locations[holdings.group.number].is_unmoved_home(keys))
        if len(fresh):
            slots[fresh] = holdings.owned.make(keys[fresh])
        return slots

    def changed_here(self, holdings: Holdings, slots: np.ndarray) -> None:
        """A worker of this rank has changed records."""
        holdings.owned.mark_changed(slots, THE_OWNER)

    def changed_from_afar(self, holdings: Holdings, slots: np.ndarray) -> None:
        """A rank without a copy, or one that has set values, has changed records: every copy is to be told."""
        holdings.owned.mark_changed(slots, SOMEBODY)

    # Requests

    def on_request(self, source: int, message: Message) -> None:
        """REQUEST: see `pm.messages.request`."""
        self._questions.append((source, message))

    def _answer(self, number: int, origin: int, sources: np.ndarray, keys: np.ndarray, is_near: np.ndarray) -> None:
        """Answer questions of `origin` about distinct keys of a group, each of which a rank of `sources` has sent, and
        of which it will use some soon (`is_near`, bool `[n]`)."""
        holdings = self._node.holdings[number]
        slots = self.find_or_make(holdings, keys)
        mine = slots >= 0
        if not mine.all():
            others, near = keys[~mine], is_near[~mine]
            self.forward(
                sources[~mine],
                number,
                others,
                lambda some: request(number, origin, others[some], near[some]),
            )
            slots, is_near = slots[mine], is_near[mine]
        if origin != self._node.rank and len(slots):
            self._grant(holdings, origin, slots, is_near)

    def forward(self, source: int | np.ndarray, number: int, keys: np.ndarray, message_of) -> None:
        """Send on what `source` (one for all keys, or one for each: int64 `[n]`) asks about keys that are not here:
        `message_of(positions)` makes the message for some.

        A question that has overtaken the record, which is on its way here, waits for it.
        """
        if not len(keys):
            return
        node = self._node
        target = node.locations[number].next_hop(keys)
        target[node.locations[number].are_coming(keys, source)] = node.rank
        for peer, some in each_rank(target, node.ranks):
            message = message_of(some)
            if peer != node.rank:
                node.counts["hops"] += len(some)
                node.emit(peer, message)
                continue
            early = self._questions if message.kind == Kind.REQUEST else self._early
            for asker, part in [(source, some)] if isinstance(source, int) else each_rank(source[some], node.ranks):
                early.append((asker, message if len(part) == len(some) else message_of(some[part])))

    def retry(self) -> None:
        """Look again at messages that came before the records that they are about."""
        early, self._early = self._early, []
        for source, message in early:
            self._node.handle_again(source, message)

    def answer(self) -> None:
        """Look again at messages that came before the records that they are about, move what only others need, and
        answer intents.

        Intents of one rank for keys of one group are answered together, whoever has sent them here. They are last: a
        rank may ask again for what it has dropped, but it drops nothing that it has asked for and not got.
        """
        self.retry()
        if self._node.claims.is_paused:
            return
        self._move_ended()
        questions, self._questions = self._questions, []
        alike: dict[tuple[int, ...], list[tuple[int, bool, np.ndarray]]] = {}
        for source, message in questions:
            asked = alike.setdefault(message.numbers, [])
            asked += [(source, near, widen(keys)) for near, keys in zip((True, False), message.arrays, strict=True)]
        for (number, origin), asked in alike.items():
            counts = [len(keys) for _, _, keys in asked]
            sources, is_near = (np.repeat([entry[at] for entry in asked], counts) for at in (0, 1))
            self._answer(number, origin, sources, np.concatenate([keys for _, _, keys in asked]), is_near)

    def _grant(self, holdings: Holdings, origin: int, slots: np.ndarray, is_near: np.ndarray) -> None:
        owned, node = holdings.owned, self._node
        asker = masks.only(origin, node.ranks)
        others = masks.count(owned.holders[slots] & ~asker)
        moves = moves_to_asker(self._techniques(holdings), owned.live[slots] > 0, others)
        restless = self._stay(holdings, slots)
        moves &= ~restless
        self._give_away(holdings, slots[moves], origin)
        if not is_near.all() and self._techniques(holdings) == "all":
            # Until its use is near others may have done with it: then it moves, in place of a copy that comes and goes.
            later = ~moves & ~restless & ~is_near
            if later.any():
                node.emit(origin, Message(Kind.PUT_OFF, (holdings.group.number,), (narrow(owned.keys[slots[later]]),)))
            slots, moves = slots[~later], moves[~later]
        stay = slots[~moves]
        if not len(stay):
            return
        owned.add_holder(stay, asker)
        stayed = owned.keys[stay]
        keys = narrow(stayed)
        if copies_are_made(node.techniques):
            node.count("replications", holdings.group, stayed)
            owned.shared_until[stay] = shared_longer(owned.shared_until[stay], node.claims.fastest)
            node.emit(origin, Message(Kind.COPIES, (holdings.group.number,), (keys, owned.values(stay))))
        else:
            node.emit(origin, Message(Kind.REFUSED, (holdings.group.number,), (keys,)))

    def _stay(self, holdings: Holdings, slots: np.ndarray) -> np.ndarray:
        """Return which of `slots` do not move now, whoever needs them (bool `[n]`)."""
        clocks_per_move = self._node.clocks_per_move if copies_are_made(self._node.techniques) else None
        owned, clock = holdings.owned, self._node.claims.fastest
        return are_restless(owned.counters[slots], owned.shared_until[slots], clock, clocks_per_move)

    def _techniques(self, holdings: Holdings) -> str:
        """Return the techniques for a group: records of some never move."""
        techniques = self._node.techniques
        if holdings.group.moves:
            return techniques
        return "replication" if copies_are_made(techniques) else "none"

    # Moves

    def intents_ended(self, holdings: Holdings, slots: np.ndarray) -> None:
        """Intents for owned keys have ended, here or elsewhere: those that only another rank needs move there soon."""
        owned = holdings.owned
        slots = slots[(owned.live[slots] == 0) & ~masks.are_empty(owned.holders[slots])]
        if len(slots):
            self._ended.append((holdings, owned.keys[slots], slots))

    def _move_ended(self) -> None:
        """Move keys for which intents have ended, and that only one other rank needs still.

        Once before messages leave, and not as each intent ends: a rank is sent what it gets of several ranks' doing in
        one message, and what is intended again stays.
        """
        ended, self._ended = self._ended, []
        for holdings, slots in joined_entries(ended, lambda holdings: holdings.owned.keys):
            owned, node = holdings.owned, self._node
            slots = slots[(owned.live[slots] == 0) & ~masks.are_empty(owned.holders[slots])]
            holders = owned.holders[slots]
            moves = moves_to_last(self._techniques(holdings), owned.live[slots] > 0, masks.count(holders))
            moves &= ~self._stay(holdings, slots)
            target = masks.first(holders[moves])
            moving = slots[moves]
            for peer, some in each_rank(target, node.ranks):
                self._give_away(holdings, moving[some], peer)

    def _give_away(self, holdings: Holdings, slots: np.ndarray, to: int) -> None:
        """Move records to `to`, and tell their homes. A holder whose copy is what the record is gets no values."""
        if not len(slots):
            return
        node, number = self._node, holdings.group.number
        promoted, keys, counters, values, holders, any_holders = holdings.owned.give_up(
            slots, masks.only(to, node.ranks), promotes=copies_are_made(node.techniques)
        )
        if promoted:
            arrays = (narrow(keys[:promoted]), narrow(counters[:promoted]))
            node.emit(to, Message(Kind.PROMOTED, (number,), arrays))
        if promoted < len(keys):
            sets = holders.view(np.int64).reshape(-1) if any_holders else np.empty(0, np.int64)
            arrays = (narrow(keys[promoted:]), values, narrow(counters[promoted:]), sets)
            node.emit(to, Message(Kind.RECORDS, (number,), arrays))
        node.count("relocations", holdings.group, keys)
        node.count("promotions", holdings.group, keys[:promoted])
        self._tell_homes(number, keys, to, counters)
        if node.record is not None:
            node.record("moved away", number, keys, to)

    def _tell_homes(self, number: int, keys: np.ndarray, owner: int, counters: np.ndarray) -> None:
        node = self._node
        locations = node.locations[number]
        home = locations.home_of(keys)
        for peer, some in each_rank(home, node.ranks):
            part = keys[some]
            if peer == node.rank:
                locations.moved(part, owner, counters[some].astype(np.int64))
                continue
            locations.gave_away(part, owner, int(node.next_parcel(peer)))
            if peer != owner:
                node.emit(peer, Message(Kind.MOVED, (number, owner), (narrow(part), narrow(counters[some]))))

    def on_moved(self, source: int, message: Message) -> None:
        """MOVED(group, owner; keys, counters): keys that are at home here have gone to `owner`."""
        number, owner = message.numbers
        keys, counters = message.arrays
        self._node.locations[number].moved(widen(keys), owner, widen(counters))

    # Changes

    def on_deltas(self, source: int, message: Message) -> None:
        """DELTAS(group; keys, changes): what the workers of `source` have added to their copies."""
        holdings = self._node.holdings[message.numbers[0]]
        self._merge(holdings, source, widen(message.arrays[0]), message.arrays[1])

    def _merge(self, holdings: Holdings, source: int, keys: np.ndarray, deltas: np.ndarray) -> None:
        slots = holdings.owned.find(keys)
        mine = slots >= 0
        self.take_in(holdings, slots[mine], deltas if mine.all() else deltas[mine], source)
        self._node.counts["keys_merged"] += int(mine.sum())

    def take_in(self, holdings: Holdings, slots: np.ndarray, deltas: np.ndarray, by: int) -> None:
        """Merge changes into records; `by` whom: see `Owned.mark_changed`."""
        if holdings.group.take_in is not None:
            holdings.group.take_in(slots, deltas)
        else:
            holdings.owned.add(slots, deltas)
            holdings.owned.mark_changed(slots, by)

    def on_drops(self, source: int, message: Message) -> None:
        """DROPS(group, origin; keys, changed keys, changes): `origin` has no intent for these keys any more."""
        number, origin = message.numbers
        holdings = self._node.holdings[number]
        clean, changed, deltas = message.arrays
        clean, changed = widen(clean), widen(changed)
        self._merge(holdings, origin, changed, deltas)
        keys = np.concatenate([clean, changed])
        slots = holdings.owned.find(keys)
        mine = slots >= 0
        if not copies_are_made(self._node.techniques):  # the key, and who waits for it, may have gone on
            gone = keys[~mine]
            none = deltas[:0]
            self.forward(
                source if source != origin else _NOBODY,  # whom `origin` believes may be long past
                number,
                gone,
                lambda some: Message(Kind.DROPS, (number, origin), (narrow(gone[some]), narrow(gone[:0]), none)),
            )
        slots = slots[mine]
        holdings.owned.remove_holder(slots, masks.only(origin, self._node.ranks))
        self.intents_ended(holdings, slots)

    def refresh(self, holdings: Holdings, peer: int, slots: np.ndarray) -> None:
        """Send `peer` what is in records, as far as it holds copies of them."""
        part = slots[masks.contains(holdings.owned.holders[slots], peer)]
        if len(part) and copies_are_made(self._node.techniques):
            keys = holdings.owned.keys[part]
            self._node.count("replica_steps", holdings.group, keys)
            arrays = (narrow(keys), holdings.owned.values(part))
            self._node.emit(peer, Message(Kind.REFRESH, (holdings.group.number,), arrays))

    def round(self) -> None:
        """Send holders of copies what others have changed: at once where they have changed their copies too, which says
        that they use them; the others once in a while, or when somebody waits for it."""
        node = self._node
        if not node.exchange_is_due:
            return
        for holdings in node.holdings:
            for peer, slots in holdings.owned.take_refreshes(node.peers, node.refreshes_all):
                self.refresh(holdings, peer, slots)
