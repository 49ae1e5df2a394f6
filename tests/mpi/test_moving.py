"""Rows that change owners: results stay those of dense tables, and every row has one owner, whatever moves when."""

from __future__ import annotations

import time

import numpy as np
import pytest

import pm
from pm.exact.reuse import Reuse
from pm.messages import Kind
from tests.mpi.meeting import meet
from tests.mpi.worlds import World, assert_nothing_is_held, gathered, pulled, read, train
from tests.pm.oracle import DENSE_RULES, DenseTable, make_spec

APART = {"shared_memory": False}
"""Each rank as on a machine of its own: rows do not move between ranks that read each other's memory."""
KINDS = ("intent", "records", "pull", "want")
ALL = ["all", "relocation", "replication", "none"]


def owners(manager: pm.SynchronousManager, comm, table: pm.Table) -> np.ndarray:
    """Return how many ranks own each row of a table (collective)."""
    with manager.still():
        mine = np.zeros(table.spec.rows, np.int64)
        mine[manager.rows_owned(table, np.arange(table.spec.rows, dtype=np.int64))] = 1
        everyones = np.empty((comm.size, table.spec.rows), np.int64)
        request = comm.Iallgather(mine, everyones)
        while not request.Test():
            time.sleep(1e-4)
    return everyones


def over_ranks(comm, *numbers: int) -> list[int]:
    """Return the sums of `numbers` over the ranks (collective)."""
    mine, sums = np.array(numbers, np.int64), np.empty(len(numbers), np.int64)
    request = comm.Iallreduce(mine, sums)
    while not request.Test():
        time.sleep(1e-4)
    return sums.tolist()


def check_one_owner(manager: pm.SynchronousManager, comm, table: pm.Table) -> np.ndarray:
    """Check that every row has one owner, and return it (int64 `[rows]`, collective)."""
    everyones = owners(manager, comm, table)
    np.testing.assert_array_equal(everyones.sum(0), 1)
    manager.barrier()  # rows may move again on all ranks
    return everyones.argmax(0)


def delay_messages(manager: pm.SynchronousManager, seed: int) -> None:
    """Have this rank handle some messages late, so that what two ranks send to a third overtakes each other."""
    rng, handle = np.random.default_rng([seed, manager.rank]), manager.inbox._handle

    def late(source, message):
        if rng.random() < 0.1:
            time.sleep(rng.exponential(0.002))
        handle(source, message)

    manager.inbox._handle = late


# --- random programs ---


@pytest.mark.parametrize("techniques", ALL)
@pytest.mark.parametrize("cached", [0, 8])
def test_random_programs_equal_dense_tables(managers, comm, seed, techniques, cached, request):
    if cached:
        request.getfixturevalue("moving_at_once")
    manager = managers(techniques=techniques, cached_locations=cached, **APART)
    delay_messages(manager, seed)
    world = World(manager, np.random.default_rng([seed, cached]))
    world.run()
    assert manager.directory.keys_cached <= cached
    for table in world.tables:
        check_one_owner(manager, comm, table)


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("moving_at_once")
def test_techniques_and_delays_do_not_change_a_bit(managers, seed):
    results = []
    for turn, techniques in enumerate(("all", "all", "relocation", "none")):
        manager = managers(techniques=techniques, shared_memory=turn == 1)
        delay_messages(manager, seed + turn)
        results.append(World(manager, np.random.default_rng(seed)).run())
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            for row in one.keys() & same.keys():  # rows that were only intended may not have been made everywhere
                for mine, theirs in zip(one[row], same[row], strict=True):
                    assert mine.tobytes() == theirs.tobytes()


# --- where rows are ---


