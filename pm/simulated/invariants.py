"""What must hold of all ranks together, looked at from outside after each turn of one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pm import masks
from pm.asynchronous.holdings import Copy
from pm.asynchronous.node import Node
from pm.messages import Kind, Message, widen
from pm.simulated.ledger import Ledger, Violation

_MOVES = (Kind.RECORDS, Kind.PROMOTED)
_HOPS_PER_MOVE = 2
_HOPS = 3


class _View:
    """What ranks hold of one group, in arrays `[ranks, capacity]`."""

    def __init__(self, ranks: int, capacity: int):
        shape = (ranks, capacity)
        self.keys = np.arange(capacity)
        self.is_main = np.zeros(shape, bool)  # owned, or to be made here when it is first touched
        self.is_active = np.zeros(shape, bool)
        self.is_put_off = np.zeros(shape, bool)
        self.copy_of = np.zeros(shape, np.int64)
        self.live = np.zeros(shape, np.int64)
        self.holders = np.zeros((*shape, masks.words_for(ranks)), np.uint64)
        self.in_flight = np.zeros(shape, np.int64)  # records on their way, by receiver
        self.moves = np.zeros(capacity, np.int64)

    def look(self, node: Node, group: int) -> None:
        """Bring the rows of one rank up to date."""
        rank, holdings = node.rank, node.holdings[group]
        slots = holdings.owned.find(self.keys)
        owned = slots >= 0
        self.is_main[rank] = owned | node.locations[group].is_unmoved_home(self.keys)
        self.holders[rank] = np.where(owned[:, None], holdings.owned.holders[slots], 0)
        at, states = holdings.copies.find(self.keys)
        self.is_active[rank] = states == Copy.ACTIVE
        self.is_put_off[rank] = (states == Copy.PUT_OFF) & (holdings.copies.due[at] > node.claims.fastest)
        self.copy_of[rank] = holdings.copies.owners[at]
        self.live[rank] = np.where(owned, holdings.owned.live[slots], 0)
        self.live[rank] += np.where(at >= 0, holdings.copies.live[at], 0)
        if (owned & (at >= 0)).any():
            raise Violation(f"rank {rank} has record and copy of group {group} key {self.keys[owned & (at >= 0)][0]}")


class Invariants:
    """Checks the state of all nodes.

    - A key has one owner, or its record is in flight, once.
    - The owner of a copy knows of it, or is sending the record to the holder.
    - What is here and has a live intent stays until that ends.
    - A question reaches the owner in a number of hops that its moves explain.
    - The cache is no larger than it may be.
    """

    def __init__(self, nodes: Sequence[Node], capacities: Sequence[int], cache_keys: int):
        self._nodes, self._cache_keys = nodes, cache_keys
        self._views = [_View(len(nodes), capacity) for capacity in capacities]
        self._hops: dict[tuple[int, ...], np.ndarray] = {}
        for node in nodes:
            for group, view in enumerate(self._views):
                view.look(node, group)

    # Messages

    def sent(self, source: int, target: int, messages: Sequence[Message]) -> None:
        """Messages have left a rank."""
        for message in messages:
            if message.kind in _MOVES:
                view, keys = self._views[message.numbers[0]], widen(message.arrays[0])
                view.in_flight[target, keys] += 1
                view.moves[keys] += 1
            elif message.kind in (Kind.FETCH, Kind.PUSH):
                self._count_hop(message)

    def arrives(self, target: int, messages: Sequence[Message]) -> None:
        """Messages are about to be taken in."""
        for message in messages:
            if message.kind in _MOVES:
                self._views[message.numbers[0]].in_flight[target, widen(message.arrays[0])] -= 1

    def _count_hop(self, message: Message) -> None:
        group, origin, number = message.numbers[:3]
        view, keys = self._views[group], widen(message.arrays[0])
        hops = self._hops.setdefault((group, origin, number), np.zeros(len(view.keys), np.int64))
        hops[keys] += 1
        lost = hops[keys] > _HOPS + _HOPS_PER_MOVE * view.moves[keys]
        if lost.any():
            key = keys[lost][0]
            raise Violation(
                f"{message.kind.name} {number} of rank {origin} for group {group} key {key}, which has moved "
                f"{view.moves[key]} times, is sent for the {hops[key]}th time"
            )

    # States

    def look(self, rank: int) -> None:
        """Check after a turn of `rank`."""
        node = self._nodes[rank]
        for group, view in enumerate(self._views):
            was_kept = (view.is_main[rank] | view.is_active[rank]) & (view.live[rank] > 0)
            view.look(node, group)
            in_flight = self._in_flight(group, view)
            self._one_owner(group, view, in_flight)
            self._known_copies(group, view, in_flight)
            lost = was_kept & (view.live[rank] > 0) & ~(view.is_main[rank] | view.is_active[rank])
            self._demand(~lost, group, view, f"rank {rank} lost, though it has a live intent,")
            if len(node.locations[group]._cache) > self._cache_keys:
                raise Violation(f"rank {rank} has more than {self._cache_keys} keys in the cache of group {group}")

    def _in_flight(self, group: int, view: _View) -> np.ndarray:
        """Return how many records are on their way, by receiver and key, with those that have yet to leave."""
        in_flight = view.in_flight
        for node in self._nodes:
            for peer in node.peers:
                for message in node._out[peer]:
                    if message.kind in _MOVES and message.numbers[0] == group:
                        in_flight = in_flight.copy() if in_flight is view.in_flight else in_flight
                        in_flight[peer, widen(message.arrays[0])] += 1
        return in_flight

    def _one_owner(self, group: int, view: _View, in_flight: np.ndarray) -> None:
        count = view.is_main.sum(axis=0) + in_flight.sum(axis=0)
        if (count != 1).any():
            key = np.flatnonzero(count != 1)[0]
            raise Violation(
                f"group {group} key {key} has owners {np.flatnonzero(view.is_main[:, key])} and is in flight to "
                f"{np.flatnonzero(in_flight[:, key])}; it must be at one place"
            )

    def _known_copies(self, group: int, view: _View, in_flight: np.ndarray) -> None:
        holder, key = np.nonzero(view.is_active)
        words = view.holders[view.copy_of[holder, key], key]
        bit = (words[np.arange(len(holder)), holder // 64] >> (holder % 64).astype(np.uint64)) & np.uint64(1)
        unknown = (bit == 0) & (in_flight[holder, key] == 0)
        if unknown.any():
            at = np.flatnonzero(unknown)[0]
            raise Violation(
                f"rank {holder[at]} has a copy of group {group} key {key[at]} from rank "
                f"{view.copy_of[holder[at], key[at]]}, which does not know of it"
            )

    def _demand(self, good: np.ndarray, group: int, view: _View, what: str) -> None:
        if not good.all():
            raise Violation(f"{what} group {group} key {view.keys[~good][0]}")

    # At rest

    def intents_are_met(self) -> None:
        """Nothing is under way: what is intended is here, where techniques allow for it."""
        for group, view in enumerate(self._views):
            for node in self._nodes:
                if node.techniques in ("all", "replication"):
                    here = view.is_main[node.rank] | view.is_active[node.rank] | view.is_put_off[node.rank]
                    self._demand(here | (view.live[node.rank] == 0), group, view, f"rank {node.rank} never got")

    def homes_know(self) -> None:
        """Nothing is under way: homes know owners, and no rank keeps pointers to what it gave away."""
        for group, view in enumerate(self._views):
            owner = view.is_main.argmax(axis=0)
            home = self._nodes[0].locations[group].home_of(view.keys)
            for node in self._nodes:
                locations, mine = node.locations[group], (home == node.rank) & (owner != node.rank)
                known = np.where(mine, locations.next_hop(view.keys), owner)
                self._demand(known == owner, group, view, f"home {node.rank} does not know the owner of")
                if len(locations._given_away):
                    raise Violation(f"rank {node.rank} still points to {len(locations._given_away)} keys it gave away")
                if not np.isin(locations._moved.items()[0], view.keys[home == node.rank]).all():
                    raise Violation(f"rank {node.rank} keeps the whereabouts of keys that are not at home there")

    def copies_are_gone(self) -> None:
        """Nothing is intended and nothing under way: ranks hold what they own, and no more."""
        for node in self._nodes:
            for group, holdings in enumerate(node.holdings):
                if len(holdings.copies.store):
                    raise Violation(f"rank {node.rank} keeps {len(holdings.copies.store)} copies in group {group}")
                if holdings.owned.live[: holdings.owned.store.slots_in_use].any():
                    raise Violation(f"rank {node.rank} counts intents in group {group} that have ended")
                if len(holdings.owned.store) > self._views[group].is_main[node.rank].sum():
                    raise Violation(f"rank {node.rank} keeps records in group {group} that it does not own")

    def copies_agree(self, ledger: Ledger, floors: Sequence[np.ndarray]) -> None:
        """Records and copies, wherever they are, contain the writes `floors`, by group `[capacity, ranks]`."""
        for group, view in enumerate(self._views):
            for node in self._nodes:
                holdings = node.holdings[group]
                where = f"group {group} on rank {node.rank}"
                keys = view.keys[view.is_active[node.rank]]
                copies = holdings.copies.values(holdings.copies.find(keys)[0])
                ledger.demand(floors[group][keys], group, keys, copies, f"copies of {where}")
                keys = view.keys[holdings.owned.find(view.keys) >= 0]
                records = holdings.owned.values(holdings.owned.find(keys))
                ledger.demand(floors[group][keys], group, keys, records, f"records of {where}")
