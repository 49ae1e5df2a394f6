"""Rows of several tables in one call: to the bit what each table by itself gives."""

import numpy as np
import pytest

import pm
from pm.keys import make_keys
from pm.together import JointGradient, intend_together, read_expanded, read_together
from tests.pm.oracle import GROUPS, make_spec

DIM = 3
LATER = {"sgd": "adagrad", "adagrad": "sgd"}


class Batches:
    """A manager of some tables, one of them without rows in some batches, and what batches do with it."""

    def __init__(self, rule, sizes):
        self.manager = pm.Manager()
        self.tables = self.manager.add_tables(
            [make_spec(number, rows, DIM, "float32", rule) for number, rows in enumerate(sizes)]
        )

    def intend(self, rows_of_tables):
        rows = np.concatenate(rows_of_tables)
        keys = np.concatenate([make_keys(number, part) for number, part in enumerate(rows_of_tables)])
        starts = [0, *np.cumsum([len(part) for part in rows_of_tables]).tolist()]
        plans = intend_together(self.manager, self.tables, keys, rows, starts, self.manager.steps)
        return JointGradient(self.tables, plans, rows, starts, np.empty((len(rows), DIM), np.float32))

    def everything(self):
        for table in self.tables:
            for rows, values, states in self.manager.held_rows(table):
                yield np.concatenate([rows[:, None], values, states], 1)[np.argsort(rows)]


def some_rows(rng, sizes):
    return [rng.permutation(size)[: rng.integers(0, size + 1)] for size in sizes]


def one_group(rng, rule, count):
    return dict.fromkeys(range(count), GROUPS[rule])


def two_groups(rng, rule, count):
    others = {**GROUPS[rule], "lr": 0.01}
    return {number: others if rng.random() < 0.5 else GROUPS[rule] for number in range(count)}


@pytest.mark.parametrize("groups_of", [one_group, two_groups])
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize("odd", [None, "a step alone", "another rule"])
def test_gradients_handed_over_as_one_are_those_of_each_table(rule, groups_of, odd, rng):
    sizes = rng.integers(1, 30, rng.integers(1, 6)).tolist()
    joint_side, split_side = Batches(rule, sizes), Batches(rule, sizes)
    for step in range(5):
        rows_of_tables = some_rows(rng, sizes)
        groups = groups_of(rng, rule, len(sizes))
        gradients = [side.intend(rows_of_tables) for side in (joint_side, split_side)]
        gradients[0].sums[:] = gradients[1].sums[:] = rng.standard_normal(gradients[0].sums.shape)
        if step == 2 and odd == "another rule":  # while its rows are intended
            for side in (joint_side, split_side):
                side.manager.replace_rule(side.tables[0], make_spec(0, sizes[0], DIM, "float32", LATER[rule]))
        if step >= 2 and odd == "another rule":
            groups[0] = GROUPS[LATER[rule]]
        joint_side.manager.submit([], groups, joint=[gradients[0]], finished=gradients[0].plans)
        split_side.manager.submit(gradients[1].split(), groups, finished=gradients[1].plans)
        if step == 1 and odd == "a step alone":
            alone = rng.standard_normal((sizes[0], DIM)).astype(np.float32)
            for side in (joint_side, split_side):
                gradient = pm.TableGradient(side.tables[0], np.arange(sizes[0]), alone)
                side.manager.submit([gradient], groups)
        for one, other in zip(joint_side.everything(), split_side.everything(), strict=True):
            np.testing.assert_array_equal(one, other)
        assert [t.gradient_steps for t in joint_side.tables] == [t.gradient_steps for t in split_side.tables]
    assert all(table.begun for table in joint_side.tables)


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_rows_read_as_they_are_looked_up_are_those_of_the_plans(rule, rng):
    sizes = rng.integers(1, 30, rng.integers(1, 6)).tolist()
    side = Batches(rule, sizes)
    joint = side.intend(some_rows(rng, sizes))
    positions = rng.integers(0, max(len(joint.rows), 1), 40 if len(joint.rows) else 0)
    slab, out = np.empty((len(joint.rows), DIM), np.float32), np.full((len(positions), DIM), np.nan, np.float32)
    read_together(side.manager, joint.plans, slab)
    can = read_expanded(side.manager, joint.plans, positions, out)
    assert can == (rule != "adam")  # whose rows are caught up first
    if can:
        np.testing.assert_array_equal(out, slab[positions])


def test_rows_that_moved_to_another_store_are_not_read_where_they_were(rng):
    side = Batches("sgd", [5, 6])
    joint = side.intend([np.arange(5), np.arange(6)])
    side.manager.replace_rule(side.tables[1], make_spec(1, 6, DIM, "float32", "adagrad"))
    assert not read_expanded(side.manager, joint.plans, np.arange(11), np.empty((11, DIM), np.float32))
    out = np.empty((11, DIM), np.float32)
    read_together(side.manager, joint.plans, out)
    for number, part in enumerate((slice(0, 5), slice(5, 11))):
        expected = np.empty((part.stop - part.start, DIM), np.float32)
        side.tables[number].spec.fill(np.arange(len(expected)), expected)
        np.testing.assert_array_equal(out[part], expected)