@pytest.mark.ranks(2)
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_a_row_that_one_rank_uses_lives_there(managers, comm, rule):
    manager = managers(**APART)
    (table,) = manager.add_tables([make_spec(0, 90, 8, "float32", rule)])
    dense = DenseTable(0, table.spec)
    parts = np.array_split(np.arange(90, dtype=np.int64), manager.ranks)
    for plan in train(manager, table, dense, lambda step, rank: parts[rank], 20, 2):
        manager.release(plan)
    manager.settle()
    np.testing.assert_array_equal(check_one_owner(manager, comm, table)[parts[manager.rank]], manager.rank)
    manager.barrier()
    before = dict(manager.bytes_by_kind)
    train(manager, table, dense, lambda step, rank: parts[rank], 6, 0)
    manager.barrier()
    after = manager.bytes_by_kind
    for kind in ("rows", "records", "moved", "forward"):
        assert after.get(kind, 0) == before.get(kind, 0), f"nothing is left to send as {kind}"
    gradients = after["gradient"] - before["gradient"]
    assert gradients <= 6 * len(manager.peers) * 200, "only that there are none for others"


@pytest.mark.ranks(2)
@pytest.mark.parametrize("ahead", [0, 1, 6])
@pytest.mark.parametrize("rule, uses", [("sgd", 1), ("adagrad", 2)])
def test_a_row_moves_when_as_many_copies_cost_as_much(managers, comm, rule, uses, ahead):
    """One rank uses all rows, at every step: they move there in time, and not before that pays."""
    rows = np.arange(64, dtype=np.int64)
    for steps in (1, 60):  # which looks fall on the eighth steps is a matter of time
        manager = managers(**APART)
        (table,) = manager.add_tables([make_spec(0, 64, 16, "float32", rule)])
        assert Reuse(manager.ranks, manager.rank).worth_a_move(0, table.store)[0] == uses
        dense = DenseTable(0, table.spec)
        for plan in train(manager, table, dense, lambda step, rank: rows if rank == 0 else rows[:0], steps, ahead):
            manager.release(plan)
        manager.settle()
        moved = (check_one_owner(manager, comm, table) == 0).all()
        if steps > 1:
            assert moved
        elif not ahead:
            assert moved == (uses == 1)


@pytest.mark.ranks(2)
def test_rows_that_all_ranks_use_are_copied_and_stay(managers, comm):
    manager = managers(**APART)
    (table,) = manager.add_tables([make_spec(0, 60, 4, "float32", "adagrad")])
    hot = np.arange(60, dtype=np.int64)
    for plan in train(manager, table, DenseTable(0, table.spec), lambda step, rank: hot, 9, 3):
        manager.release(plan)
    manager.settle()
    traffic = manager.traffic
    relocations, replications = over_ranks(comm, traffic.relocations[0], traffic.replications[0])
    assert relocations <= 60, "at most once, to the rank whose intent was known first"
    assert replications >= 60 * 8 * len(manager.peers)
    check_one_owner(manager, comm, table)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("cached", [0, 8, 1000])
@pytest.mark.parametrize("rule", ["sgd", "adamw_amsgrad"])
@pytest.mark.usefixtures("moving_at_once")
def test_wandering_rows(managers, comm, seed, cached, rule):
    """Every row is used by another rank at every other step, so that most of what ranks believe of it is wrong."""
    manager = managers(cached_locations=cached, **APART)
    delay_messages(manager, seed)
    ranks, steps = manager.ranks, 12
    (table,) = manager.add_tables([make_spec(0, 80, 3, "float64", rule)])
    dense = DenseTable(0, table.spec)
    everything = np.arange(80, dtype=np.int64)
    shift = np.random.default_rng(seed).integers(0, ranks, (steps, 80))

    def rows_of(step, rank):
        return everything[shift[step] == rank] if step < steps else everything[:0]

    train(manager, table, dense, rows_of, steps, 0, meets=False)
    manager.settle()
    check_one_owner(manager, comm, table)
    assert manager.traffic.relocations[0] > 80 * steps // ranks // ranks // 2
    dense.check(pulled(manager, table, everything), everything, "in the end")
    manager.submit([], {0: dict(table.spec.group)})
    manager.settle()
    manager.barrier()
    assert_nothing_is_held(manager)
    directory = manager.directory
    assert directory.keys_given == 0, "all homes know, so that nobody else need"
    assert directory.keys_away <= 80 and directory.keys_cached <= cached
    found = gathered(manager, table)
    if manager.rank == 0:
        rows = np.array(sorted(found))
        dense.check(np.array([found[row][0] for row in rows.tolist()]), rows, "gathered")


