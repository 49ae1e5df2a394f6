"""A deterministic simulation of the asynchronous protocol: virtual ranks, a virtual network and virtual time.

The ranks are real `Node`s, with the code that runs over MPI. What is virtual is who carries their messages: buffers
between two ranks arrive in order, those over different ranks overtake each other by any time; ranks and pairs of ranks
stall now and then. Everything follows from a seed, so a schedule that fails, fails again.

`run_seed(17)`, or `Simulation(Setting(...), schedule).run()` with a schedule of your own; `simulator.py` is the command
line. What is checked is said in `invariants.py` (states, after each turn) and `ledger.py` (values, at each read).
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from pm.asynchronous.holdings import Group
from pm.asynchronous.node import DEFAULT_KEYS_IN_ARRAYS, Node
from pm.asynchronous.operations import Action, Operation
from pm.messages import Message, pack, unpack
from pm.simulated.invariants import Invariants
from pm.simulated.ledger import Ledger, Violation
from pm.simulated.schedules import Does, Event, Schedule, common_keys_schedule, random_schedule
from pm.simulated.simulated_network import Network, Setting
from pm.storage.store import RecordClass

_FOR_EVER = 1 << 40
_ROUNDS_OF_REST = 3
_NOTHING = object()  # what a turn returns that has changed nothing


class Simulation:
    """Ranks that follow a schedule.

    Args:
        setting: of ranks and network.
        schedule: what workers do.
        checks: whether promises are checked; without, workers push ones and may be many.
        trace: called with a line for each message that arrives and each event of a worker.
    """

    def __init__(
        self,
        setting: Setting,
        schedule: Schedule,
        *,
        checks: bool = True,
        trace: Callable[[str], None] | None = None,
    ):
        self.setting = setting
        self._rng = np.random.default_rng([setting.seed, 1])
        self.network = Network(setting, self._rng)
        self.now = 0.0
        self._trace = trace
        layout = zip(setting.capacities, setting.widths, setting.dtypes, strict=True)
        self.groups = [
            Group(number, capacity, RecordClass(width, dtype, "additive", 0), _zeros)
            for number, (capacity, width, dtype) in enumerate(layout)
        ]
        self._outbox: list[list[tuple[int, Message]]] = [[] for _ in range(setting.ranks)]
        self.nodes = [self._node(rank) for rank in range(setting.ranks)]
        self.ledger = Ledger(self.groups, setting.ranks, setting.staleness) if checks else None
        self._invariants = Invariants(self.nodes, setting.capacities, setting.cache_keys) if checks else None
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, int, Callable[[], object]]] = []
        self._resting = np.zeros(setting.ranks, np.int64)  # rounds since anything was sent or came
        self._follows_up = np.zeros(setting.ranks, bool)
        self._turns = 0
        self._blocked: list[list[tuple[Iterator, Callable[[], bool]]]] = [[] for _ in self.nodes]
        self._doing: dict[tuple[int, int], Event] = {}  # what each worker that is not at its end is at
        self._clocks = {at: self.nodes[at[0]].claims.add_clock() for at in schedule}
        self._slowest = np.zeros(setting.ranks, np.int64)
        self._held_at = _FOR_EVER  # the clock at which workers wait for each other
        for at, events in schedule.items():
            self._doing[at] = Event(Does.PAUSE)
            self._at(self.network.delay(setting.think_seconds), at[0], self._go_on_with(self._work(*at, events)))
        for rank in range(setting.ranks):
            self._schedule_round(rank)

    def _node(self, rank: int) -> Node:
        s = self.setting
        return Node(
            rank,
            s.ranks,
            self.groups,
            lambda peer, messages: self._outbox[rank].extend((peer, message) for message in messages),
            techniques=s.techniques,
            acts_late=s.acts_late,
            cache_keys=s.cache_keys,
            update_threshold=s.update_threshold,
            staleness=s.staleness,
            clocks_per_exchange=s.clocks_per_exchange,
            clocks_per_refresh=s.clocks_per_refresh,
            clocks_per_move=s.clocks_per_move,
            rounds_to_answer=s.rounds_to_answer,
            keys_in_arrays=DEFAULT_KEYS_IN_ARRAYS if s.seed % 2 else 0,  # both kinds of index keep the promises
        )

    # Time

    def _at(self, after: float, rank: int, call: Callable[[], object]) -> None:
        self._at_time(self.now + after, rank, call)

    def _at_time(self, time: float, rank: int, call: Callable[[], object]) -> None:
        heapq.heappush(self._agenda, (time, next(self._order), rank, call))

    def _turn(self) -> None:
        """Let one rank do what is next."""
        self.now, _, rank, call = heapq.heappop(self._agenda)
        self._turns += 1
        if self._turns > self.setting.most_turns:
            raise Violation(f"does not settle: {self._state()}")
        self._act(rank, call)

    def _act(self, rank: int, call: Callable[[], object]) -> object:
        """Let a rank do something, take away what it has sent, and look whether all is well; return what it returns."""
        result = call()
        self._carry(rank)
        if self._invariants is not None and result is not _NOTHING:
            self._invariants.look(rank)
        blocked, self._blocked[rank] = self._blocked[rank], []
        for work, condition in blocked:
            if condition():
                self._at(self.network.delay(self.setting.think_seconds), rank, self._go_on_with(work))
            else:
                self._blocked[rank].append((work, condition))
        return result

    def _carry(self, rank: int) -> None:
        outgoing, self._outbox[rank] = self._outbox[rank], []
        by_peer: dict[int, list[Message]] = {}
        for peer, message in outgoing:
            by_peer.setdefault(peer, []).append(message)
        for peer, messages in by_peer.items():
            if self._invariants is not None:
                self._invariants.sent(rank, peer, messages)
            buffer = pack(messages)
            self.network.bytes_sent[rank] += len(buffer)
            self.network.on_the_way += 1
            self._resting[:] = 0
            arrival = self.network.arrival(self.now, rank, peer)
            self._at_time(arrival, peer, lambda buffer=buffer, to=peer: self._take_in(rank, to, buffer))

    def _take_in(self, source: int, target: int, buffer: np.ndarray) -> None:
        messages = unpack(buffer)
        self.network.on_the_way -= 1
        self._resting[:] = 0
        if self._invariants is not None:
            self._invariants.arrives(target, messages)
        for message in messages:
            if self._trace is not None:
                self._trace(f"{self.now:10.3f}  {source} -> {target}  {_line(message)}")
            self.nodes[target].handle(source, message)
        if not self.setting.follow_up_seconds:
            self.nodes[target].after_messages()
        elif not self._follows_up[target]:
            self._follows_up[target] = True
            self._at(self._rng.exponential(self.setting.follow_up_seconds), target, lambda: self._follow_up(target))

    def _follow_up(self, rank: int) -> None:
        self._resting[:] = 0
        self._follows_up[rank] = False
        self.nodes[rank].after_messages()

    def _schedule_round(self, rank: int) -> None:
        stall = self.network.delay(0.0)
        self._at(self.setting.round_seconds * self._rng.uniform(0.5, 1.5) + stall, rank, lambda: self._round(rank))

    def _round(self, rank: int) -> object:
        self._resting[rank] += 1
        if self._rng.random() < self.setting.overdue_chance:
            self.nodes[rank].exchange_is_overdue = True
        is_needed = self.nodes[rank].needs_round
        if is_needed or not self.setting.rounds_when_needed:
            self.nodes[rank].round()
        sent = self.nodes[rank].flush()
        self._schedule_round(rank)
        return None if is_needed or sent else _NOTHING

    # Workers

    def _go_on_with(self, work: Iterator) -> Callable[[], None]:
        def go_on() -> None:
            self._resting[:] = 0
            rank, number, event, condition = next(work, (None, None, None, None))
            if rank is None:
                return
            self._doing[rank, number] = event
            if not self.setting.sends_with_rounds:
                self.nodes[rank].flush()
            if condition is None or condition():
                pause = event.seconds if event.does == Does.PAUSE else self.network.delay(self.setting.think_seconds)
                self._at(pause, rank, go_on)
            else:
                self._blocked[rank].append((work, condition))

        return go_on

    def _work(self, rank: int, number: int, events: list[Event]) -> Iterator[tuple]:
        """Carry out events; yields (rank, worker, event, what the worker waits for)."""
        for event in events:
            if self._trace is not None:
                self._trace(f"{self.now:10.3f}  {rank}.{number}  {event.does.name} {event.group} {event.keys.tolist()}")
            yield rank, number, event, self._do(rank, number, event)
        del self._doing[rank, number]
        self._clock_moves(rank)

    def _do(self, rank: int, number: int, event: Event) -> Callable[[], bool] | None:
        node, clock = self.nodes[rank], self._clocks[rank, number]
        if event.does == Does.INTEND:
            node.claims.intend(clock, event.group, event.keys, clock.now + event.start, clock.now + event.end)
        elif event.does == Does.PULL_IF_LOCAL:
            self._pull_if_local(rank, clock.now, event)
        elif event.does == Does.ADVANCE:
            clock.now += 1
            self._clock_moves(rank)
            return lambda: clock.now < self._held_at and node.syncing.may_go_on(clock.now)
        elif event.does == Does.SYNC:
            return self._sync(rank)
        elif event.does != Does.PAUSE:
            operation = self._operate(rank, clock.now, event)
            return (lambda: operation.is_done) if event.waits else None
        return None

    def _clock_moves(self, rank: int) -> None:
        """Tell the others of the slowest worker; one that is at its end keeps nobody waiting."""
        open_clocks = [self._clocks[at].now for at in self._doing if at[0] == rank]
        slowest = min(open_clocks, default=_FOR_EVER)
        if self.setting.staleness is not None and slowest > self._slowest[rank]:
            self._slowest[rank] = slowest
            self.nodes[rank].syncing.clock_advanced(slowest)

    def _operate(self, rank: int, clock: int, event: Event) -> Operation:
        keys, ledger = event.keys, self.ledger
        if event.does == Does.PULL:
            operation = Operation(Action.PULL, event.group, keys, self._room(event.group, keys))
            if ledger is not None:
                reading = ledger.begin_read(rank, clock, event.group, keys)
                operation.on_done = lambda: ledger.end_read(reading, operation.values)
        else:
            action = Action.PUSH if event.does == Does.PUSH else Action.SET
            if ledger is None:
                values = np.ones_like(self._room(event.group, keys))
            else:
                write = ledger.push if action == Action.PUSH else ledger.set
                keys, values = write(rank, clock, event.group, keys)
            operation = Operation(action, event.group, keys, values)
        return self.nodes[rank].operations.run(operation)

    def _room(self, group: int, keys: np.ndarray) -> np.ndarray:
        info = self.groups[group]
        return np.full((len(keys), info.width), -1, info.record_class.dtype)

    def _pull_if_local(self, rank: int, clock: int, event: Event) -> None:
        out = self._room(event.group, event.keys)
        if self.nodes[rank].operations.pull_if_local(event.group, event.keys, out) and self.ledger is not None:
            self.ledger.end_read(self.ledger.begin_read(rank, clock, event.group, event.keys), out)

    def _sync(self, rank: int) -> Callable[[], bool]:
        """Begin to make what `rank` has written visible; once that is over every rank must see it."""
        token = self.nodes[rank].syncing.begin()
        ledger = self.ledger
        writes = [ledger.writes_of(group.number, rank) for group in self.groups] if ledger is not None else []

        def is_over() -> bool:
            if not self.nodes[rank].syncing.is_over(token):
                return False
            for group, part in enumerate(writes):
                ledger.sync(group, part)
            if writes:
                self._invariants.copies_agree(ledger, writes)
            return True

        return is_over

    # A run

    def run(self) -> Simulation:
        """Run to the end, and beyond: all must come to rest, and all copies be equal.

        Raises:
            Violation: if a promise is broken.
        """
        self.settle()
        if self._doing:
            raise Violation(f"workers wait for ever: {self._state()}")
        if self._invariants is None:
            return self
        self._invariants.intents_are_met()
        self._sync_all()
        self._read_all()
        for (rank, _), clock in self._clocks.items():
            self._act(rank, lambda rank=rank, clock=clock: self.nodes[rank].claims.close(clock))
        self.settle()
        self._invariants.copies_are_gone()
        self._invariants.homes_know()
        return self

    def run_to_clock(self, clock: int) -> None:
        """Go on until all workers have come to `clock`, where they wait for each other, or are at their ends."""
        self._held_at = clock
        while any(self._clocks[at].now < clock for at in self._doing):
            self._turn()
        self._held_at = _FOR_EVER

    def settle(self) -> None:
        """Go on until no worker can do anything and ranks have nothing more to say to each other."""
        self._resting[:] = 0
        while (
            self.network.on_the_way
            or self._resting.min() < _ROUNDS_OF_REST
            or self._follows_up.any()
            or self._can_work()
        ):
            self._turn()

    def _can_work(self) -> bool:
        return len(self._doing) > sum(map(len, self._blocked))

    def _sync_all(self) -> None:
        over = [self._act(rank, lambda rank=rank: self._sync(rank)) for rank in range(self.setting.ranks)]
        self.settle()
        late = [rank for rank, is_over in enumerate(over) if not is_over()]
        if late:
            raise Violation(f"the syncs of ranks {late} do not end: {self._state()}")
        self._invariants.copies_agree(self.ledger, self.ledger.written)

    def _read_all(self) -> None:
        operations = []
        for rank in range(self.setting.ranks):
            for group in self.groups:
                event = Event(Does.PULL, group.number, np.arange(group.capacity))
                operations.append((rank, self._act(rank, lambda rank=rank, e=event: self._operate(rank, 0, e))))
        self.settle()
        for rank, operation in operations:
            total = self.ledger.total(operation.group)
            if not operation.is_done or not np.array_equal(operation.values, total):
                raise Violation(f"rank {rank} reads {operation.values.tolist()} at the end, not {total.tolist()}")

    def _state(self) -> str:
        doing = {f"{rank}.{number}": event.does.name for (rank, number), event in self._doing.items()}
        waiting = [len(node.operations.waiting) for node in self.nodes]
        return f"at {self.now:.1f} s, workers are at {doing}, waiting operations by rank {waiting}"

    @property
    def counts(self) -> Counter[str]:
        """What all nodes have counted."""
        return sum((node.counts for node in self.nodes), Counter())

    @property
    def bytes_by_kind(self) -> Counter[str]:
        """Bytes of messages by kind, without those of the buffers' own headers."""
        return sum((node.bytes_by_kind for node in self.nodes), Counter())


