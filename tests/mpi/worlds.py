"""Random programs for the manager of several ranks, against dense tables that every rank computes for itself."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field

import numpy as np

import pm
from pm.same_step import ANY_BATCH, Stepped
from tests.pm.oracle import RULES, DenseTable, make_spec, random_gradient, some_rows

TIMEOUT = 100.0
TECHNIQUES = os.environ.get("ADALOADER_TEST_TECHNIQUES", "all")
_SHARED = os.environ.get("ADALOADER_TEST_SHARED_MEMORY", "1")
SHARED_MEMORY = _SHARED == "1" if _SHARED in "01" else int(_SHARED)


def out_for(table: pm.Table, rows: np.ndarray) -> np.ndarray:
    return np.full((len(rows), table.spec.dim), np.nan, table.spec.dtype)


def pulled(manager: pm.Manager, table: pm.Table, rows: np.ndarray) -> np.ndarray:
    return manager.pull(table, rows, out_for(table, rows))


def read(manager: pm.Manager, plan: pm.RowPlan) -> np.ndarray:
    return manager.read(plan, out_for(plan.table, plan.rows))


def gathered(manager: pm.Manager, table: pm.Table) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Rank 0's rows of a whole table: values and states by row; {} elsewhere (collective)."""
    found = {}

    def receive(rows, values, states):
        for row, value, state in zip(rows.tolist(), values.copy(), states.copy(), strict=True):
            assert row not in found, "a row came twice"
            found[row] = value, state

    manager.gather_table(table, receive if manager.rank == 0 else None)
    return found


def assert_nothing_is_held(manager: pm.SynchronousManager) -> None:
    """Check that no slot has a hold or a pin, now that all plans are released and all steps applied."""
    for table in manager.tables:
        slots = np.arange(table.store.slots_in_use, dtype=np.int64)
        assert not manager.serving.notes_of(table.store).holds(slots).any()


def train(manager, table, dense, rows_of, steps, lookahead, meets=True) -> list[pm.RowPlan]:
    """Take steps in which rank r uses `rows_of(step, r)`, intended `lookahead` steps ahead, and check what it reads."""
    plans = {}
    for step in range(steps + lookahead):
        plans[step] = manager.intend(table, rows_of(step, manager.rank), step)
        manager.flush_intents()
        if meets:
            manager.barrier()
        at = step - lookahead
        if at < 0:
            continue
        values = read(manager, plans[at])
        dense.check(values, plans[at].rows, f"step {at}")
        gradient = pm.TableGradient(table, plans[at].rows, np.ones_like(values), 1.0, plans[at])
        manager.submit([gradient], {0: dict(table.spec.group)}, finished=[plans[at]])
        pieces = [
            (rows_of(at, r), np.ones((len(rows_of(at, r)), table.spec.dim), table.spec.dtype), 1.0, 0, None)
            for r in range(manager.ranks)
        ]
        dense.step(pieces)
    return [plan for plan in plans.values() if not plan.released]


def machines_of_pieces(manager: pm.SynchronousManager, ranks: list[int]) -> list[int]:
    """Return numbers for `DenseTable.step`: of ranks whose gradients are added up first, each its machine's.

    Every other piece has one of its own.
    """
    machines = [manager.machines.of(rank) for rank in ranks]
    alone = len(machines) and len(machines[0]) == manager.ranks
    return [m[0] if len(m) > 1 and not alone else manager.ranks + at for at, m in enumerate(machines)]


# --- random programs ---


