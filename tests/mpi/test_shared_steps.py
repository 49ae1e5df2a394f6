"""Steps at staleness 0 whose gradients are left in memory that all ranks share."""

from __future__ import annotations

import time

import numpy as np
import pytest

import pm
import pm.colocated.shared_steps
from pm.same_step import Stepped
from tests.mpi.worlds import pulled, read
from tests.pm.oracle import DenseTable, make_spec

pytestmark = pytest.mark.ranks(2)
ROWS, DIM = 64, 3


def gradient(table: pm.Table, rows: np.ndarray, value: float, **more) -> pm.TableGradient:
    values = np.full((len(rows), table.spec.dim), value, table.spec.dtype)
    return pm.TableGradient(table, rows, values, **more)


def group_of(*tables: pm.Table) -> dict[int, dict[str, object]]:
    group = dict(tables[0].spec.group)
    return {table.number: group for table in tables}


def started(manager, *rules: str) -> list[pm.Table]:
    return manager.add_tables([make_spec(number, ROWS, DIM, "float64", rule) for number, rule in enumerate(rules)])


def all_rows() -> np.ndarray:
    return np.arange(ROWS, dtype=np.int64)


def test_no_gradient_and_no_answer_is_sent(managers, comm):
    manager = managers(shared_memory=True)
    (table,) = started(manager, "adagrad")
    dense = DenseTable(0, table.spec)
    for _ in range(10):
        plan = manager.intend(table, all_rows(), manager.steps)
        dense.check(read(manager, plan), all_rows(), "in training")
        manager.submit([gradient(table, all_rows(), 0.5, plan=plan)], group_of(table), finished=[plan])
        dense.step([(all_rows(), np.full((ROWS, DIM), 0.5), 1.0, 0, None)] * comm.size)
    manager.settle()
    manager.barrier()
    sent = {kind for kind, count in manager.bytes_by_kind.items() if count}
    assert not sent & {"gradient", "ready", "rows", "intent", "seek", "release"}, sent
    assert manager.needs_no_messages


def test_a_rank_that_is_busy_elsewhere_holds_up_nobody(managers, comm):
    manager = managers(shared_memory=True)
    (table,) = started(manager, "sgd")
    pulled(manager, table, all_rows())
    manager.submit([gradient(table, all_rows(), 1.0)], group_of(table))
    before = time.perf_counter()
    if comm.rank == 0:
        time.sleep(3.0)  # its own part is done by its background thread
    pulled(manager, table, all_rows())
    waited = time.perf_counter() - before
    manager.barrier()
    assert comm.rank == 0 or waited < 2.0


@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("rules", [["sgd"] * 3, ["adagrad", "sgd", "adagrad"], ["adagrad"] * 2])
def test_tables_are_updated_together_or_apart_alike(managers, comm, seed, rules, differ):
    """Ranks have gradients for other tables, with other factors."""
    manager = managers(shared_memory=True)
    tables = started(manager, *rules)
    dense = [DenseTable(table.number, table.spec) for table in tables]
    rng = np.random.default_rng(seed)
    for _ in range(6):
        given = [[] for _ in tables]
        mine = []
        for rank in range(comm.size):
            for table in tables:
                rows = rng.permutation(ROWS)[: rng.integers(0, 20)]
                values = rng.standard_normal((len(rows), DIM))
                scale = float(1 + rank) if differ else 0.5
                if differ and rng.random() < 0.4:
                    continue
                given[table.number].append((rows, values, scale, 0, None))
                if rank == comm.rank:
                    mine.append(pm.TableGradient(table, rows, values, scale))
        manager.submit(mine, group_of(*tables))
        for each, parts in zip(dense, given, strict=True):
            if parts:
                each.step(parts)
        for table, each in zip(tables, dense, strict=True):
            each.check(pulled(manager, table, all_rows()), all_rows(), "after a step")


def test_ranks_that_disagree_are_told_before_anything_is_changed(managers, comm):
    manager = managers(shared_memory=True)
    (table,) = started(manager, "sgd")
    before = pulled(manager, table, all_rows())
    manager.submit(
        [gradient(table, all_rows(), 1.0)], group_of(table), stepped=Stepped(vector=np.array([0.1, comm.rank]))
    )
    with pytest.raises(pm.PeerError, match="step 0: ranks disagree on hyperparameter 1"):
        pulled(manager, table, all_rows())
    held = table.store.values(all_rows(), np.empty((ROWS, DIM)))
    assert (held == before).all()
    comm.Barrier()


def test_a_rank_that_does_not_step_is_named(managers, comm):
    manager = managers(timeout_seconds=2.0, shared_memory=True)
    (table,) = started(manager, "sgd")
    pulled(manager, table, all_rows())
    if comm.rank != comm.size - 1:
        manager.submit([gradient(table, all_rows(), 1.0)], group_of(table))
        with pytest.raises(pm.PeerError, match=f"for rank .*{comm.size - 1} to take step 0"):
            pulled(manager, table, all_rows())
    comm.Barrier()


def test_gradients_without_room_are_refused(managers, comm, monkeypatch):
    monkeypatch.setattr(pm.colocated.shared_steps, "_HALF_BYTES", 4096)
    manager = managers(shared_memory=True)
    (table,) = started(manager, "sgd")
    dense = DenseTable(0, table.spec)
    rows = all_rows()
    with pytest.raises(MemoryError, match="step 0 .* more than 4,096 bytes .*shared_memory=False"):
        manager.submit([gradient(table, rows, 1.0), gradient(table, rows, 1.0), gradient(table, rows, 1.0)], {})
    manager.submit([gradient(table, rows, 1.0)], group_of(table))
    dense.step([(rows, np.ones((ROWS, DIM)), 1.0, 0, None)] * comm.size)
    dense.check(pulled(manager, table, rows), rows, "after what had room")
