"""How a node's messages leave: in parcels, of which a peer has one at a time to answer."""

from __future__ import annotations

import numpy as np
import pytest

from pm.decision import are_restless
from pm.messages import Kind, Message
from pm.node import Node


class Pair:
    """Two nodes of three, without groups; `sent[rank]` are the parcels that have left it and not arrived."""

    def __init__(self):
        self.sent: list[list[list[Message]]] = [[], []]
        self.nodes = [Node(rank, 3, [], self._sender(rank)) for rank in range(2)]

    def _sender(self, rank: int):
        return lambda peer, messages: self.sent[rank].append(messages)

    def emit(self, rank: int, clock: int, **options) -> bool:
        self.nodes[rank].emit(1 - rank, Message(Kind.CLOCK, (clock,)))
        return self.nodes[rank].flush(**options)

    def arrive(self, rank: int) -> list[Message]:
        """What has left the other rank arrives at `rank`, which goes on; return it."""
        parcels, self.sent[1 - rank] = self.sent[1 - rank], []
        messages = [message for parcel in parcels for message in parcel]
        for message in messages:
            self.nodes[rank].handle(1 - rank, message)
        self.nodes[rank].after_messages()
        return messages


def clocks(messages):
    return [message.numbers[0] for message in messages if message.kind == Kind.CLOCK]


def test_what_comes_while_a_parcel_is_unanswered_leaves_together_after_the_answer():
    pair = Pair()
    assert pair.emit(0, 1)
    assert not any(pair.emit(0, clock) for clock in (2, 3, 4))
    assert clocks(pair.arrive(1)) == [1]
    answer = pair.arrive(0)
    assert [message.kind for message in answer] == [Kind.TAKEN] and answer[0].numbers == (1,)
    assert len(pair.sent[0]) == 1 and clocks(pair.sent[0][0]) == [2, 3, 4]


def test_what_somebody_waits_for_leaves_at_once_with_all_before_it():
    pair = Pair()
    pair.emit(0, 1)
    assert not pair.emit(0, 2)
    assert pair.emit(0, 3, at_once=True)
    assert clocks(pair.arrive(1)) == [1, 2, 3]


def test_two_that_wait_for_each_other_do_not_wait_for_ever():
    pair = Pair()
    pair.emit(0, 1), pair.emit(1, 1)
    pair.emit(0, 2), pair.emit(1, 2)
    assert clocks(pair.arrive(0)) == [1]  # the answer takes along what was held back
    assert clocks(pair.arrive(1)) == [1, 2]
    assert clocks(pair.arrive(0)) == [2]
    pair.arrive(1)
    assert pair.sent == [[], []]
    assert [node.parcels_sent.sum() for node in pair.nodes] == [node.acknowledged.sum() for node in pair.nodes]


def test_an_answer_does_not_ask_for_another():
    pair = Pair()
    pair.emit(0, 1)
    pair.arrive(1), pair.arrive(0)
    assert pair.sent == [[], []]


def test_a_parcel_leaves_in_one_call():
    """Its head says that the rest is there: an outbox that let it go alone would have changes counted that are not."""
    pair = Pair()
    pair.nodes[0].emit(1, Message(Kind.CLOCK, (1,)))
    pair.nodes[0].emit(1, Message(Kind.REFRESHED, (1,)))
    pair.nodes[0].flush()
    (parcel,) = pair.sent[0]
    assert [message.kind for message in parcel] == [Kind.PARCEL, Kind.CLOCK, Kind.REFRESHED]


@pytest.mark.parametrize("clock, moving", [(0, 2), (31, 2), (32, 3), (320, 12)])
def test_a_key_may_move_now_and_then(clock, moving):
    moves = np.arange(20, dtype=np.int32)
    np.testing.assert_array_equal(are_restless(moves, clock, 32), moves >= moving)
    assert not are_restless(moves, clock, None).any()
