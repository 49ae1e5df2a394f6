"""The background thread that moves messages between ranks. Once it runs, MPI is called on it, and in `flush`."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pm.messages import Kind, Message, message_bytes, pack, unpack

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 1
# How long the thread sleeps between looks at the network: while somebody waits (a look takes the processor as long as
# 20 to 30 us of this, so they become rarer), while a run is on, and at rest.
_URGENT_SECONDS = 20e-6
_LONGEST_URGENT_SECONDS = 200e-6
_ACTIVE_SECONDS = 300e-6
_IDLE_SECONDS = 6e-3
_BACK_OFF = 1.3
# How long a rank that closes, or whose thread failed, waits for the others to take its last messages.
_FAREWELL_SECONDS = 5.0
# How long a thread that has failed keeps that from the others.
_DISCOVERY_SECONDS = 1.0


class Transport:
    """Sends and receives messages in the background, in order per pair of ranks.

    MPI libraries spin while they block, so the thread never blocks in MPI: it polls, and sleeps in between, long when
    there is nothing to do. After construction MPI is called by one thread at a time, so a library without
    MPI_THREAD_MULTIPLE will do: by this one, and by one that sends at once what others wait for (`flush`).

    Args:
        comm: communicator to duplicate (collective).
        on_message: called on the thread with (source rank, message), in order per source; LAST ends a source's.
        urgent: asked on the thread; True while somebody waits for a message, so that polls come quickly.
        on_failure: called once on the thread with the exception that ended it.
        while_collective: called now and then, with the ranks that have not come, by whoever waits in `collective`; may
            raise.
        after_receiving: called on the thread, again and again, before what is queued is sent; returns whether it did
            anything.
        held_up: asked on the thread; True while messages that were received have not had their turn, so that no
            collective operation is over.
        describe_peers: called by whoever waited too long in `collective`, for a sentence on the other ranks.

    The thread runs from `start()` to `close()`. Closing ranks part in order: each sends what it had queued and LAST,
    answers a LAST with its own, and sends that rank nothing after it, so that no message is left in the network.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        *,
        on_message: Callable[[int, Message], None],
        urgent: Callable[[], bool],
        on_failure: Callable[[BaseException], None],
        while_collective: Callable[[Sequence[int]], None],
        after_receiving: Callable[[], bool] = lambda: False,
        held_up: Callable[[], bool] = lambda: False,
        describe_peers: Callable[[], str] = str,
    ):
        from mpi4py import MPI  # only where there are ranks to talk to

        self._mpi = MPI
        self._comm = comm.Dup()
        self.rank, self.ranks = self._comm.rank, self._comm.size
        self._on_message = on_message
        self._urgent = urgent
        self._on_failure = on_failure
        self._while_collective = while_collective
        self._after_receiving = after_receiving
        self._held_up = held_up
        self._describe_peers = describe_peers
        self._peers = [p for p in range(self.ranks) if p != self.rank]
        self._outbox: list[deque[Message]] = [deque() for _ in range(self.ranks)]
        self._posted: deque[Callable[[], None]] = deque()
        self._polled: list[Callable[[], bool]] = []
        self._sending: list[tuple[MPI.Request, np.ndarray]] = []
        self._calling = threading.Lock()  # held to call MPI, and to change `_sending` and `_parted`
        self._status = MPI.Status()
        self._wake = threading.Lock()
        self._wake.acquire()
        self._closing = False
        self._parted: set[int] = set()  # those to whom LAST was sent
        self._left: set[int] = set()  # those from whom it came
        self._collectives = 0
        self._joined = [0] * self.ranks
        self.bytes_sent = 0
        self.bytes_received = 0
        self.bytes_to = [0] * self.ranks
        self.bytes_by_kind: Counter[Kind] = Counter()
        self._thread = threading.Thread(target=self._run, name="adaloader-transport", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, peer: int, *messages: Message) -> None:
        """Queue messages for `peer`; those queued close together, and those of one call in any case, leave in one
        buffer. Any thread."""
        self._outbox[peer].extend(messages)  # in one step: the thread may be taking from it

    def wake(self) -> None:
        """Make the thread look at its queues now. Any thread."""
        try:
            self._wake.release()
        except RuntimeError:
            return  # it is awake, or will be at once

    def post(self, call: Callable[[], None], *, wake: bool = True) -> None:
        """Run `call` on the thread soon; without `wake`, when something else wakes it. Any thread."""
        self._posted.append(call)
        if wake:
            self.wake()

    def flush(self) -> None:
        """Send what is queued, and wake the thread. Any thread.

        It leaves at once unless the other thread is in MPI just then: to wait until that has got the interpreter and a
        core takes longer than to send a small message.
        """
        if self._calling.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._calling.release()
        self.wake()

    def collective(self, start: Callable[[MPI.Comm], MPI.Request], timeout_seconds: float | None = None) -> None:
        """Run one non-blocking collective, begun by `start(comm)` on the thread, and wait for it (collective).

        When it returns, all ranks have called it, and what each had sent before has been received here.

        Raises:
            TimeoutError: if it is not over after `timeout_seconds`; names the ranks that have not called it.
        """
        done = threading.Event()
        self._collectives += 1
        number = self._collectives

        def missing() -> list[int]:
            return [p for p in self._peers if self._joined[p] < number]

        def begin() -> None:
            for peer in self._peers:
                self.send(peer, Message(Kind.JOIN, (number,)))
            with self._calling:
                request = start(self._comm)

            def finished() -> bool:
                with self._calling:
                    is_over = request.Test()
                if is_over and not missing() and not self._held_up():
                    done.set()
                    return True
                return False

            self._polled.append(finished)

        self.post(begin)
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not done.wait(0.1):
            self._while_collective(missing())
            if not self.alive:
                raise RuntimeError("the transport thread has ended while a collective operation was under way")
            if deadline is not None and time.monotonic() > deadline:
                names = ", ".join(map(str, missing())) or "(none: the network is slow)"
                raise TimeoutError(
                    f"rank {self.rank} waited {timeout_seconds:g} s in a collective operation for rank {names}; all "
                    f"ranks must make the same collective calls. {self._describe_peers()}"
                )

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Send what is queued, part from the other ranks, then end the thread."""
        self._closing = True
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
            if self._left.issuperset(self._peers) and not self._polled:
                self._comm.Free()
        except BaseException as error:  # whatever ends this thread must reach the trainer, which waits for it
            self._on_failure(error)
            self._send_for(_DISCOVERY_SECONDS, lambda: False)  # what is wrong on all ranks each shall find by itself
            self._part()
            self._send_for(_FAREWELL_SECONDS, lambda: not self._sending and not any(self._outbox))

    def _send_for(self, seconds: float, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            self._send_queued()
            time.sleep(_ACTIVE_SECONDS)

    def _work(self) -> None:
        delay = _ACTIVE_SECONDS
        until_sent = until_urgent = _URGENT_SECONDS
        deadline = None
        while True:
            busy = self._run_posted()
            busy |= self._receive()
            busy |= self._after_receiving()
            if self._closing and deadline is None:
                deadline = time.monotonic() + _FAREWELL_SECONDS
                self._part()
            busy |= self._send_queued()
            if deadline is not None and (self._has_parted() or time.monotonic() > deadline):
                return
            if busy:
                delay, until_sent, until_urgent = _ACTIVE_SECONDS, _URGENT_SECONDS, _URGENT_SECONDS
            elif deadline is not None or self._polled or self._urgent():
                woken = self._wake.acquire(timeout=until_urgent)
                until_urgent = _URGENT_SECONDS if woken else min(until_urgent * _BACK_OFF, _LONGEST_URGENT_SECONDS)
            elif self._sending:  # the other rank may be long in taking it, and each look costs the trainer's core
                self._wake.acquire(timeout=until_sent)
                until_sent = min(until_sent * _BACK_OFF, _ACTIVE_SECONDS)
            elif self._wake.acquire(timeout=delay):
                delay = _ACTIVE_SECONDS
            else:
                delay = min(delay * _BACK_OFF, _IDLE_SECONDS)

    def _has_parted(self) -> bool:
        return self._left.issuperset(self._peers) and not (self._sending or self._posted or any(self._outbox))

    def _part(self, *peers: int) -> None:
        """Queue LAST for `peers`, or all; they are sent nothing that is queued later."""
        for peer in peers or self._peers:
            if peer not in self._parted:
                self._outbox[peer].append(Message(Kind.LAST))

    def _run_posted(self) -> bool:
        waiting = len(self._posted)
        for _ in range(waiting):  # what these post in turn waits until messages have left
            self._posted.popleft()()
        if self._polled:
            self._polled = [finished for finished in self._polled if not finished()]
        return waiting > 0

    def _receive(self) -> bool:
        busy = False
        while True:
            with self._calling:
                envelope = self._comm.Improbe(self._mpi.ANY_SOURCE, _TAG, self._status)
                if envelope is None:
                    return busy
                source = self._status.Get_source()
                buffer = np.empty(self._status.Get_count(self._mpi.BYTE), np.uint8)
                envelope.Recv([buffer, self._mpi.BYTE])
            self.bytes_received += len(buffer)
            for message in unpack(buffer):
                if message.kind == Kind.JOIN:
                    self._joined[source] = message.numbers[0]
                    continue
                if message.kind == Kind.LAST:
                    self._left.add(source)
                    self._part(source)
                self._on_message(source, message)
            busy = True

    def _send_queued(self) -> bool:
        with self._calling:
            busy = self._flush()
            return self._finish_sends() or busy

    def _flush(self) -> bool:
        busy = False
        for peer, queue in enumerate(self._outbox):
            if not queue:
                continue
            messages = []
            while queue:
                messages.append(queue.popleft())
            if peer in self._parted:
                continue
            for at, message in enumerate(messages):
                if message.kind == Kind.LAST:
                    self._parted.add(peer)
                    del messages[at + 1 :]
                    break
            buffer = pack(messages)
            for message in messages:
                self.bytes_by_kind[message.kind] += message_bytes(message)
            self._sending.append((self._comm.Isend([buffer, self._mpi.BYTE], peer, _TAG), buffer))
            self.bytes_sent += len(buffer)
            self.bytes_to[peer] += len(buffer)
            busy = True
        return busy

    def _finish_sends(self) -> bool:
        if not self._sending:
            return False
        before = len(self._sending)
        self._sending = [(request, buffer) for request, buffer in self._sending if not request.Test()]
        return len(self._sending) < before
