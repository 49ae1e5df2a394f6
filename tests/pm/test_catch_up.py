"""Rows that steps moved without touching them, after short and long gaps, against all rows under torch.optim."""

from dataclasses import replace

import numpy as np
import pytest

import pm
from pm.dense_rules import SWEPT_STEPS
from tests.pm.oracle import DENSE_RULES, GROUPS, DenseTable, make_spec


class Pair:
    """A table in a manager, and its dense twin.

    Where weight decay makes a gradient of the value that is then divided by its own root, a value near zero swings
    about it, and roundings grow from step to step. How much, is told by a second twin that starts one rounding off:
    what PyTorch makes of that, times 50, is allowed beside the usual tolerance.
    """

    def __init__(self, rule: str, dtype: str, rows: int = 200, dim: int = 3, **options):
        self.group = {**GROUPS[rule], **options}
        self.spec = make_spec(0, rows, dim, dtype, rule, self.group)
        self.manager, self.dense = pm.Manager(), DenseTable(0, self.spec)
        (self.table,) = self.manager.add_tables([self.spec])
        self.rng = np.random.default_rng()
        self.steps = 0
        self.shaken = DenseTable(0, self.spec)
        rounding = np.finfo(dtype).eps * self.rng.uniform(-1, 1, self.shaken.values.shape)
        self.shaken.values[...] *= (1 + rounding).astype(dtype)
        self.exact = DenseTable(0, replace(self.spec, dtype="float64"))
        self.exact.values[...] = self.dense.values
        self.reached = np.abs(
            self.dense.values
        )  # a rounding is relative to what a value was then, not to what it became

    def step(self, rows) -> None:
        rows = np.asarray(rows, np.int64)
        values = self.rng.standard_normal((len(rows), self.spec.dim)).astype(self.spec.dtype)
        self.manager.submit([pm.TableGradient(self.table, rows, values)], {0: dict(self.group)})
        self.dense.step([(rows, values, 1.0, 0, None)])
        self.shaken.step([(rows, values, 1.0, 0, None)])
        self.exact.step([(rows, values.astype(np.float64), 1.0, 0, None)])
        np.maximum(self.reached, np.abs(self.dense.values), out=self.reached)
        self.steps += 1

    def check(self, rows, what) -> None:
        rows = np.asarray(rows, np.int64)
        out = np.empty((len(rows), self.spec.dim), self.spec.dtype)
        self.manager.pull(self.table, rows, out)
        tolerance = self.dense.tolerances[self.spec.dtype]
        expected = self.dense.values[rows]
        limit = tolerance * (1 + self.reached[rows]) + 50 * np.abs(self.shaken.values[rows] - expected)
        limit += 2 * np.abs(self.exact.values[rows] - expected)  # what PyTorch's own steps have lost by rounding
        close = (np.abs(out - expected) <= limit) | (np.isnan(out) & np.isnan(expected))
        assert close.all(), (what, rows, out[~close], expected[~close])
        assert np.median(limit) <= 50 * tolerance, "a comparison that means something"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", DENSE_RULES)
def test_rows_after_gaps(rule, dtype):
    """Under a schedule that changes lr, momentum and betas; some rows are first read, others touched again."""
    swings = rule in ("adam_decay", "rmsprop_all")
    rate = GROUPS[rule]["lr"] / (100 if swings else 1)  # values must not come near zero by themselves
    pair = Pair(rule, dtype, lr=rate)
    for at in range(60):
        if at:
            pair.step([at, 100 + at])
        pair.group["lr"] = rate * (1 + np.sin(at)) / 2
    for gap in (1, 7, 1000):
        for _ in range(gap):
            pair.step([0])
        rows = {1: [59, 158], 7: [52, 53, 150], 1000: np.arange(200)}[gap]
        pair.step(rows[:2])
        pair.check(rows, f"{gap} steps on")
    pair.check([199, 0], "a row that nobody touched, and one that each step did")


@pytest.mark.parametrize("rule", ["adamw_amsgrad", "radam", "sgd_decay", "nadam"])
def test_a_gap_longer_than_is_taken_step_by_step(rule):
    pair = Pair(rule, "float64", rows=20)
    pair.group["weight_decay"] = 0.001
    pair.group["decoupled_weight_decay"] = rule != "sgd_decay"
    for _ in range(5):
        pair.step([3, 4, 5])
    for _ in range(5000):
        pair.step([0])
    pair.check([3, 4, 5, 6, 0], "5,000 steps on")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adam", {"betas": (0.9, 0.75)}),  # the update grows where the second moment is forgotten first
        ("adam", {"betas": (0.0, 0.99)}),
        ("adam", {"betas": (0.99, 0.9999)}),
        ("adamax", {"betas": (0.9, 0.85)}),
        ("sgd_momentum", {"momentum": 0.995, "nesterov": True, "dampening": 0.0}),
        ("sgd_momentum", {"weight_decay": 0.01}),
        ("rmsprop_all", {"weight_decay": 0.0, "momentum": 0.99}),
        ("adam", {"eps": 0.0, "rows": 1}),
    ],
)
def test_hyperparameters_that_do_not_let_rows_rest(rule, options, dtype):
    pair = Pair(rule, dtype, **options)
    for _ in range(3):
        pair.step([0, 1, 2, 3] if pair.spec.rows > 1 else [0])
    betas = options.get("betas", (0, 1))
    for number in range(100 if max(betas[0] ** 2, betas[0] * (rule == "adamax")) > betas[1] else 1500):
        pair.step([0])
        if number in (5, 50, 700, 1499):
            pair.check([0, 1, 2] if pair.spec.rows > 1 else [0], f"{number} steps on")


