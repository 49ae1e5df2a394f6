"""The manager of several ranks at staleness 0: rows live with their owners, and every lookup sees every step before it.

One optimizer step is one round. Each rank sends each owner the gradients of the rows that it owns, and its STEP; what
owners do with them is in `serving.py`, how rows are asked for in `asking.py`. This file hands over steps, waits, and
begins and ends things.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import cuda_ops
from pm.asking import NO_ROWS, Asking
from pm.directory import Directory
from pm.manager import Manager
from pm.messages import Kind, Message
from pm.peers import Peers
from pm.serving import Serving
from pm.shards import Shards
from pm.tables import RowPlan, Table, TableGradient, TableSpec
from pm.transport import Transport
from pm.waiting import PeerError, Waiting


class SynchronousManager(Manager):
    """A `Manager` over the ranks of a communicator; construction, `add_tables` and `replace_rule` are collective.

    A rank that waits for another gets a `PeerError` that names it: when the other closes, or says nothing for too long.

    Args:
        comm: an MPI communicator; it is duplicated.
        timeout_seconds: how long to wait for another rank.
    """

    def __init__(self, comm, timeout_seconds: float):
        super().__init__()
        self.rank, self.ranks = comm.rank, comm.size
        self.timeout_seconds = timeout_seconds
        self.directory = Directory(self.ranks)
        self.others = Peers(self.rank, self.ranks)
        self.peers = self.others.others
        self.on_control: Callable[[int, Message], None] | None = None
        self.on_failure: Callable[[BaseException], None] | None = None
        self.describe_hyperparameter: Callable[[], Callable[[int, int], str] | None] = lambda: None
        self._shut = False
        self._waiting = Waiting(self.rank, timeout_seconds, self._count_wait)
        self._asking = Asking(self)
        self._serving = Serving(self)
        self._shards = Shards(self)
        self._handlers = self._message_handlers()
        self.transport = Transport(
            comm,
            on_message=self._receive,
            urgent=self._is_urgent,
            on_failure=self._fail,
            while_collective=self._check_collective,
            after_receiving=self._after_receiving,
        )
        self.transport.start()

    def _is_urgent(self) -> bool:
        return self._waiting.waiters > 0 or self._serving.applied < self.steps

    def _after_receiving(self) -> bool:
        """Called on the background thread, again and again; returns whether there was something to do."""
        return False

    def add_tables(self, specs: Sequence[TableSpec]) -> list[Table]:
        added = super().add_tables(specs)
        self.barrier()  # nobody asks for rows of a table that another rank does not know yet
        return added

    def replace_rule(self, table: Table, spec: TableSpec) -> None:
        self.settle()
        self.barrier()
        with self._asking.planning:
            self._on_background(lambda: self._replace_rule(table, spec))
        self.barrier()

    def _replace_rule(self, table: Table, spec: TableSpec) -> None:
        super().replace_rule(table, spec)
        self._serving.moved(table)

    def _on_background(self, call: Callable[[], None]) -> None:
        """Run `call` on the background thread and wait for it."""
        done = threading.Event()

        def run() -> None:
            call()
            done.set()
            self._waiting.notify()

        self.transport.post(run)
        self.wait_until(done.is_set, lambda: "its own background thread")

    # Rows

    def rows_owned(self, table: Table, rows: np.ndarray) -> np.ndarray:
        return rows[self.directory.owner_of(table.keys(rows)) == self.rank]

    def by_owner(self, table: Table, rows: np.ndarray) -> list[np.ndarray]:
        """Return, per rank, the positions in `rows` (int64 `[n]`) of those that it owns."""
        order, counts = cuda_ops.partition(self.directory.owner_of(table.keys(rows)), self.ranks)
        return np.split(order, np.cumsum(counts)[:-1])

    def intend(self, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        self._check_open()
        return self._asking.intend(table, rows, expected)

    def ask_own(self, plan: RowPlan, rows: np.ndarray) -> None:
        """Tell this rank, as the owner of `rows`, that it intends them itself."""
        slots, expected = plan.slots, plan.expected
        self.transport.post(lambda: self._serving.ask(self.rank, plan.number, plan.table, rows, slots, expected))

    def release(self, plan: RowPlan) -> None:
        self._asking.release(plan)

    def flush_intents(self) -> None:
        self._send_released()
        self.transport.wake()

    def _send_released(self) -> None:
        released = self._asking.take_released()
        if len(released):
            for peer in range(self.ranks):
                self._deliver(peer, Message(Kind.RELEASE, (), (released,)))

    def read(self, plan: RowPlan, out: np.ndarray) -> np.ndarray:
        if plan.released:
            return self.pull(plan.table, plan.rows, out)
        self._asking.read(plan, out)
        return out

    def pull(self, table: Table, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        self.traffic.on_demand_pulls += 1
        self._asking.pull(table, rows, out)
        return out

    def gather_own(self, table: Table, slots: np.ndarray, out: np.ndarray, positions: np.ndarray) -> None:
        """Write the values of `slots` to rows `positions` of `out`."""
        with self._values:  # steps wait for the trainer, but other ranks' renorm does not
            if table.history is not None:
                table.advance(table.store, slots)
            cuda_ops.gather(table.store.words, table.store.stride, slots, out, positions=positions)

    def renorm(self, table: Table, rows: np.ndarray, max_norm: float, norm_type: float) -> None:
        self.settle()
        limits = np.array([max_norm, norm_type], np.float64)
        parts = self.by_owner(table, rows)
        for peer in self.peers:
            if len(parts[peer]):
                self.transport.send(peer, Message(Kind.RENORM, (table.number,), (rows[parts[peer]], limits)))
        self.transport.wake()
        own = rows[parts[self.rank]]
        if len(own):
            self._on_background(lambda: self.renorm_own(table, own, max_norm, norm_type))

    # Steps

    def submit(
        self,
        gradients: Sequence[TableGradient],
        groups: Mapping[int, dict[str, object]],
        *,
        finished: Sequence[RowPlan] = (),
        optimizer: int = 0,
        vector: np.ndarray | None = None,
    ) -> None:
        self._check_open()
        started = time.perf_counter()
        self._serving.groups[self.steps] = groups
        for gradient in gradients:
            self._send_gradient(gradient)
        for plan in finished:
            self.release(plan)
        self._send_released()
        step = Message(Kind.STEP, (self.steps, optimizer), (np.empty(0) if vector is None else vector,))
        self.steps += 1
        for peer in range(self.ranks):
            self._deliver(peer, step)
        self.transport.wake()
        self.traffic.seconds["exchange"] += time.perf_counter() - started

    def _send_gradient(self, gradient: TableGradient) -> None:
        plan = gradient.plan
        if plan is not None and not plan.released:
            parts = [plan.own if p == self.rank else plan.remote[p] for p in range(self.ranks)]
            number = plan.number
        else:
            parts = self.by_owner(gradient.table, gradient.rows)
            number = -1
        dim = gradient.table.spec.dim
        counted = gradient.counts is not None
        scale = np.array([gradient.scale], np.float64)
        numbers = (self.steps, gradient.table.number, number, gradient.ordinal, int(counted))
        flat = np.ascontiguousarray(gradient.values).reshape(-1)
        for peer in (*self.peers, self.rank):
            part = parts[peer]  # its values are copied here: the user may change the gradient once the step is over
            values = cuda_ops.gather(flat, dim, part, np.empty((len(part), dim), flat.dtype))
            rows = gradient.rows[part] if number < 0 else NO_ROWS
            counts = gradient.counts[part] if counted else NO_ROWS
            self._deliver(peer, Message(Kind.GRADIENT, numbers, (rows, values, scale, counts)))

    def _deliver(self, peer: int, message: Message) -> None:
        """Send to a peer, or hand to our own background thread: owners treat all ranks alike, in one order."""
        if peer == self.rank:
            self.transport.post(lambda: self._receive(self.rank, message))
        else:
            self.transport.send(peer, message)

    @property
    def applied(self) -> int:
        """Number of steps that the rows owned here reflect."""
        return self._serving.applied

    def _version_after_step(self) -> int:
        return self._serving.applied + 1

    def step_of_others(self) -> tuple[int, np.ndarray] | None:
        """Return (optimizer, hyperparameters) of a step that others have handed over and this rank has not, or None."""
        arrived = self._serving.round_of(self.steps)
        if arrived is None or not arrived.stepped:
            return None
        source = next(iter(list(arrived.stepped)))
        return arrived.optimizer[source], arrived.stepped[source]

    # Waiting

    def _count_wait(self, seconds: float) -> None:
        self.traffic.wait_seconds += seconds
        self.traffic.seconds["waiting"] += seconds

    def wait_until(self, reached: Callable[[], bool], describe: Callable[[], str]) -> None:
        """Block until `reached()` is true; `describe()` says what for, if the time limit passes."""
        self._waiting.until(reached, describe)

    def settle(self) -> None:
        self._check_open()
        self._waiting.until(self._is_settled, self._describe_missing_step, self._why_step_cannot_come)

    def _is_settled(self) -> bool:
        return self.applied >= self.steps and self.others.all_ready(self.steps)

    def _describe_missing_step(self) -> str:
        behind = self.others.behind(self.steps)
        not_stepped = self.others.not_stepped(self._serving.round_of(self.applied))
        names = [p for p in not_stepped if p in behind] or behind
        return self.others.missing(names, f"take step {self.applied}")

    def _why_step_cannot_come(self) -> str | None:
        others, step = self.others, self.applied
        cannot = others.gone.intersection(others.behind(self.steps))
        if step < self.steps:
            cannot |= others.ended.intersection(others.not_stepped(self._serving.round_of(step)))
        return others.closed(cannot, f"step {step}") if cannot else None

    def wait_for_rows(self, reached: Callable[[], bool], asked: Sequence[int]) -> None:
        others = self.others
        self._waiting.until(reached, lambda: others.missing(asked, "send rows"), lambda: others.why_gone(asked, "rows"))

    def wait_for_others(self, missing: Callable[[], Sequence[int]], action: str) -> None:
        """Block until no rank is `missing()`; `action` says what those that are have not done."""

        def why_in_vain() -> str | None:
            closed = self.others.ended.intersection(missing())
            return self.others.closed(closed, "a collective operation") if closed else None

        self._waiting.until(lambda: not missing(), lambda: self.others.missing(missing(), action), why_in_vain)

    def _check_collective(self, missing: Sequence[int]) -> None:
        """Called again and again while a collective operation waits for ranks: raise if one cannot come."""
        self._waiting.raise_failure()
        cannot = self.others.ended.intersection(missing)
        if cannot:
            raise PeerError(f"rank {self.rank} {self.others.closed(cannot, 'a collective operation')}")

    # Whole tables

    def barrier(self) -> None:
        """Wait until all ranks are here, and all messages that they sent before have been received (collective)."""
        self._check_open()
        self.transport.collective(lambda comm: comm.Ibarrier(), self.timeout_seconds)

    def gather_table(self, table: Table, receive: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None) -> None:
        self.settle()
        self._shards.gather(table, receive)

    def rewrite_ended(self) -> None:
        """Owners have set rows from outside a step (collective): have outstanding plans fetched anew."""
        self.barrier()  # what is asked for from here on is answered with the rows that were set
        self._asking.forget_arrived()

    # The background thread: answers

    def _receive(self, source: int, message: Message) -> None:
        handler = self._handlers.get(message.kind)
        if handler is not None:
            handler(source, message)
        elif self.on_control is not None:
            self.on_control(source, message)
        self._waiting.notify()

    def _message_handlers(self) -> dict[Kind, Callable[[int, Message], None]]:
        serving = self._serving
        return {
            Kind.INTENT: serving.on_intent,
            Kind.RELEASE: serving.on_release,
            Kind.WANT: serving.on_want,
            Kind.GRADIENT: serving.on_gradient,
            Kind.STEP: serving.on_step,
            Kind.PULL: serving.on_pull,
            Kind.RENORM: serving.on_renorm,
            Kind.SHARD: self._shards.on_shard,
            Kind.ROWS: self._asking.on_rows,
            Kind.READY: self.others.on_ready,
            Kind.PULLED: self._asking.on_pulled,
            Kind.CLOSED: self._on_closed,
            Kind.LAST: self._on_last,
        }

    def _on_closed(self, source: int, message: Message) -> None:
        """CLOSED(): `source` takes no more steps, but goes on serving its rows."""
        self.others.ended.add(source)
        self._serving.ended(source)
        self._end_with_the_last()

    def _on_last(self, source: int, message: Message) -> None:
        """LAST(): `source` sends and answers nothing more."""
        self.others.gone.add(source)
        self._on_closed(source, message)

    # Counting, closing

    @property
    def memory_bytes(self) -> int:
        return super().memory_bytes + self._serving.memory_bytes

    @property
    def bytes_sent(self) -> int:
        return self.transport.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self.transport.bytes_received

    def raise_failure(self) -> None:
        """Raise what ended the background thread, if something did. Any thread."""
        self._waiting.raise_failure()

    @property
    def failure_is_known(self) -> bool:
        """Whether the trainer's thread has met what ended the background thread, or wants no more of this manager."""
        return self._waiting.failure_was_raised or self._shut

    def _fail(self, error: BaseException) -> None:
        self._waiting.fail(error)
        if self.on_failure is not None:
            self.on_failure(error)

    @property
    def closed_peers(self) -> frozenset[int]:
        """The ranks that take no more steps."""
        return frozenset(self.others.ended)

    def close(self, *, linger: bool = False) -> None:
        """Say that this rank takes no more steps and asks for no more rows; with `linger`, wait until all have said so.

        Until then its rows go on being served in the background, for others may still be looking them up.
        """
        if not self._shut:
            self._shut = True
            for peer in self.peers:
                self.transport.send(peer, Message(Kind.CLOSED))
            self.transport.wake()
            self._end_with_the_last()
        while linger and self.transport.alive:
            time.sleep(2e-3)

    def _end_with_the_last(self) -> None:
        if self._shut and self.others.ended.issuperset(self.peers):
            self.transport.close()

    def _check_open(self) -> None:
        if self._shut:
            raise RuntimeError(
                f"the manager of rank {self.rank} is closed: look rows up, step, and gather tables before close()"
            )
