"""The manager of one rank against dense tables under torch.optim, over random programs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pm
from pm.keys import MAX_ROWS, make_keys, rows_of, table_of
from tests.pm.oracle import GROUPS, RULES, DenseTable, initial, make_spec, random_gradient, some_rows

seeds = st.integers(0, 2**32 - 1)


def make_tables(rng, manager):
    """Declare one to four tables of random shapes; return (tables, their dense twins)."""
    specs = []
    for number in range(rng.integers(1, 5)):
        rows, dim = int(rng.integers(1, 30)), int(rng.choice([1, 2, 3, 8]))
        specs.append(make_spec(number, rows, dim, rng.choice(["float32", "float64"]), rng.choice(list(RULES))))
    return manager.add_tables(specs), [DenseTable(number, spec) for number, spec in enumerate(specs)]


class Program:
    """A random program of one rank: every method is one kind of statement, checked against the dense tables."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.manager = pm.Manager()
        self.tables, self.dense = make_tables(self.rng, self.manager)
        self.plans: list[pm.RowPlan] = []
        self.touched = [set() for _ in self.tables]

    def any_table(self):
        number = int(self.rng.integers(len(self.tables)))
        return number, self.tables[number], self.dense[number]

    def intend(self):
        number, table, _ = self.any_table()
        rows = some_rows(self.rng, table.spec.rows)
        self.touched[number].update(rows.tolist())
        self.plans.append(self.manager.intend(table, rows, self.manager.steps + int(self.rng.integers(-2, 5))))
        self.manager.flush_intents()

    def read(self):
        for plan in self.plans:
            out = np.full((len(plan.rows), plan.table.spec.dim), np.nan, plan.table.spec.dtype)
            assert self.manager.read(plan, out) is out
            self.dense[plan.table.number].check(out, plan.rows, "read")

    def pull(self):
        number, table, dense = self.any_table()
        rows = some_rows(self.rng, table.spec.rows)
        self.touched[number].update(rows.tolist())
        dense.check(
            self.manager.pull(table, rows, np.empty((len(rows), table.spec.dim), table.spec.dtype)), rows, "pull"
        )

    def step(self):
        gradients, pieces = [], {}
        for plan in self.plans:
            if self.rng.random() < 0.5:
                of_plan = self.rng.random() < 0.7
                rows = plan.rows if of_plan else some_rows(self.rng, plan.table.spec.rows)
                piece = random_gradient(self.rng, plan.table.spec, rows, self.rng.random() < 0.2)
                values, scale, ordinal, counts = piece[1:]
                gradients.append(
                    pm.TableGradient(plan.table, rows, values, scale, plan if of_plan else None, ordinal, counts)
                )
                pieces.setdefault(plan.table.number, []).append(piece)
                self.touched[plan.table.number].update(rows.tolist())
        for number, of_table in pieces.items():
            self.dense[number].step(of_table)
        groups = {table.number: dict(table.spec.group) for table in self.tables}
        done = [plan for plan in self.plans if self.rng.random() < 0.4]
        self.manager.submit(gradients, groups, finished=done)
        assert all(plan.released for plan in done)
        self.plans = [plan for plan in self.plans if not plan.released or self.rng.random() < 0.2]

    def renorm(self):
        number, table, dense = self.any_table()
        rows = some_rows(self.rng, table.spec.rows)
        limits = float(self.rng.uniform(0.1, 2)), float(self.rng.choice([1.0, 2.0, np.inf]))
        self.touched[number].update(rows.tolist())
        self.manager.renorm(table, rows, *limits)
        dense.renorm(rows, *limits)

    def replace_rule(self):
        number, table, dense = self.any_table()
        rule = str(self.rng.choice(list(RULES)))
        if self.manager.why_rule_stays(table, all_made=False):
            assert "decay" in table.spec.rule.name or table.spec.group["weight_decay"]
            with pytest.raises(ValueError, match="cannot be given another rule.*never looked up"):
                self.manager.replace_rule(table, table.spec)
            return
        spec = make_spec(number, table.spec.rows, table.spec.dim, table.spec.dtype, rule)
        if spec.record_class == table.spec.record_class:
            return
        self.manager.replace_rule(table, spec)
        table.gradient_steps = 0
        twin = self.dense[number] = DenseTable(number, spec)
        twin.values[...] = dense.values
        twin.exact &= dense.exact

    def load(self):
        number, table, dense = self.any_table()
        rows = some_rows(self.rng, table.spec.rows)
        self.touched[number].update(rows.tolist())
        values = self.rng.standard_normal((len(rows), table.spec.dim)).astype(table.spec.dtype)
        self.manager.load_rows(table, rows, values, None)
        self.manager.rewrite_ended()
        dense.values[rows] = values

    def check_held(self):
        for number, (table, dense) in enumerate(zip(self.tables, self.dense, strict=True)):
            seen = []
            for rows, values, states in self.manager.held_rows(table):
                seen += rows.tolist()
                dense.check(values, rows, "held")
                assert states.shape == (len(rows), table.store.record_class.state_words)
                if states.size and dense.states.size:
                    np.testing.assert_allclose(states, dense.states[rows], rtol=1e-5, atol=1e-6)
            assert sorted(seen) == sorted(self.touched[number]), "exactly the rows that were touched are held"


