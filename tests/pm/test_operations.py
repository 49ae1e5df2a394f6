"""What an operation sees whose keys come to its rank in two ways."""

import numpy as np

from pm.asynchronous.holdings import Group
from pm.asynchronous.node import Node
from pm.asynchronous.operations import Action, Operation
from pm.messages import Kind, Message, narrow
from pm.storage.store import RecordClass


def test_an_answer_that_is_newer_than_the_copy_that_came_before_it_is_not_read():
    """Who reads the copy after it would see less than was seen before."""
    sent = []
    group = Group(0, 100, RecordClass(2, "float64", "additive", 0), lambda keys, out: out.fill(0))
    node = Node(1, 3, [group], lambda peer, messages: sent.extend(messages), acts_late=False)
    key = np.array([k for k in range(100) if node.locations[0].home_of(np.array([k]))[0] == 0][:1], np.int64)
    pull = node.operations.run(Operation(Action.PULL, 0, key, np.full((1, 2), -1.0)))
    node.claims.intend(node.claims.add_clock(), 0, key, 0, 10)
    node.round()
    assert {Kind.FETCH, Kind.REQUEST} <= {message.kind for message in sent} and not pull.is_done
    node.handle(0, Message(Kind.COPIES, (0,), (narrow(key), np.full((1, 2), 1.0))))
    node.handle(0, Message(Kind.FETCHED, (0, pull.number), (narrow(key), np.full((1, 2), 2.0))))
    again = node.operations.run(Operation(Action.PULL, 0, key, np.full((1, 2), -1.0)))
    assert pull.is_done and again.is_done
    np.testing.assert_array_equal(pull.values, again.values)
    np.testing.assert_array_equal(again.values, [[1.0, 1.0]])
