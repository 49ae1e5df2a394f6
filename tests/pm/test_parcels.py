"""How a node's messages leave: in parcels, each of which is answered."""

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

    def emit(self, rank: int, clock: int) -> bool:
        self.nodes[rank].emit(1 - rank, Message(Kind.CLOCK, (clock,)))
        return self.nodes[rank].flush()

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


def test_a_parcel_is_answered_at_once():
    """Its sender may wait for that to ask again for what it has dropped."""
    pair = Pair()
    assert pair.emit(0, 1) and pair.emit(0, 2)
    assert clocks(pair.arrive(1)) == [1, 2]
    (answer,) = pair.arrive(0)
    assert answer.kind == Kind.TAKEN and answer.numbers == (2,)
    np.testing.assert_array_equal(pair.nodes[0].acknowledged, pair.nodes[0].last_parcels())


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
