"""One rank's part in the asynchronous protocol, without any input or output of its own.

A node is told what happens (`handle` a message, begin a `round`, run an operation) and emits messages; who carries them
is not its business. `ParameterManager` puts it on MPI, `simulation.py` on a virtual network. The asking side is in
`claims.py`, the owner's in `grants.py`, operations on keys in `operations.py`, waiting for the others in `syncing.py`.
Of the network it expects that nothing is lost and that messages from one rank to another arrive in order; those that
travel over different ranks may overtake each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pm.asynchronous.claims import Claims
from pm.asynchronous.grants import Grants
from pm.asynchronous.holdings import Group, Holdings
from pm.asynchronous.locations import DEFAULT_CACHE_KEYS, Locations
from pm.asynchronous.operations import Operations
from pm.asynchronous.syncing import Syncing
from pm.decision import check_techniques
from pm.messages import Kind, Message, joined, message_bytes

DEFAULT_CLOCKS_PER_EXCHANGE = 3
CLOCKS_PER_MOVE_OF_LOADERS = 32
CLOCKS_PER_REFRESH_OF_LOADERS = 9
ROUNDS_TO_ANSWER_OF_LOADERS = 2.0
_LONGEST_SECONDS_WITHOUT_EXCHANGE = 0.1
_LONGEST_SECONDS_BEHIND = 5.0
# Groups of so many keys together have arrays of places and of what homes know, 12 bytes a key.
DEFAULT_KEYS_IN_ARRAYS = 1 << 22

_CHANGES = (Kind.DELTAS, Kind.DROPS)
_TURNS = dict.fromkeys(_CHANGES, 0) | {Kind.MOVED: 2}  # in a parcel; of all else 1
_WAITED_FOR = frozenset(
    (Kind.FETCH, Kind.FETCHED, Kind.PUSH, Kind.PUSHED, Kind.SYNC, Kind.SYNCED, Kind.CLOCK, Kind.REFRESHED)
)
_JOINED = (Kind.REQUEST, Kind.PUT_OFF, Kind.MOVED, Kind.COPIES, Kind.REFRESH, Kind.RECORDS, Kind.PROMOTED)


class Node:
    """The state of one rank. For one thread at a time.

    Messages to a peer leave in parcels, which are numbered; each parcel, and TAKEN where there is nothing else to send,
    says how many of the other side's have been taken in. By that a rank knows what an owner has merged of its changes.
    Parcels leave with rounds, so that ranks exchange few and large messages; but what somebody waits for leaves at once
    with all that comes before it, and a rank whose own workers wait answers the others at once too.

    Args:
        rank, ranks: of this node.
        groups: the groups of keys, the same on all ranks.
        send: called with (peer, messages) for each parcel that leaves; they must arrive together.
        techniques: "all", "relocation", "replication" or "none".
        acts_late: whether intents are acted on as late as is safe (`intents.timing`); False: at once.
        cache_keys: size of the location cache of each group.
        update_threshold: changes to a copy that are smaller than this in every word are held back.
        staleness: how many clocks a rank may be behind the others' updates; None: any number.
        clocks_per_exchange: changes to copies travel once in so many clocks of the fastest worker, or when somebody
            waits for them, or `exchange_is_overdue`. One exchange of a row that each of R ranks changes costs 2 (R - 1)
            messages of it, whatever the number of changes that it carries.
        clocks_per_refresh: where whoever uses a copy changes it, as in training, those that their holders are not
            changing need not be up to date: they are brought so once in so many clocks of the fastest worker, or in
            5 s, or when somebody waits for it, or keys that were put off come late (`rounds_to_answer`): who waits gets
            behind. None: in each exchange, as in AdaPM.
        clocks_per_move: a key that has moved more often than that stays with its owner (`pm.decision.are_restless`);
            None: AdaPM's rule, whatever the number of moves.
        rounds_to_answer: a rank that asks for a key which others need too, and uses it only after more than so many of
            its rounds (more where keys came late so), is told to ask again: the key is here in time, but not from when
            its intent is acted on. None: it gets a copy at once, as in AdaPM.
        keys_in_arrays: groups have arrays of places as long as they have so many keys together; later ones hash tables.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        groups: Sequence[Group],
        send: Callable[[int, list[Message]], None],
        *,
        techniques: str = "all",
        acts_late: bool = True,
        cache_keys: int = DEFAULT_CACHE_KEYS,
        update_threshold: float = 0.0,
        staleness: int | None = None,
        clocks_per_exchange: int = DEFAULT_CLOCKS_PER_EXCHANGE,
        clocks_per_refresh: int | None = None,
        clocks_per_move: int | None = None,
        rounds_to_answer: float | None = None,
        keys_in_arrays: int = DEFAULT_KEYS_IN_ARRAYS,
    ):
        check_techniques(techniques)
        self.rank, self.ranks = rank, ranks
        self.peers = [p for p in range(ranks) if p != rank]
        self.techniques = techniques
        self.acts_late = acts_late
        self.update_threshold = update_threshold
        self.staleness = staleness
        self.clocks_per_move = clocks_per_move if ranks > 2 else None  # of two, who does not own a key knows who does
        self.rounds_to_answer = rounds_to_answer
        self.exchange_is_overdue = False
        self.events = 0  # messages, operations and flushes: what a round may have to answer
        self._clocks_per_exchange = clocks_per_exchange
        self._clocks_per_refresh = clocks_per_refresh
        self._exchanged_at = self._refreshed_at = 0
        self._seconds = self._exchanged_seconds = self._refreshed_seconds = 0.0
        self.counts: Counter[str] = Counter()
        self.counts_by_part: Counter[tuple[str, int, int]] = Counter()  # of a group (`Group.firsts`)
        self.bytes_by_kind: Counter[str] = Counter()
        self.record: Callable[[str, int, np.ndarray, int], None] | None = None
        self._send = send
        self._cache_keys = cache_keys
        self._out: list[list[Message]] = [[] for _ in range(ranks)]
        self._urgent: set[int] = set()  # peers for whom there is something that somebody waits for
        # By peer: the number of its parcels that the first and the last of what waits for it know of.
        self._knew: dict[int, tuple[int, int]] = {}
        self._sent = np.zeros(ranks, np.int64)
        self._arrived = np.zeros(ranks, np.int64)
        self._received = np.zeros(ranks, np.int64)
        self._told = np.zeros(ranks, np.int64)
        self.acknowledged = np.zeros(ranks, np.int64)
        self._keys, self._keys_in_arrays = 0, keys_in_arrays
        self.holdings: list[Holdings] = []
        self.locations: list[Locations] = []
        self.claims = Claims(self)
        self.grants = Grants(self)
        self.operations = Operations(self)
        self.syncing = Syncing(self)
        for group in groups:
            self.add_group(group)
        self._handlers = {
            Kind.PARCEL: self._on_parcel,
            Kind.TAKEN: self._on_taken,
            Kind.REQUEST: self.grants.on_request,
            Kind.DELTAS: self.grants.on_deltas,
            Kind.DROPS: self.grants.on_drops,
            Kind.MOVED: self.grants.on_moved,
            Kind.COPIES: self.claims.on_copies,
            Kind.RECORDS: self.claims.on_records,
            Kind.PROMOTED: self.claims.on_promoted,
            Kind.REFRESH: self.claims.on_refresh,
            Kind.REFUSED: self.claims.on_refused,
            Kind.PUT_OFF: self.claims.on_put_off,
            Kind.FETCH: self.operations.on_fetch,
            Kind.FETCHED: self.operations.on_fetched,
            Kind.PUSH: self.operations.on_push,
            Kind.PUSHED: self.operations.on_pushed,
            Kind.SYNC: self.syncing.on_sync,
            Kind.SYNCED: self.syncing.on_synced,
            Kind.CLOCK: self.syncing.on_clock,
            Kind.REFRESHED: self.syncing.on_refreshed,
        }

    def add_group(self, group: Group) -> Holdings:
        """Declare another group (on all ranks, before any of them names its keys)."""
        self._keys += group.key_bound
        by_key = self._keys <= self._keys_in_arrays
        self.holdings.append(Holdings(group, self.ranks, by_key=by_key))
        keys = group.key_bound if by_key else None
        self.locations.append(Locations(self.rank, self.ranks, group.number, self._cache_keys, keys))
        return self.holdings[-1]

    def replace_group(self, group: Group) -> Holdings:
        """Give a group another layout (on all ranks, while nothing is under way); its keys stay with their owners."""
        by_key = self.holdings[group.number].by_key
        self.holdings[group.number] = Holdings(group, self.ranks, by_key=by_key)
        return self.holdings[group.number]

    def count(self, what: str, group: Group, keys: np.ndarray) -> None:
        """Count something that happened to some keys (int64 `[n]`) of a group."""
        self.counts[what] += len(keys)
        if group.firsts is None or not len(keys):
            return
        if len(group.firsts) == 1:
            self.counts_by_part[what, group.number, 0] += len(keys)
            return
        parts = np.bincount(np.searchsorted(group.firsts, keys, side="right") - 1)
        for part in np.flatnonzero(parts).tolist():
            self.counts_by_part[what, group.number, part] += int(parts[part])

    # Parcels

    def emit(self, peer: int, message: Message) -> None:
        """Put a message into the next parcel for `peer`."""
        self._out[peer].append(message)
        if message.kind in _WAITED_FOR:
            self._urgent.add(peer)

    def next_parcel(self, peer: int | np.ndarray) -> int | np.ndarray:
        """Return the number of the parcel that takes what is emitted now."""
        return self._sent[peer] + 1

    def last_parcels(self) -> np.ndarray:
        """Return, by rank, the number of the parcel that has, or will have, what was emitted last: int64 `[ranks]`."""
        return self._sent + np.array([bool(messages) for messages in self._out])

    def flush(self) -> bool:
        """Send off what has been emitted; return whether there was anything."""
        return any([self._flush_to(peer) for peer in self.peers])

    def flush_urgent(self) -> bool:
        """Send off what somebody waits for, and what is in its way; return whether there was anything."""
        return any([self._flush_to(peer) for peer in tuple(self._urgent)])

    def _flush_to(self, peer: int) -> bool:
        """Send a parcel. Changes to copies are its first messages: whatever the others bring about knows of them.

        News for homes are the last, that others may be joined: where two are about a key, the newer counts. All else
        stays in its order: who has read a value must not get an older copy after it.
        """
        self._urgent.discard(peer)
        messages = self._out[peer]
        if not messages:
            return False
        self._out[peer] = []
        self._sent[peer] += 1
        self._told[peer] = self._received[peer]
        received = int(self._received[peer])
        known, known_last = self._knew.pop(peer, (received, received))
        if known_last < received:
            messages.append(self._taken(peer))
        head = Message(Kind.PARCEL, (int(self._sent[peer]), known))
        ordered = sorted(messages, key=lambda message: _TURNS.get(message.kind, 1))
        self._deliver(peer, [head, *joined(ordered, _JOINED)])
        return True

    def _deliver(self, peer: int, messages: list[Message]) -> None:
        for message in messages:
            self.bytes_by_kind[message.kind.name] += message_bytes(message)
        self._send(peer, messages)

    @property
    def _owes(self) -> bool:
        """Whether peers are to be sent something, if only that their parcels are taken in."""
        return any(self._out) or bool((self._received > self._told).any())

    def _acknowledge(self) -> None:
        """Tell peers that their parcels are taken in, where nothing else does: they may wait for it to ask again."""
        for peer in self.peers:
            if self._received[peer] > self._told[peer] and not self._out[peer]:
                self._told[peer] = self._received[peer]
                self._deliver(peer, [self._taken(peer)])

    def _taken(self, peer: int) -> Message:
        return Message(Kind.TAKEN, (int(self._received[peer]),))

    def _on_parcel(self, source: int, message: Message) -> None:
        """PARCEL(number, taken in): what follows from `source` is its parcel of this number."""
        self._arrived[source], self.acknowledged[source] = message.numbers

    def _before_changes(self, source: int) -> None:
        """Changes by `source` are about to be taken in, of which what waits to be sent to it does not know yet."""
        if self._received[source] < self._arrived[source]:
            knew, self._received[source] = int(self._received[source]), self._arrived[source]
            if self._out[source]:
                first, _ = self._knew.get(source, (knew, knew))
                self._knew[source] = first, int(self._arrived[source])
                self._out[source].append(self._taken(source))

    def _on_taken(self, source: int, message: Message) -> None:
        """TAKEN(number): what follows from `source` knows of our parcels up to this number."""
        self.acknowledged[source] = message.numbers[0]

    # What happens

    def handle(self, source: int, message: Message) -> bool:
        """Take in a message; return whether it is one of this protocol."""
        self.events += 1
        if message.kind in _CHANGES:
            self._before_changes(source)
        handler = self._handlers.get(message.kind)
        if handler is not None:
            handler(source, message)
        return handler is not None

    def handle_again(self, source: int, message: Message) -> None:
        """Take in a message that could not be dealt with before; it brings no changes (`source` may be nobody)."""
        self.events += 1
        self._handlers[message.kind](source, message)

    def after_messages(self) -> None:
        """Go on with what may have become possible (call it when some messages have been handled)."""
        self._received[:] = self._arrived
        self.claims.settle_leaving()
        self.grants.retry()
        self.operations.retry()
        self.syncing.go_on()
        if self.operations.are_waited_for or self.syncing.has_work:
            self.grants.answer()
            self.flush()
            self._acknowledge()
        else:
            self.flush_urgent()

    def round(self) -> None:
        """Exchange what has come together since the last round: intents, changes, and what they lead to."""
        self.counts["rounds"] += 1
        self.claims.round()
        self.grants.answer()
        self.operations.retry()
        if not self.grants.has_questions:  # a question here may need pointers
            for locations in self.locations:
                locations.confirm(self.acknowledged)
        self.grants.round()
        if self.exchange_is_due:
            self.counts["exchanges"] += 1
            self._exchanged_at = self.claims.fastest
            self._exchanged_seconds = self._seconds
            if self.refreshes_all:
                self._refreshed_at, self._refreshed_seconds = self.claims.fastest, self._seconds
            self.exchange_is_overdue = False
        self.syncing.round_ends()
        self.flush()
        self._acknowledge()

    def tell_time(self, seconds: float) -> None:
        """Say what time it is: changes do not wait for long for clocks to advance."""
        self._seconds = seconds
        if seconds - self._exchanged_seconds > _LONGEST_SECONDS_WITHOUT_EXCHANGE:
            self.exchange_is_overdue = True

    @property
    def exchange_is_due(self) -> bool:
        """Whether a round sends on what has changed in copies, and in records that others have copies of."""
        passed = self.claims.fastest - self._exchanged_at
        return passed >= self._clocks_per_exchange or self.exchange_is_overdue or self.syncing.needs_exchange

    @property
    def refreshes_all(self) -> bool:
        """Whether an exchange brings all copies up to date, those too that their holders do not change."""
        if self._clocks_per_refresh is None or self.syncing.needs_exchange or self.claims.come_late:
            return True
        is_old = self._seconds - self._refreshed_seconds > _LONGEST_SECONDS_BEHIND
        return is_old or self.claims.fastest - self._refreshed_at >= self._clocks_per_refresh

    @property
    def needs_round(self) -> bool:
        """Whether a round would have something to do."""
        return (
            self.claims.has_work
            or self.grants.has_work
            or self.syncing.has_work
            or bool(self.operations.waiting)
            or any(locations.waits_for_homes for locations in self.locations)
            or self._owes
        )

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody waits for what a round would bring: the end of a flush, or that keys are asked for."""
        return self.syncing.has_work or (bool(self.operations.waiting) and self.claims.has_keys_to_ask_for)

    @property
    def memory_bytes(self) -> int:
        """Bytes of records, copies and what is known of locations."""
        return sum(h.memory_bytes for h in self.holdings) + sum(known.memory_bytes for known in self.locations)
