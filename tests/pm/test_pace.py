"""When rounds begin: after steps, when something has happened that somebody waits for, and after a while."""

import pytest

import pm.asynchronous.pace
from pm.asynchronous.pace import Pace


class Node:
    """What a pace asks of a node, and how many rounds it had."""

    def __init__(self):
        self.claims = self
        self.fastest = self.events = self.rounds = 0
        self.needs_round, self.is_waited_for = True, False

    def round(self):
        self.rounds += 1

    def after_messages(self):
        pass

    def tell_time(self, seconds):
        pass


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(pm.asynchronous.pace, "time", clock)
    return clock


@pytest.fixture
def node():
    return Node()


@pytest.fixture
def turn(node, clock):
    pace = Pace(node, max_rounds_per_second=1000.0)

    def turn(milliseconds: float) -> int:
        """Let time pass and have a turn; return how many rounds it had."""
        clock.now += milliseconds * 1e-3
        before = node.rounds
        pace.take_turn()
        return node.rounds - before

    turn(0.0)  # the first
    return turn


def test_a_step_brings_a_round_but_not_more_often_than_allowed(node, turn):
    node.fastest += 1
    assert turn(0.5) == 0
    assert turn(0.6) == 1
    assert turn(1.1) == 0


def test_who_waits_gets_one_round_for_what_happened(node, turn):
    """Rounds that find nothing new would keep the rank that is waited for from the processor."""
    node.is_waited_for = True
    node.events += 1
    assert turn(1.1) == 1
    assert [turn(1.1) for _ in range(5)] == [0] * 5
    node.events += 1
    assert turn(1.1) == 1


def test_without_anybody_waiting_what_happens_waits_for_a_step(node, turn):
    node.events += 1
    assert turn(5.0) == 0
    node.fastest += 1
    assert turn(0.1) == 1


def test_nothing_waits_for_long(node, turn):
    assert turn(10.0) == 0
    assert turn(1.1) == 1


def test_no_round_where_there_is_nothing_to_do(node, turn):
    node.needs_round = False
    node.fastest += 1
    assert turn(50.0) == 0
