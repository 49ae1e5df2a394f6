"""A node on MPI: the lock around it, the thread that moves its messages and begins its rounds, and waiting for it."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from pm.asynchronous.claims import Clock
from pm.asynchronous.holdings import Group
from pm.asynchronous.moves import Moves
from pm.asynchronous.node import Node
from pm.asynchronous.operations import Operation
from pm.asynchronous.pace import Pace
from pm.launch import on_all_ranks
from pm.messages import Kind, Message
from pm.recorder import Recorder
from pm.transport import Transport
from pm.waiting import Waiting

DEFAULT_ROUNDS_PER_SECOND = 1000.0
COUNTS = (
    "rounds",
    "relocations",
    "promotions",
    "replications",
    "replica_steps",
    "hops",
    "late_intents",
    "remote_pulls",
    "remote_pushes",
)

_open_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Runtime:
    """Runs a `Node` (collective). Methods may be called from any thread.

    Args:
        comm: mpi4py communicator, which is duplicated; None for a rank that is alone.
        groups: the groups of keys.
        max_rounds_per_second: how often ranks exchange what has come together.
        record: path of a file for this rank's intents, moves and copies, or None (see `Recorder`).
        timeout_seconds: how long to wait for another rank.
        on_control: called with (source, message) for messages that are none of the node's.
        options: further keywords of `Node`.
    """

    def __init__(
        self,
        comm,
        groups: Sequence[Group],
        *,
        max_rounds_per_second: float = DEFAULT_ROUNDS_PER_SECOND,
        record: object = None,
        timeout_seconds: float = 300.0,
        on_control: Callable[[int, Message], None] = lambda source, message: None,
        **options,
    ):
        self.rank, self.ranks = (0, 1) if comm is None else (comm.rank, comm.size)
        self.lock = threading.RLock()
        self.gone: set[int] = set()
        self.wait_seconds = 0.0
        self.closed = False
        self.waiting = Waiting(self.rank, timeout_seconds, self._count_wait)
        self._recorder = None
        with contextlib.ExitStack() as opened:
            # A rank that fails later is waited for by the others without an end.
            with on_all_ranks(comm, "get the memory or open the file that its manager needs"):
                self.node = Node(self.rank, self.ranks, groups, self._send, **options)
                if record is not None:
                    self._recorder = opened.enter_context(contextlib.closing(Recorder(record)))
            opened.pop_all()
        if self._recorder is not None:
            self._recorder.begin(self.rank, self.ranks)
        self._moves = Moves(self.node, self._recorder)
        self._on_control = on_control
        self._pace = Pace(self.node, max_rounds_per_second)
        self._started = time.perf_counter()
        self.transport = None
        if self.ranks > 1:
            self.transport = Transport(
                comm,
                on_message=self._receive,
                urgent=lambda: self.waiting.waiters > 0,
                on_failure=self.waiting.fail,
                while_collective=self._check_collective,
                after_receiving=self._after_receiving,
            )
            self.transport.start()
        _open_runtimes.add(self)
        self.all_are_here()

    # Keys

    def add_clock(self) -> Clock:
        """Return the clock of another worker."""
        self.check_open()
        with self.lock:
            return self.node.claims.add_clock()

    def close_clock(self, clock: Clock) -> None:
        """A worker is done: its intents end, and nobody waits for its clock."""
        node = self.node
        with self.lock:
            before = node.claims.slowest
            node.claims.close(clock)
            if node.staleness is not None and node.claims.slowest > before:
                node.syncing.clock_advanced(node.claims.slowest)
                node.flush()
        self.wake()

    def close_clocks(self) -> None:
        """All workers are done."""
        with self.lock:
            clocks = list(self.node.claims.clocks)
        for clock in clocks:
            self.close_clock(clock)

    def run(self, operations: Sequence[Operation]) -> None:
        """Begin operations."""
        self.check_open()
        with self.lock:
            for operation in operations:
                self.node.operations.run(operation)
            sent = self.node.flush_urgent()
        if sent:
            self.wake()

    def pull_if_local(self, group: int, keys: np.ndarray, out: np.ndarray) -> bool:
        """Write distinct keys to `out` `[n, width]` if all are here; return whether they are."""
        self.check_open()
        with self.lock:
            return self.node.operations.pull_if_local(group, keys, out)

    def intend(self, clock: Clock, keys_by_group: Sequence[tuple[int, np.ndarray]], start: int, end: int) -> None:
        """A worker will access distinct keys while its clock is in [start, end]."""
        self.check_open()
        with self.lock:
            _check_in_use(clock)
            for group, keys in keys_by_group:
                self.node.claims.intend(clock, group, keys, start, end)
                if self._recorder is not None:
                    self._recorder.note("intends", group, keys, start=start, end=end)

    def advance(self, clock: Clock) -> None:
        """Move a worker's clock on by one; wait as long as the bound on staleness demands."""
        self.check_open()
        node = self.node
        with self.lock:
            _check_in_use(clock)
            before = node.claims.now
            clock.now += 1
            now = node.claims.now
            if node.staleness is not None and now > before:
                node.syncing.clock_advanced(now)
                node.flush()
            if self.ranks == 1:
                node.round()
        if node.staleness is not None:
            self.wake()
            mine = clock.now
            self.wait_until(lambda: node.syncing.may_go_on(mine), lambda: self._describe_ranks_behind(mine))

    def _describe_ranks_behind(self, clock: int) -> str:
        behind = _names(self.node.syncing.ranks_behind(clock))
        return (
            f"rank {behind} to advance its clock (staleness={self.node.staleness}); call advance_clock() equally often "
            "on every rank, and close() workers that are done"
        )

    # Waiting

    def wait_until(self, reached: Callable[[], bool], what: str | Callable[[], str]) -> None:
        """Wait for what messages make true; `what` says what that is, if it does not come in time.

        Raises:
            PeerError: when the time limit passes, or another rank is gone.
        """
        self.waiting.until(reached, what if callable(what) else lambda: what, self._why_in_vain)

    def wait_sync(self) -> None:
        """Wait until what this rank has changed so far is visible on every rank."""
        self.check_open()
        with self.lock:
            token = self.node.syncing.begin()
            self.node.flush()
            if self.ranks == 1:
                self.node.round()
        self.wake()
        self.wait_until(partial(self.node.syncing.is_over, token), "other ranks to take in changes (wait_sync)")

    def all_are_here(self) -> None:
        """Wait for all ranks (collective)."""
        if self.transport is not None:
            self.transport.collective(lambda comm: comm.Ibarrier(), self.waiting.timeout_seconds)

    def wake(self) -> None:
        """Have the background thread look around now."""
        if self.transport is not None:
            self.transport.wake()

    def _count_wait(self, seconds: float) -> None:
        self.wait_seconds += seconds

    def _why_in_vain(self) -> str | None:
        return f"waits for rank {_names(self.gone)}, which has closed or ended" if self.gone else None

    def _check_collective(self, missing: Sequence[int]) -> None:
        self.waiting.raise_failure()
        gone = self.gone.intersection(missing)
        if gone:
            raise RuntimeError(
                f"rank {self.rank} waits in a barrier for rank {_names(gone)}, which has closed or ended"
            )

    # The background thread

    def _send(self, peer: int, messages: Sequence[Message]) -> None:
        self.transport.send(peer, *messages)

    def _receive(self, source: int, message: Message) -> None:
        if message.kind == Kind.LAST:
            self.gone.add(source)
        with self.lock:
            if not self.node.handle(source, message):
                self._on_control(source, message)
        self._pace.received()

    def _after_receiving(self) -> bool:
        if not self._pace.is_turn():
            return False
        with self.lock:
            busy = self._pace.take_turn(ends=self.closed)
        if busy:
            self.waiting.notify()
        return busy

    # What is going on

    def stats(self) -> dict[str, object]:
        """See `ParameterManager.stats`."""
        node = self.node
        with self.lock:
            counts = {name: node.counts[name] for name in COUNTS}
            held = [(len(h.owned.store), len(h.copies.store)) for h in node.holdings]
            by_kind = dict(node.bytes_by_kind)
            memory_bytes = node.memory_bytes
        transport = self.transport
        return {
            **counts,
            "rounds_per_second": counts["rounds"] / max(1e-9, time.perf_counter() - self._started),
            "wait_seconds": self.wait_seconds,
            "bytes_sent": 0 if transport is None else transport.bytes_sent,
            "bytes_received": 0 if transport is None else transport.bytes_received,
            "bytes_by_kind": by_kind,
            "owned": sum(owned for owned, _ in held),
            "copies": sum(copies for _, copies in held),
            "memory_bytes": memory_bytes,
        }

    def explain(self, group: int, key: int) -> dict[str, object]:
        """See `ParameterManager.explain`."""
        with self.lock:
            return self._moves.explain(group, key)

    # The end

    def end(self) -> None:
        """Part from the other ranks and end the background thread."""
        if not self.closed:
            self.closed = True
            if self.transport is not None:
                self.transport.close()
            if self._recorder is not None:
                self._recorder.close()

    def check_open(self) -> None:
        """Raise if this runtime is closed, or its background thread has failed."""
        self.waiting.raise_failure()
        if self.closed:
            raise RuntimeError("this parameter manager is closed")


def _check_in_use(clock: Clock) -> None:
    if clock.closed:
        raise RuntimeError("this worker is closed, so it has no clock and no intents; worker() gives another")


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


@atexit.register
def _end_open_runtimes() -> None:
    """A program that ends without closing parts from the other ranks, so that nobody waits for it."""
    for runtime in list(_open_runtimes):
        runtime.end()
