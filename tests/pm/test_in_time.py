"""When copies are made and brought up to date: not before they are used, and not what nobody uses."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from pm.asynchronous.holdings import Copy, Group
from pm.asynchronous.node import Node
from pm.asynchronous.operations import Action, Operation
from pm.messages import Kind, Message
from pm.storage.store import RecordClass

RANKS = 3


class Cluster:
    """Three nodes, each with a worker; `key` is at home on rank 0. Messages arrive when all have had a round."""

    def __init__(self, **options):
        self.messages: deque[tuple[int, int, Message]] = deque()
        self.kinds: list[tuple[Kind, int]] = []  # of all messages, with the number of keys in their first array
        group = Group(0, 100, RecordClass(2, "float64", "additive", 0), lambda keys, out: out.fill(0))
        self.nodes = [
            Node(rank, RANKS, [group], self._sender(rank), acts_late=False, clocks_per_exchange=1, **options)
            for rank in range(RANKS)
        ]
        self.clocks = [node.claims.add_clock() for node in self.nodes]
        home = self.nodes[0].locations[0].home_of(np.arange(100))
        self.key = np.flatnonzero(home == 0)[:1]

    def _sender(self, rank: int):
        def send(peer, messages):
            for message in messages:
                self.messages.append((rank, peer, message))
                self.kinds.append((message.kind, len(message.arrays[0]) if message.arrays else 0))

        return send

    def intend(self, rank: int, start: int, end: int) -> None:
        self.nodes[rank].claims.intend(self.clocks[rank], 0, self.key, start, end)

    def settle(self) -> None:
        """Rounds until nothing is under way."""
        for _ in range(6):
            for node in self.nodes:
                node.round()
            while self.messages:
                source, target, message = self.messages.popleft()
                self.nodes[target].handle(source, message)
            for node in self.nodes:
                node.after_messages()

    def advance(self, *ranks: int) -> None:
        for rank in ranks:
            self.clocks[rank].now += 1
        self.settle()

    def exchange(self) -> None:
        """Two clocks pass: changes come to the owner in the first, and go out in the second."""
        self.advance(*range(RANKS))
        self.advance(*range(RANKS))

    def run(self, rank: int, action: Action, value: float = 0.0) -> Operation:
        operation = Operation(action, 0, self.key, np.full((1, 2), value))
        return self.nodes[rank].operations.run(operation)

    def value(self, rank: int) -> float:
        """Return what `rank` reads of the key, which must be there."""
        operation = self.run(rank, Action.PULL)
        assert operation.is_done
        return float(operation.values[0, 0])

    def state(self, rank: int) -> Copy:
        return Copy(int(self.nodes[rank].holdings[0].copies.find(self.key)[1][0]))

    def count(self, kind: Kind) -> int:
        return sum(found == kind for found, _ in self.kinds)


def shared(**options) -> Cluster:
    """All ranks use the key; 1 and 2 have copies."""
    cluster = Cluster(**options)
    for rank in range(RANKS):
        cluster.intend(rank, 0, 1000)
    cluster.settle()
    assert [cluster.state(rank) for rank in (1, 2)] == [Copy.ACTIVE] * 2
    return cluster


@pytest.mark.parametrize("clocks_per_refresh", [None, 8])
def test_copies_that_are_used_are_refreshed_and_others_once_in_a_while(clocks_per_refresh):
    cluster = shared(clocks_per_refresh=clocks_per_refresh)
    for step in range(1, 4):
        cluster.run(0, Action.PUSH, 1.0)
        cluster.run(2, Action.PUSH, 100.0)
        cluster.exchange()
        assert cluster.value(0) == cluster.value(2) == 101.0 * step
        assert cluster.value(1) == (101.0 * step if clocks_per_refresh is None else 0.0)
    cluster.exchange()
    assert cluster.value(1) == 303.0  # the eighth clock


def test_who_uses_a_copy_again_is_told_what_it_missed():
    cluster = shared(clocks_per_refresh=50)
    cluster.run(0, Action.PUSH, 1.0)
    cluster.exchange()
    assert cluster.value(1) == 0.0
    cluster.run(1, Action.PUSH, 10.0)  # nobody else changes it any more
    assert cluster.value(1) == 10.0
    cluster.exchange()
    assert cluster.value(1) == 11.0 and cluster.value(2) == 0.0


def test_a_flush_brings_all_copies_up_to_date():
    cluster = shared(clocks_per_refresh=50)
    cluster.run(2, Action.PUSH, 1.0)
    cluster.exchange()
    assert cluster.value(1) == 0.0
    token = cluster.nodes[2].syncing.begin()  # of whose changes it speaks
    cluster.settle()
    assert cluster.nodes[2].syncing.is_over(token) and cluster.value(1) == 1.0


def test_a_value_that_is_set_is_told_to_all_at_once():
    cluster = shared(clocks_per_refresh=50)
    operation = cluster.run(1, Action.SET, 7.0)
    cluster.settle()
    cluster.advance(0, 1, 2)
    assert operation.is_done and [cluster.value(rank) for rank in range(RANKS)] == [7.0] * RANKS


def test_a_record_moves_with_its_values_to_a_holder_that_was_behind():
    cluster = Cluster(clocks_per_refresh=50)
    cluster.intend(0, 0, 1)
    cluster.intend(1, 0, 1000)
    cluster.settle()
    cluster.run(0, Action.PUSH, 3.0)
    cluster.advance(0, 1)
    assert cluster.value(1) == 0.0
    cluster.advance(0)  # the owner's intent ends
    assert cluster.count(Kind.PROMOTED) == 0 and cluster.value(1) == 3.0
    assert len(cluster.nodes[1].holdings[0].owned.store) == 1


def test_a_key_that_is_used_only_later_moves_in_place_of_being_copied():
    cluster = Cluster(rounds_to_answer=0.0)
    cluster.intend(0, 0, 2)
    cluster.intend(1, 6, 8)
    cluster.settle()
    assert cluster.state(1) == Copy.PUT_OFF and cluster.count(Kind.PUT_OFF) == 1
    for _ in range(4):
        cluster.advance(0, 1)
    assert cluster.state(1) == Copy.PUT_OFF and cluster.count(Kind.REQUEST) == 1
    cluster.advance(0, 1)  # one clock is left
    assert cluster.count(Kind.COPIES) == 0 and cluster.count(Kind.RECORDS) == 1
    assert cluster.value(1) == 0.0 and len(cluster.nodes[1].holdings[0].owned.store) == 1


def test_a_key_that_others_still_need_is_copied_when_its_use_is_near():
    cluster = Cluster(rounds_to_answer=0.0)
    cluster.intend(0, 0, 1000)
    cluster.intend(1, 3, 4)
    cluster.settle()
    assert cluster.state(1) == Copy.PUT_OFF
    cluster.advance(1)
    cluster.advance(1)
    assert cluster.state(1) == Copy.ACTIVE
    for _ in range(3):
        cluster.advance(1)
    assert cluster.state(1) == Copy.FREE and not cluster.nodes[1].claims._put_off.get(0)


def test_of_keys_that_are_asked_for_together_only_those_of_later_are_put_off():
    cluster = Cluster(rounds_to_answer=0.0)
    owner, asker = cluster.nodes[:2]
    near, far = np.flatnonzero(owner.locations[0].home_of(np.arange(100)) == 0)[:2]
    owner.claims.intend(cluster.clocks[0], 0, np.array([near, far]), 0, 1000)
    asker.claims.intend(cluster.clocks[1], 0, np.array([near]), 1, 1000)
    asker.claims.intend(cluster.clocks[1], 0, np.array([far]), 6, 1000)
    cluster.settle()
    _, states = asker.holdings[0].copies.find(np.array([near, far]))
    assert states.tolist() == [Copy.ACTIVE, Copy.PUT_OFF] and cluster.count(Kind.REQUEST) == 1


def test_keys_are_put_off_before_it_is_known_how_long_a_round_takes():
    """The estimate for acting on intents begins at ten clocks a round, so that the first ones are acted on at once."""
    cluster = Cluster(rounds_to_answer=2.0)
    cluster.intend(0, 0, 1000)
    cluster.intend(1, 8, 9)
    cluster.nodes[1].round()
    cluster.settle()
    assert cluster.state(1) == Copy.PUT_OFF


def test_an_intent_that_ends_while_it_is_put_off_leaves_nothing():
    cluster = Cluster(rounds_to_answer=0.0)
    cluster.intend(0, 0, 1000)
    cluster.intend(1, 5, 6)
    cluster.settle()
    cluster.clocks[1].now = 50
    cluster.settle()
    assert cluster.state(1) == Copy.FREE and not cluster.nodes[1].claims._put_off
    assert cluster.count(Kind.COPIES) == cluster.count(Kind.DROPS) == 0


def test_whoever_needs_a_key_that_was_put_off_gets_it_and_puts_off_less():
    cluster = Cluster(rounds_to_answer=2.0)
    cluster.clocks[1].timing.likely_clocks_per_round = 1.0
    cluster.intend(0, 0, 1000)
    cluster.intend(1, 5, 6)
    cluster.nodes[1].round()
    cluster.settle()
    assert cluster.state(1) == Copy.PUT_OFF
    pull = cluster.run(1, Action.PULL)
    assert not pull.is_done
    cluster.nodes[1].round()
    assert 3.9 < cluster.nodes[1].claims._rounds_to_answer <= 4.0
    cluster.settle()
    assert pull.is_done
    for _ in range(100):
        cluster.nodes[1].round()
    assert cluster.nodes[1].claims._rounds_to_answer < 2.5  # it is forgotten


def test_without_it_copies_come_at_once():
    cluster = Cluster()
    cluster.intend(0, 0, 2)
    cluster.intend(1, 60, 80)
    cluster.settle()
    assert cluster.state(1) == Copy.ACTIVE and cluster.count(Kind.PUT_OFF) == 0
