"""Waiting for another thread: until it is done, fails, can no longer be, or takes too long."""

import threading
import time

import pytest

from pm import PeerError
from pm.waiting import Waiting


def make(timeout_seconds=30.0):
    waits = []
    return Waiting(3, timeout_seconds, waits.append), waits


def soon(call):
    thread = threading.Timer(0.02, call)
    thread.start()
    return thread


def test_waits_until_it_is_told():
    waiting, waits = make()
    done = threading.Event()
    soon(lambda: (done.set(), waiting.notify()))
    waiting.until(done.is_set, str)
    assert len(waits) == 1 and 0 < waits[0] < 30 and waiting.waiters == 0
    waiting.until(done.is_set, str)
    assert len(waits) == 1, "nothing to wait for is no wait"


def test_a_missed_notification_costs_time_only():
    waiting, _ = make()
    done = threading.Event()
    soon(done.set)  # and nobody is told
    waiting.until(done.is_set, str)


def test_a_failure_reaches_whoever_waits_and_whoever_comes_later():
    waiting, _ = make()
    error = KeyError("the thread is gone")
    soon(lambda: waiting.fail(error))
    with pytest.raises(KeyError, match="the thread is gone"):
        waiting.until(lambda: False, str)
    with pytest.raises(KeyError, match="the thread is gone"):
        waiting.until(lambda: True, str)
    assert waiting.waiters == 0


def test_the_time_limit_says_for_what_and_is_counted():
    waiting, waits = make(timeout_seconds=0.15)
    with pytest.raises(PeerError, match=r"rank 3 waited 0 s \(timeout_seconds=0.15\) for rank 5 to send rows"):
        waiting.until(lambda: False, lambda: "rank 5 to send rows")
    assert waits[0] >= 0.15


def test_waiting_in_vain_ends_at_once_unless_it_came_after_all():
    waiting, _ = make()
    with pytest.raises(PeerError, match="rank 3 waits for rank 5, which has closed"):
        waiting.until(lambda: False, str, lambda: "waits for rank 5, which has closed")
    arrived = []

    def in_vain():  # the last message came between the look at the condition and this one
        arrived.append(1)
        return "waits for rank 5, which has closed"

    waiting.until(lambda: bool(arrived), str, in_vain)


def test_many_threads_can_wait():
    waiting, waits = make()
    go = threading.Event()
    threads = [threading.Thread(target=waiting.until, args=(go.is_set, str)) for _ in range(8)]
    for thread in threads:
        thread.start()
    while waiting.waiters < 8:
        time.sleep(1e-3)
    go.set()
    waiting.notify()
    for thread in threads:
        thread.join(10)
    assert waiting.waiters == 0 and len(waits) == 8