def _zeros(keys: np.ndarray, out: np.ndarray) -> None:
    out.fill(0)


def _line(message: Message) -> str:
    arrays = ", ".join(str(array.tolist()) for array in message.arrays)
    return f"{message.kind.name} {message.numbers} {arrays}"


def setting_of(seed: int, *, common_keys: bool = False, **fixed: object) -> tuple[Setting, Schedule]:
    """Return what a seed stands for; `fixed` replaces parts of the setting. With `common_keys` all ranks use the same
    few keys at every clock.
    """
    rng = np.random.default_rng([seed, 0])
    setting = replace(Setting.random(rng, seed), **fixed)
    if common_keys:
        width = setting.ranks
        setting = replace(setting, capacities=(int(rng.integers(1, 4)),), widths=(width,), dtypes=("float64",))
        return setting, common_keys_schedule(rng, setting.ranks, *setting.capacities, clocks=20)
    clocks = int(rng.choice([1, 3, 6, 12]))
    schedule = random_schedule(rng, setting.ranks, int(rng.integers(1, 4)), list(setting.capacities), clocks)
    return setting, schedule


def run_seed(seed: int, *, trace: Callable[[str], None] | None = None, **fixed: object) -> Simulation:
    """Run the random schedule of a seed (`setting_of`) and return the simulation.

    Raises:
        Violation: if a promise is broken.
    """
    setting, schedule = setting_of(seed, **fixed)
    return Simulation(setting, schedule, trace=trace).run()