@pytest.mark.ranks(3)
@pytest.mark.usefixtures("moving_at_once")
def test_a_stale_belief_is_corrected_by_forwarding(managers, comm):
    manager = managers(**APART)
    (table,) = manager.add_tables([make_spec(0, 300, 2, "float32", "sgd")])
    dense = DenseTable(0, table.spec)
    rows, none = np.arange(300, dtype=np.int64), np.empty(0, np.int64)
    for user in (0, 1, 2, 1, 0, 2):
        train(manager, table, dense, lambda step, rank, user=user: rows if rank == user else none, 2, 0)
        manager.settle()
        np.testing.assert_array_equal(check_one_owner(manager, comm, table), user)
    (hops,) = over_ranks(comm, manager.traffic.hops)
    assert hops > 0


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("moving_at_once")
def test_a_late_plan_finds_rows_that_have_moved(managers, comm):
    """A plan for the very step at hand, of rows that live elsewhere, is served before that step changes them."""
    manager = managers(**APART)
    (table,) = manager.add_tables([make_spec(0, 120, 4, "float64", "adagrad")])
    dense = DenseTable(0, table.spec)
    rows = np.arange(120, dtype=np.int64)
    for step in range(8):
        early = step % manager.ranks == manager.rank
        mine = rows if early else rows[: 10 * manager.rank + 5]
        if early:
            plan = manager.intend(table, mine, step)
            manager.flush_intents()
        manager.barrier()
        if not early:
            plan = manager.intend(table, mine, step + 3 * (step % 2))
            manager.flush_intents()
        dense.check(read(manager, plan), mine, f"step {step}")
        manager.release(plan)
        gradient = np.full((len(mine), 4), 1.0 + manager.rank)
        manager.submit([pm.TableGradient(table, mine, gradient)], {0: dict(table.spec.group)})
        pieces = []
        for rank in range(manager.ranks):
            some = rows if step % manager.ranks == rank else rows[: 10 * rank + 5]
            pieces.append((some, np.full((len(some), 4), 1.0 + rank), 1.0, 0, None))
        dense.step(pieces)
    dense.check(pulled(manager, table, rows), rows, "in the end")
    check_one_owner(manager, comm, table)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("rule", DENSE_RULES[::3])
@pytest.mark.usefixtures("moving_at_once")
def test_rows_that_moved_far_from_home_are_overwritten_and_given_another_rule(managers, comm, rule):
    manager = managers(**APART)
    specs = [make_spec(0, 70, 3, "float64", rule), make_spec(1, 70, 3, "float64", "sgd")]
    tables = manager.add_tables(specs)
    dense = [DenseTable(number, spec) for number, spec in enumerate(specs)]
    rows, none = np.arange(70, dtype=np.int64), np.empty(0, np.int64)
    last = manager.ranks - 1
    for number, table in enumerate(tables):
        plan = manager.intend(table, rows if manager.rank == last else none, 0)
        manager.flush_intents()
        dense[number].check(read(manager, plan), plan.rows, "moved")
        manager.release(plan)
        manager.barrier()  # nobody keeps rows still before the one that wants them has them
        np.testing.assert_array_equal(check_one_owner(manager, comm, table), last)
    with manager.still():
        mine = manager.rows_owned(tables[0], rows)
        manager.load_rows(tables[0], mine, np.repeat(mine[:, None] / 7.0, 3, 1), None)
        manager.rewrite_ended()
    dense[0].values[...] = rows[:, None] / 7.0
    manager.replace_rule(tables[1], make_spec(1, 70, 3, "float64", "adagrad"))
    dense[1] = DenseTable(1, tables[1].spec)
    for number, table in enumerate(tables):
        gradient = np.full((70, 3), 0.5)
        manager.submit([pm.TableGradient(table, rows, gradient)], {number: dict(table.spec.group)})
        dense[number].step([(rows, gradient, 1.0, 0, None)] * manager.ranks)
        dense[number].check(pulled(manager, table, rows), rows, "after a step")
        check_one_owner(manager, comm, table)


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("moving_at_once")
def test_a_rank_that_has_closed_serves_rows_that_moved_to_it(managers, comm):
    rows = np.arange(50, dtype=np.int64)
    for closes in range(comm.size):
        manager = managers(**APART)
        (table,) = manager.add_tables([make_spec(0, 50, 2, "float32", "sgd")])
        dense = DenseTable(0, table.spec)
        train(manager, table, dense, lambda step, rank, to=closes: rows if rank == to else rows[:0], 2, 0)
        manager.settle()
        np.testing.assert_array_equal(check_one_owner(manager, comm, table), closes)
        if manager.rank == closes:
            manager.close()
        meet(comm)
        if manager.rank != closes:
            dense.check(pulled(manager, table, rows), rows, "of a rank that has closed")
            plan = manager.intend(table, rows, manager.steps)
            dense.check(read(manager, plan), rows, "of a rank that has closed, planned")
        meet(comm)
        manager.close()