@dataclass
class World:
    """One random program, which all ranks draw alike; each does its own rank's part of it on its manager.

    Every random draw is made by every rank in the same order, whoever it is for.
    """

    manager: pm.SynchronousManager
    rng: np.random.Generator
    steps: int = 14
    tables: list[pm.Table] = field(default_factory=list)
    dense: list[DenseTable] = field(default_factory=list)
    plans: dict[int, list[pm.RowPlan]] = field(default_factory=dict)
    kept: list[pm.RowPlan] = field(default_factory=list)

    def run(self) -> list[dict]:
        self.declare(int(self.rng.integers(1, 4)))
        self.lookahead = int(self.rng.choice([0, 1, 4, 9]))
        self.in_thread = self.rng.random() < 0.5
        self.hot = [some_rows(self.rng, table.spec.rows) for table in self.tables]
        self.needs = {step: self.draw_needs() for step in range(self.steps + self.lookahead + 1)}
        for step in range(self.lookahead):
            self.intend(step)
        for step in range(self.steps):
            self.intend(step + self.lookahead)
            self.use(step)
            if self.rng.random() < 0.15:
                self.renorm()
            if self.rng.random() < 0.1:
                self.rewrite()
            self.step(step)
            if step == self.steps // 2 and self.rng.random() < 0.5:
                self.declare(1)
        return self.finish()

    def run_to_the_end(self) -> None:
        """As `run`; then release what is still planned, and wait until all ranks have done so."""
        self.run()
        for plans in (self.kept, *self.plans.values()):
            for plan in plans:
                self.manager.release(plan)
        self.manager.flush_intents()
        self.manager.submit([], {})
        self.manager.settle()
        self.manager.barrier()

    def declare(self, count: int) -> None:
        specs = []
        for number in range(len(self.tables), len(self.tables) + count):
            rows, dim = int(self.rng.choice([1, 7, 40, 150])), int(self.rng.choice([1, 3, 8]))
            dtype, rule = str(self.rng.choice(["float32", "float64"])), str(self.rng.choice(list(RULES)))
            specs.append(make_spec(number, rows, dim, dtype, rule))
        self.dense += [DenseTable(len(self.tables) + at, spec) for at, spec in enumerate(specs)]
        self.tables += self.manager.add_tables(specs)

    def draw_needs(self) -> list[list[np.ndarray]]:
        """Rows by rank and table: some that every step uses, some of this step alone, at times none."""
        needs = []
        for _ in range(self.manager.ranks):
            of_rank = []
            for table, hot in zip(self.tables, self.hot, strict=True):
                rows = some_rows(self.rng, table.spec.rows, most=max(1, table.spec.rows // 3))
                often = hot[self.rng.random(len(hot)) < 0.7]
                of_rank.append(self.rng.permutation(np.union1d(rows, often)))
            needs.append(of_rank if self.rng.random() > 0.1 else [np.empty(0, np.int64) for _ in of_rank])
        return needs

    def intend(self, step: int) -> None:
        """Intend what a step needs: rightly, too early, too late, wrongly, twice, or not at all."""
        calls = []
        for rank in range(self.manager.ranks):
            for table, rows in zip(self.tables, self.needs[step][rank], strict=False):
                kind = self.rng.choice(["right"] * 6 + ["early", "late", "twice", "missing", "wrong"])
                shift = int(self.rng.integers(1, 5)) * {"early": -1, "late": 1}.get(str(kind), 0)
                wrong = some_rows(self.rng, table.spec.rows)
                if rank != self.manager.rank or kind == "missing":
                    continue
                for _ in range(2 if kind == "twice" else 1):
                    calls.append((table, wrong if kind == "wrong" else rows, max(0, step + shift)))
        self.plans[step] = []
        if self.in_thread:
            thread = threading.Thread(target=self.make_plans, args=(step, calls))
            thread.start()
            thread.join()
        else:
            self.make_plans(step, calls)

    def make_plans(self, step: int, calls: list[tuple]) -> None:
        for call in calls:
            self.plans[step].append(self.manager.intend(*call))
        self.manager.flush_intents()

    def use(self, step: int) -> None:
        """Look up what the step needs, and now and then what another step does, and rows of no plan."""
        later = self.rng.random(self.manager.ranks)[self.manager.rank] < 0.2
        again = self.rng.random(self.manager.ranks)[self.manager.rank] < 0.2
        plans = [*self.plans[step], *(self.plans[step + self.lookahead] if later else ()), *self.kept]
        for plan in plans + (plans if again else []):
            self.check(read(self.manager, plan), plan.table, plan.rows, f"read at step {step}")
        for table in self.tables:
            rows = [some_rows(self.rng, table.spec.rows) for _ in range(self.manager.ranks)][self.manager.rank]
            if rows.sum() % 3 == 0:
                self.check(pulled(self.manager, table, rows), table, rows, f"pull at step {step}")

    def check(self, values: np.ndarray, table: pm.Table, rows: np.ndarray, what: str) -> None:
        self.dense[table.number].check(values, rows, what)

    def step(self, step: int) -> None:
        """One of two optimizers steps: it holds every other table. Random ranks have random gradients."""
        optimizer = int(self.rng.integers(2))
        held = [table for table in self.tables if table.number % 2 == optimizer]
        mine, done = [], []
        for table in held:
            table.spec.group["lr"] = self.dense[table.number].spec.group["lr"] = 0.3 / (1 + step)
            pieces, of_pieces = [], []
            for rank in range(self.manager.ranks):
                for part in range(int(self.rng.choice([0, 1, 1, 1, 2]))):
                    own = (
                        [plan for plan in self.plans[step] if plan.table is table] if rank == self.manager.rank else []
                    )
                    needed = self.needs[step][rank]
                    drawn = some_rows(self.rng, table.spec.rows)
                    wanted = needed[table.number] if table.number < len(needed) else drawn
                    rows = drawn if self.rng.random() < 0.3 else wanted
                    piece = random_gradient(self.rng, table.spec, rows, counted=part == 1)
                    pieces.append(piece)
                    of_pieces.append(rank)
                    if rank == self.manager.rank:
                        plan = next((p for p in own if np.array_equal(p.rows, rows)), None)
                        rows, values, scale, ordinal, counts = piece
                        mine.append(pm.TableGradient(table, rows, values.copy(), scale, plan, ordinal, counts))
            if pieces:
                self.dense[table.number].step(pieces, machines_of_pieces(self.manager, of_pieces))
        for plan in self.plans.pop(step):
            how = (plan.number * 2654435761 % 97) / 97  # not drawn: ranks have different plans
            if how < 0.6:
                done.append(plan)
            elif how < 0.8:
                self.kept.append(plan)
            else:
                self.manager.release(plan)  # before the step: rows must then travel with the gradient
        done += self.kept[:-2]
        self.kept = self.kept[-2:]
        groups = {table.number: dict(table.spec.group) for table in held}
        vector = np.array([table.spec.group["lr"] for table in held] + [np.nan])
        rank, steps = self.manager.rank, self.manager.steps
        batches = (1, steps - rank % 3, steps + rank % 2) if (rank + steps) % 4 else ANY_BATCH
        self.manager.submit(mine, groups, finished=done, stepped=Stepped(optimizer, vector, batches))
        for gradient in mine:
            gradient.values[...] = np.nan  # once the step is over the user may do what they like with it

    def renorm(self) -> None:
        """One rank's lookup scales rows down: pulls find them so at once, copies are so from the next step on."""
        self.manager.barrier()
        rank = int(self.rng.integers(self.manager.ranks))
        number = int(self.rng.integers(len(self.tables)))
        table, rows = self.tables[number], some_rows(self.rng, self.tables[number].spec.rows)
        limits = float(self.rng.uniform(0.2, 1.0)), float(self.rng.choice([1.0, 2.0, np.inf]))
        if rank == self.manager.rank:
            self.manager.renorm(table, rows, *limits)
        self.manager.barrier()  # every owner has been told, once it is past this
        self.manager.barrier()  # and all are: a pull could overtake what another rank had sent its owner
        self.dense[number].renorm(rows, *limits)
        self.check(pulled(self.manager, table, rows), table, rows, "renorm")

    def rewrite(self) -> None:
        """Owners set rows from outside, as loading a state does: every plan sees it at once."""
        number = int(self.rng.integers(len(self.tables)))
        table, rows = self.tables[number], some_rows(self.rng, self.tables[number].spec.rows)
        values = self.rng.standard_normal((len(rows), table.spec.dim)).astype(table.spec.dtype)
        with self.manager.still():
            mine = np.isin(rows, self.manager.rows_owned(table, rows))
            self.manager.load_rows(table, rows[mine], values[mine], None)
            self.manager.rewrite_ended()
        self.dense[number].values[rows] = values
        for plan in [*self.kept, *(plan for plans in self.plans.values() for plan in plans)][:6]:
            self.check(read(self.manager, plan), plan.table, plan.rows, "after rewriting")
        self.manager.barrier()

    def finish(self) -> list[dict]:
        self.manager.settle()
        results = []
        for table, dense in zip(self.tables, self.dense, strict=True):
            found = gathered(self.manager, table)
            results.append(found)
            if self.manager.rank == 0:
                rows = np.array(sorted(found), np.int64)
                values = np.array([found[row][0] for row in rows]).reshape(len(rows), table.spec.dim)
                self.check(values, table, rows, "gathered")
                untouched = np.setdiff1d(np.arange(table.spec.rows), rows)
                values, _ = self.manager.unmade_rows(table, untouched)
                dense.check(values, untouched, "what nobody touched")
        return results
