"""Tables that share a group of keys, and plans that share an intent."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import pm
from pm.asynchronous.claims import Claims
from pm.asynchronous.table_groups import Span, TableGroups
from pm.asynchronous.table_plans import JointIntents, TablePlan
from pm.tables import Table
from tests.pm.oracle import make_spec


def tables_of(*kinds: tuple[int, int, str]) -> list[Table]:
    """Tables of (rows, dim, rule)."""
    return [Table(make_spec(n, rows, dim, "float32", rule), n, None) for n, (rows, dim, rule) in enumerate(kinds)]


def test_tables_whose_records_are_alike_share_a_group():
    groups, tables = TableGroups(), tables_of((7, 4, "sgd"), (5, 4, "adagrad"), (3, 4, "sgd"), (9, 2, "sgd"))
    assert groups.add(tables) == [0, 1, 2]
    assert [[table.number for table in groups.members(number)] for number in range(3)] == [[0, 2], [1], [3]]
    assert groups.span_of(tables[2]) == Span(0, 7, 3)
    assert groups.firsts(0).tolist() == [0, 7]
    later = Table(make_spec(4, 6, 4, "float32", "sgd"), 4, None)
    assert groups.add([later]) == [3]  # a group that is in use has no room


@pytest.mark.parametrize("rule", ["frozen", "adam"])
def test_tables_that_must_be_by_themselves_are(rule):
    tables = tables_of(*[(5, 2, "sgd" if rule == "frozen" else rule)] * 2)
    if rule == "frozen":
        for table in tables:
            table.spec = replace(table.spec, rule=pm.Frozen())
    assert TableGroups().add(tables) == [0, 1]


def test_keys_are_split_by_table(rng):
    groups, sizes = TableGroups(), [11, 1, 30]
    tables = tables_of(*((rows, 4, "sgd") for rows in sizes))
    groups.add(tables)
    keys = rng.permutation(sum(sizes))[:25]
    found = {}
    for table, some, rows in groups.split(0, keys):
        np.testing.assert_array_equal(groups.span_of(table).keys(rows), keys[some])
        assert len(rows) and (rows < table.spec.rows).all() and (rows >= 0).all()
        found[table.number] = len(rows)
    assert sum(found.values()) == len(keys)
    at, rows = groups.span_of(tables[2]).rows_among(keys)
    assert len(at) == found.get(2, 0)
    np.testing.assert_array_equal(keys[at] - 12, rows)


class Intended:
    """What is asked of `Claims`."""

    def __init__(self):
        self.intents, self.finished = [], []

    def intend(self, clock, group, keys, start, end):
        assert len(np.unique(keys)) == len(keys)
        self.intents.append(SimpleNamespace(group=group, keys=keys, start=start, places=None))
        return self.intents[-1]

    def finish(self, intent):
        self.finished.append(intent)


def test_plans_for_one_clock_are_one_intent_that_is_over_with_the_last():
    assert {"intend", "finish"} <= set(dir(Claims))
    claims, groups = Intended(), TableGroups()
    tables = tables_of((10, 4, "sgd"), (20, 4, "sgd"), (5, 2, "sgd"))
    groups.add(tables)
    intents = JointIntents(claims, None)

    def plan(number: int, rows: list[int], expected: int) -> TablePlan:
        table, rows = tables[number], np.array(rows)
        made = TablePlan(0, table, rows, expected, rows[:0], None, span=groups.span_of(table))
        intents.add(made)
        return made

    first, second, other, later = plan(0, [3, 1], 5), plan(1, [0, 2], 5), plan(2, [4], 5), plan(0, [3], 6)
    twice, over = plan(0, [1, 9], 5), plan(1, [7], 5)
    intents.release(over)
    assert first.places is None
    intents.flush()
    assert [(i.group, i.start, i.keys.tolist()) for i in claims.intents] == [
        (0, 5, [3, 1, 10, 12]),
        (1, 5, [4]),
        (0, 6, [3]),
        (0, 5, [1, 9]),
    ]
    claims.intents[0].places = np.arange(4)
    assert second.places.tolist() == [2, 3]
    intents.release(second)
    intents.release(later)
    assert claims.finished == [claims.intents[2]]
    intents.release(first)
    assert claims.finished == [claims.intents[2], claims.intents[0]]
    assert over.places is None and other.joint is not None and twice.joint.count == 1
    intents.flush()
    assert len(claims.intents) == 4
