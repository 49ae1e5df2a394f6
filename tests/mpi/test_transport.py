"""What the background thread carries."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from pm.messages import Kind, Message, pack
from pm.transport import Transport

CALLS, MESSAGES = 400, 300


@pytest.fixture
def threads_that_take_turns_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("leave", [Transport.wake, Transport.flush])
def test_messages_of_one_call_arrive_together(comm, monkeypatch, threads_that_take_turns_often, leave):
    """While the thread sends, others hand it messages: those of one call never leave in two buffers, and all in order,
    whichever thread sends them.
    """
    arrived, buffers = [], []

    def recorded(messages: list[Message]) -> np.ndarray:
        buffers.append([message.numbers[0] for message in messages if message.kind == Kind.CLOCK])
        return pack(messages)

    monkeypatch.setattr("pm.transport.pack", recorded)

    def fail(error: BaseException) -> None:
        raise error

    transport = Transport(
        comm,
        on_message=lambda source, message: arrived.append((source, message.numbers[0])) if message.numbers else None,
        urgent=lambda: True,
        on_failure=fail,
        while_collective=lambda missing: None,
    )
    transport.start()
    peer, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size

    def send() -> None:
        for call in range(CALLS):
            transport.send(peer, *(Message(Kind.CLOCK, (MESSAGES * call + part,)) for part in range(MESSAGES)))
            leave(transport)

    sender = threading.Thread(target=send)
    sender.start()
    sender.join()
    deadline = time.monotonic() + 60
    while len(arrived) < MESSAGES * CALLS and time.monotonic() < deadline:
        time.sleep(0.01)
    transport.collective(lambda comm: comm.Ibarrier(), 60)
    transport.close()
    np.testing.assert_array_equal(arrived, [(source, number) for number in range(MESSAGES * CALLS)])
    assert all(len(numbers) % MESSAGES == 0 for numbers in buffers)