# --- what each technique sends ---


@pytest.mark.ranks(2)
@pytest.mark.parametrize("techniques", ALL)
@pytest.mark.usefixtures("moving_at_once")
def test_what_each_technique_sends(managers, comm, techniques):
    manager = managers(techniques=techniques, **APART)
    (table,) = manager.add_tables([make_spec(0, 200, 4, "float32", "sgd")])
    dense = DenseTable(0, table.spec)
    train(manager, table, dense, lambda step, rank: np.arange(100, dtype=np.int64) + 50 * (rank % 3), 5, 1)
    manager.settle()
    manager.barrier()
    kinds, traffic = manager.bytes_by_kind, manager.traffic
    of_kind = dict(zip(KINDS, over_ranks(comm, *(kinds.get(kind, 0) for kind in KINDS)), strict=True))
    relocations, replications = over_ranks(comm, traffic.relocations[0], traffic.replications[0])
    assert (relocations > 0) == (techniques in ("all", "relocation"))
    assert (replications > 0) == (techniques != "none")
    assert (of_kind["records"] > 0) == (techniques in ("all", "relocation"))
    assert (of_kind["intent"] > 0) == (techniques != "none")
    assert (of_kind["pull"] > 0) == (techniques == "none")
    assert (of_kind["want"] > 0) == (techniques == "relocation")
    assert sum(kinds.values()) <= manager.bytes_sent


def test_unknown_techniques_are_refused(comm):
    with pytest.raises(ValueError, match="techniques must be one of 'all', .*; got 'both'"):
        pm.SynchronousManager(comm, 5.0, "both")


@pytest.mark.ranks(2)
def test_a_row_used_once_costs_one_message(managers):
    """A row that nobody else needs leaves once, and nothing comes back for it."""
    manager = managers(**APART)
    (table,) = manager.add_tables([make_spec(0, 100_000, 16, "float32", "sgd")])
    steps, per_step = 6, 200
    schedule = np.random.default_rng(5).permutation(100_000)[: steps * manager.ranks * per_step]
    schedule = schedule.reshape(steps, manager.ranks, per_step)
    none = np.empty(0, np.int64)
    dense = DenseTable(0, table.spec)
    train(manager, table, dense, lambda step, rank: schedule[step, rank] if step < steps else none, steps, 2)
    manager.settle()
    manager.barrier()
    assert manager.traffic.replications[0] == 0
    sent = manager.bytes_by_kind
    assert "rows" not in sent and "pull" not in sent and "locate" not in sent
    assert sent["gradient"] <= steps * len(manager.peers) * 200
    assert Kind.RECORDS.name.lower() in sent