@settings(deadline=None, max_examples=120)
@given(seeds)
def test_random_programs_equal_dense_tables(seed):
    program = Program(seed)
    statements = [program.intend, program.read, program.pull, program.step, program.renorm, program.load]
    statements += [program.step, program.read, program.intend, program.check_held]
    for _ in range(program.rng.integers(5, 40)):
        if program.rng.random() < 0.03:
            program.replace_rule()
        program.rng.choice(statements)()
    program.check_held()
    held = sum(len(touched) for touched in program.touched)
    assert program.manager.memory_bytes >= 8 * held


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rules_follow_torch_over_many_steps_and_a_schedule(rule, maximize, dtype):
    rng = np.random.default_rng()
    group = {**GROUPS[rule], "maximize": maximize}
    spec = make_spec(0, 50, 6, dtype, rule, group)
    manager, dense = pm.Manager(), DenseTable(0, spec)
    (table,) = manager.add_tables([spec])
    everything = np.arange(50, dtype=np.int64)
    for number in range(120):
        group["lr"] = GROUPS[rule]["lr"] / (1 + 0.1 * number)
        piece = random_gradient(rng, spec, some_rows(rng, 50), counted=False)
        rows, values, scale, *_ = piece
        if number % 7:  # steps in which the table has no gradient do not count for Adagrad's decay
            manager.submit([pm.TableGradient(table, rows, values, scale)], {0: dict(group)})
            dense.step([piece])
        else:
            manager.submit([], {0: dict(group)})
        some = some_rows(rng, 50)
        dense.check(manager.pull(table, some, np.empty((len(some), 6), dtype)), some, f"after step {number}")
    dense.check(manager.pull(table, everything, np.empty((50, 6), dtype)), everything, "after 120 steps")
    assert manager.steps == 120


def test_records_of_one_class_share_a_store_and_others_do_not():
    manager = pm.Manager()
    specs = [make_spec(0, 10, 4, "float32", "sgd"), make_spec(1, 20, 4, "float32", "sgd")]
    specs += [make_spec(2, 10, 4, "float64", "sgd"), make_spec(3, 10, 4, "float32", "adagrad")]
    tables = manager.add_tables(specs)
    assert tables[0].store is tables[1].store
    assert len({id(table.store) for table in tables}) == 3
    rows = np.array([3, 1], np.int64)
    for table in tables:
        out = manager.pull(table, rows, np.empty((2, 4), table.spec.dtype))
        np.testing.assert_array_equal(out, initial(table.number, rows, 4, table.spec.dtype))


def test_a_store_whose_last_table_has_left_is_given_up():
    manager = pm.Manager()
    tables = manager.add_tables([make_spec(n, 100, 4, "float32", "sgd") for n in range(2)])
    everything = np.arange(100, dtype=np.int64)
    for table in tables:
        manager.touch(table, everything)
    before = manager.memory_bytes
    for number, table in enumerate(tables):
        manager.replace_rule(table, make_spec(number, 100, 4, "float32", "adagrad"))
    one_class = sum(store.memory_bytes for store in {table.store for table in tables})
    assert manager.memory_bytes == one_class > before
    manager.add_tables([make_spec(2, 100, 4, "float32", "adagrad")])


def test_tables_declared_later_find_room():
    manager = pm.Manager()
    for number in range(6):
        (table,) = manager.add_tables([make_spec(number, 100, 2, "float32", "sgd")])
        everything = np.arange(100, dtype=np.int64)
        manager.touch(table, everything)
        out = manager.pull(table, everything, np.empty((100, 2), np.float32))
        np.testing.assert_array_equal(out, initial(number, everything, 2, "float32"))


def test_initial_values_are_asked_for_once_a_row():
    asked = []
    spec = make_spec(0, 100, 2, "float32", "sgd")
    spec = pm.TableSpec(
        spec.name, 100, 2, "float32", spec.rule, spec.group, lambda rows, out: asked.extend(rows) or out.fill(0)
    )
    manager = pm.Manager()
    (table,) = manager.add_tables([spec])
    rng = np.random.default_rng()
    for _ in range(30):
        manager.intend(table, some_rows(rng, 100), 0)
    assert len(asked) == len(set(asked)) > 0


@given(st.integers(0, 2**22), st.lists(st.integers(0, MAX_ROWS - 1), max_size=20))
def test_a_key_carries_table_and_row(table, rows):
    keys = make_keys(table, np.array(rows, np.int64))
    assert (keys >= 0).all()
    assert rows_of(keys).tolist() == rows
    assert set(table_of(keys).tolist()) <= {table}