def test_a_rate_of_zero_does_not_end_what_goes_on_later():
    """The first moment still moves rows once a warm-up, or a restart, has made the rate larger."""
    pair = Pair("adam", "float64")
    pair.step([1, 2])
    pair.group["lr"] = 0.0
    for _ in range(40):
        pair.step([0])
    pair.group["lr"] = 0.5
    pair.step([0])
    pair.check([1, 2], "after the rate came back")
    pair.group["lr"] = 50.0
    pair.step([0])
    pair.check([1, 2], "after it rose above any before")


@pytest.mark.parametrize("rule", ["adam_decay", "rmsprop_all"])
def test_rows_that_never_rest_are_caught_up_in_turn(rule):
    pair = Pair(rule, "float64", rows=3000, dim=1, lr=1e-4)
    pair.step(np.arange(2900))
    record_longs = pair.table.store.record_class.record_bytes // 8
    worst = 0
    for number in range(2 * SWEPT_STEPS + 100):
        pair.step([0])
        if number % 50 == 0:
            caught_up = pair.table.store.steps[(np.arange(2900) + 1) * record_longs - 2]
            worst = max(worst, pair.steps - int((caught_up >> 32).min()))
    assert SWEPT_STEPS // 2 < worst <= SWEPT_STEPS + 1
    pair.check(np.arange(2895, 2905), "at the end")


def test_reading_twice_and_reading_states_changes_nothing():
    pair = Pair("nadam", "float64", rows=30)
    rng = np.random.default_rng()
    for _ in range(50):
        pair.step(rng.permutation(30)[:3])
        if rng.random() < 0.3:
            for rows, values, states in pair.manager.held_rows(pair.table):
                pair.dense.check(values, rows, "held")
                np.testing.assert_allclose(states, pair.dense.states[rows], rtol=1e-9, atol=1e-300)
    pair.check(np.arange(30), "first")
    pair.check(np.arange(30), "again")


@pytest.mark.parametrize("rule", DENSE_RULES)
def test_rows_that_nobody_holds_are_known(rule):
    pair = Pair(rule, "float64", rows=12)
    for _ in range(30):
        pair.step([2])
    rows = np.array([0, 5, 11])
    values, states = pair.manager.unmade_rows(pair.table, rows)
    pair.dense.check(values, rows, "values")
    np.testing.assert_allclose(states, pair.dense.states[rows], rtol=1e-9, atol=1e-300)
    assert len(pair.table.store) == 1


def test_an_empty_gradient_is_a_step():
    pair = Pair("adamw_amsgrad", "float64")
    pair.step([4])
    for _ in range(3):
        pair.step([])
    pair.check([4, 5], "after three steps with a gradient of zeros")
    assert pair.table.gradient_steps == 4


def test_states_loaded_in_between_start_from_there():
    pair = Pair("adam", "float64", rows=10)
    for _ in range(4):
        pair.step([1, 2])
    rows = np.array([1, 7])
    states = np.abs(pair.rng.standard_normal((2, 6)))
    pair.manager.load_states(pair.table, rows, states)
    held = pair.dense.optimizer.state[pair.dense.parameter]
    for at, row in enumerate(rows):
        held["exp_avg"].numpy()[row], held["exp_avg_sq"].numpy()[row] = states[at, :3], states[at, 3:]
    for _ in range(9):
        pair.step([3])
    pair.check(np.arange(10), "nine steps later")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", DENSE_RULES)
def test_what_a_row_becomes_does_not_depend_on_when_it_is_read(rule, dtype):
    """Other ranks ask for rows at times of their own: a second manager takes the same steps with reads in between."""
    rows, dim, rng = 40, 3, np.random.default_rng()
    options = GROUPS[rule] | ({"weight_decay": 0.0} if rng.random() < 0.5 else {})
    specs = [make_spec(0, rows, dim, dtype, rule, dict(options)) for _ in range(2)]
    managers = [pm.Manager(), pm.Manager()]
    tables = [manager.add_tables([spec])[0] for manager, spec in zip(managers, specs, strict=True)]
    rate, often = GROUPS[rule]["lr"], rng.random(rows) ** 8  # most rows rest for long
    for step in range(300):
        touched = np.flatnonzero(rng.random(rows) < often * 0.5)
        gradient = rng.standard_normal((len(touched), dim)).astype(dtype)
        group = {**options, "lr": rate * min(1.0, (step + 1) / 150)}
        for manager, table in zip(managers, tables, strict=True):
            if manager is managers[1] or step % 150 == 0:
                read = np.flatnonzero(rng.random(rows) < rng.choice([0.0, 0.1, 0.5]))
                manager.pull(table, read, np.empty((len(read), dim), dtype))
            manager.submit([pm.TableGradient(table, touched, gradient.copy())], {0: dict(group)})
    found = []
    for manager, table in zip(managers, tables, strict=True):
        values, states = (np.empty((rows, words), dtype) for words in (dim, table.spec.record_class.state_words))
        manager.touch(table, np.arange(rows))
        for some, of_rows, of_states in manager.held_rows(table):
            values[some], states[some] = of_rows, of_states
        found.append((values, states))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
