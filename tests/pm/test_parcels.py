"""How a node's messages leave: in parcels, with rounds, or when somebody waits for one of them."""

from __future__ import annotations

import numpy as np
import pytest

from pm.asynchronous.holdings import Group
from pm.asynchronous.node import Node
from pm.decision import are_restless, shared_longer
from pm.messages import Kind, Message, narrow
from pm.storage.store import RecordClass

KEYS = np.arange(4, dtype=np.int64)
REQUEST = Message(Kind.REQUEST, (0, 0), (narrow(KEYS),))
CHANGES = Message(Kind.DELTAS, (0,), (narrow(KEYS), np.ones((4, 2))))


class Pair:
    """Two nodes of three; `sent[rank]` are the parcels that have left it and not arrived."""

    def __init__(self):
        self.sent: list[list[list[Message]]] = [[], []]
        self.nodes = [Node(rank, 3, [self._group()], self._sender(rank)) for rank in range(2)]

    @staticmethod
    def _group() -> Group:
        return Group(0, 10, RecordClass(2, "float64", "additive", 0), lambda keys, out: out.fill(0))

    def _sender(self, rank: int):
        return lambda peer, messages: self.sent[rank].append(messages) if peer < 2 else None

    def emit(self, rank: int, message: Message) -> bool:
        """Have `rank` emit a message for the other, and send off what is urgent; return whether anything left."""
        self.nodes[rank].emit(1 - rank, message)
        return self.nodes[rank].flush_urgent()

    def arrive(self, rank: int) -> list[tuple[Kind, tuple]]:
        """What has left the other rank arrives at `rank`, which goes on; return its kinds and numbers."""
        parcels, self.sent[1 - rank] = self.sent[1 - rank], []
        messages = [message for parcel in parcels for message in parcel]
        for message in messages:
            self.nodes[rank].handle(1 - rank, message)
        self.nodes[rank].after_messages()
        return [(message.kind, message.numbers) for message in messages]


def clock(number: int) -> Message:
    return Message(Kind.CLOCK, (number,))


def test_what_nobody_waits_for_leaves_with_the_next_round():
    pair = Pair()
    assert not pair.emit(0, REQUEST) and not pair.emit(0, REQUEST)
    assert pair.sent[0] == [] and pair.nodes[0].needs_round
    pair.nodes[0].round()
    ((head, joined),) = pair.sent[0]
    assert head.numbers == (1, 0) and len(joined.arrays[0]) == 2 * len(KEYS), "alike messages travel as one"


def test_what_somebody_waits_for_leaves_at_once_with_all_before_it():
    pair = Pair()
    pair.emit(0, REQUEST)
    assert pair.emit(0, clock(3))
    assert pair.arrive(1) == [(Kind.PARCEL, (1, 0)), (Kind.REQUEST, (0, 0)), (Kind.CLOCK, (3,))]


def test_a_parcel_is_answered_with_a_round_if_nothing_else_is_sent():
    pair = Pair()
    pair.emit(0, REQUEST)
    pair.nodes[0].round()
    pair.arrive(1)
    assert pair.sent[1] == [] and pair.nodes[1].needs_round
    pair.nodes[1].claims.is_paused = True  # it gives nothing
    pair.nodes[1].round()
    assert pair.arrive(0) == [(Kind.TAKEN, (1,))]
    assert pair.nodes[0].acknowledged[1] == 1 and not pair.nodes[0].needs_round


def test_what_was_emitted_before_changes_came_does_not_claim_to_know_of_them():
    """By that a rank tells which of its changes are in a value that it is sent."""
    pair = Pair()
    pair.emit(1, REQUEST)
    pair.nodes[0].emit(1, CHANGES)
    pair.nodes[0].flush()
    pair.arrive(1)
    pair.emit(1, clock(1))
    arrived = pair.arrive(0)
    assert arrived == [(Kind.PARCEL, (1, 0)), (Kind.REQUEST, (0, 0)), (Kind.TAKEN, (1,)), (Kind.CLOCK, (1,))]
    assert pair.nodes[0].acknowledged[1] == 1


def test_what_arrives_after_those_changes_is_told_of_at_the_end():
    pair = Pair()
    pair.emit(1, REQUEST)
    for message in (CHANGES, REQUEST):
        pair.nodes[0].emit(1, message)
        pair.nodes[0].flush()
    pair.arrive(1)
    pair.nodes[1].flush()
    assert [numbers for kind, numbers in pair.arrive(0) if kind in (Kind.PARCEL, Kind.TAKEN)] == [(1, 0), (1,), (2,)]
    assert pair.nodes[0].acknowledged[1] == 2


def test_an_answer_does_not_ask_for_another():
    pair = Pair()
    pair.emit(0, REQUEST)
    pair.nodes[0].round()
    pair.arrive(1)
    pair.nodes[1].claims.is_paused = True
    pair.nodes[1].round()
    pair.arrive(0)
    pair.nodes[0].round()
    assert pair.sent == [[], []]


def test_a_parcel_leaves_in_one_call():
    """Its head says that the rest is there: an outbox that let it go alone would have changes counted that are not."""
    pair = Pair()
    pair.nodes[0].emit(1, clock(1))
    pair.nodes[0].emit(1, Message(Kind.REFRESHED, (1,)))
    pair.nodes[0].flush()
    (parcel,) = pair.sent[0]
    assert [message.kind for message in parcel] == [Kind.PARCEL, Kind.CLOCK, Kind.REFRESHED]


@pytest.mark.parametrize("now, moving", [(0, 4), (31, 4), (32, 5), (320, 14)])
def test_a_key_may_move_now_and_then(now, moving):
    moves, never = np.arange(20, dtype=np.int32), np.zeros(20, np.int32)
    np.testing.assert_array_equal(are_restless(moves, never, now, 32), moves >= moving)
    assert not are_restless(moves, never, now, None).any()


def stays(clocks_of_copies: list[int], now: int) -> bool:
    until = np.zeros(1, np.int32)
    for at in clocks_of_copies:
        until = shared_longer(until, at)
    return bool(are_restless(np.zeros(1, np.int32), until, now, 32)[0])


def test_a_key_that_is_copied_again_and_again_stays_until_that_ends():
    assert not stays([100, 101], 101) and stays([100, 101, 102], 102)
    assert not stays(list(range(0, 1000, 60)), 1000), "now and then"
    often = list(range(0, 1000, 5))
    assert stays(often, 1000) and not stays(often, 1200)
