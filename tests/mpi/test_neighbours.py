"""Ranks of one machine, and of several: who reads whose rows without a message, and what they read."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

import pm
import pm.colocated.machine
import pm.colocated.neighbours
from pm.storage.store import RecordStore
from tests.mpi.meeting import meet
from tests.mpi.worlds import World, gathered, pulled, read, train
from tests.pm.oracle import DENSE_RULES, DenseTable, make_spec


def over_machines(monkeypatch, machine_of) -> None:
    """Have ranks believe that rank r is on machine `machine_of(r)`."""
    monkeypatch.setattr(
        pm.colocated.machine, "ranks_of_machine", lambda comm: comm.Split(machine_of(comm.rank), comm.rank)
    )


@pytest.fixture(params=["pairs", "one apart", "alternating"])
def machines(request, monkeypatch):
    """Ranks on more than one machine."""
    machine_of = {"pairs": lambda r: r // 2, "one apart": lambda r: int(r == 0), "alternating": lambda r: r % 2}
    over_machines(monkeypatch, machine_of[request.param])
    return machine_of[request.param]


def take_steps(manager, table, dense, steps, rows_of, lookahead=2) -> None:
    """Train on `rows_of(step, rank)`, ranks not waiting for each other, check what is read, and release all plans."""
    for plan in train(manager, table, dense, rows_of, steps, lookahead, meets=False):
        manager.release(plan)


# --- several machines ---


@pytest.mark.ranks(3)
@pytest.mark.parametrize("techniques", ["all", "relocation", "replication", "none"])
def test_random_programs_over_machines_equal_dense_tables(managers, seed, machines, techniques):
    manager = managers(techniques=techniques, shared_memory=True)
    mine = [rank for rank in range(manager.ranks) if machines(rank) == machines(manager.rank)]
    assert manager.machine_ranks == len(mine)
    World(manager, np.random.default_rng(seed)).run()


@pytest.mark.ranks(2)
def test_one_machine_and_one_for_each_rank_do_not_differ_in_a_bit(managers, seed, monkeypatch):
    results = []
    for machine_of in (lambda rank: 0, lambda rank: rank):
        over_machines(monkeypatch, machine_of)
        results.append(World(managers(shared_memory=True), np.random.default_rng(seed)).run())
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            for row in one.keys() & same.keys():  # rows that were only intended may not have been made everywhere
                for mine, theirs in zip(one[row], same[row], strict=True):
                    assert mine.tobytes() == theirs.tobytes()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("rule", ["adagrad", "adam"])
@pytest.mark.usefixtures("moving_at_once")
def test_rows_move_to_another_machine_and_not_within_one(managers, comm, monkeypatch, rule):
    over_machines(monkeypatch, lambda rank: int(rank >= 2))
    manager = managers(techniques="all", shared_memory=True)
    (table,) = manager.add_tables([make_spec(0, 120, 3, "float64", rule)])
    dense = DenseTable(0, table.spec)
    everything = np.arange(120, dtype=np.int64)
    take_steps(
        manager,
        table,
        dense,
        6,
        lambda step, rank: everything[20 * rank : 20 * rank + 30] if rank < 2 else everything[:0],
    )
    manager.settle()
    with manager.still():
        owned = manager.rows_owned(table, everything[:50])
    if manager.rank >= 2:
        assert not len(owned), "they are on the machine that uses them"
    before = manager.traffic.relocations[0]
    manager.barrier()
    take_steps(
        manager,
        table,
        dense,
        4,
        lambda step, rank: everything[10 * (1 - rank) : 10 * (1 - rank) + 20] if rank < 2 else everything[:0],
    )
    assert manager.traffic.relocations[0] == before, "the other rank of a machine reads them where they are"
    manager.settle()
    manager.barrier()
    found = gathered(manager, table)
    if manager.rank == 0:
        rows = np.array(sorted(found))
        dense.check(np.array([found[row][0] for row in rows.tolist()]), rows, "gathered")


# --- one machine ---


@pytest.mark.ranks(2)
@pytest.mark.parametrize("rule", ["sgd", "adagrad", *DENSE_RULES[::3]])
@pytest.mark.usefixtures("stores")
def test_neighbours_send_no_rows(managers, comm, rule):
    manager = managers(shared_memory=True)
    assert manager.machine_ranks == manager.ranks
    (table,) = manager.add_tables([make_spec(0, 300, 5, "float32", rule)])
    rng = np.random.default_rng(3)
    schedule = [[rng.choice(300, 90, replace=False) for _ in range(manager.ranks)] for _ in range(12)]
    take_steps(manager, table, DenseTable(0, table.spec), 10, lambda step, rank: schedule[step][rank])
    manager.settle()
    manager.barrier()
    sent = manager.bytes_by_kind
    assert "records" not in sent and "pulled" not in sent and sent.get("rows", 0) < 3000
    assert manager.traffic.neighbour_rows > 10 * 90 // 4
    assert not manager.traffic.replications[0] and not manager.traffic.relocations[0]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("area_bytes", [0, 2000, 1 << 28])
@pytest.mark.usefixtures("own_stores")
def test_gradients_go_through_shared_memory_as_far_as_there_is_room(managers, seed, monkeypatch, area_bytes):
    monkeypatch.setattr(pm.colocated.machine, "_AREA_BYTES", area_bytes)
    manager = managers(shared_memory=True)
    World(manager, np.random.default_rng(seed)).run()
    (table,) = manager.add_tables([make_spec(len(manager.tables), 400, 64, "float32", "sgd")])
    rows = np.arange(400, dtype=np.int64)
    before = manager.bytes_by_kind.get("gradient", 0)
    for _ in range(3):
        gradient = pm.TableGradient(table, rows, np.ones((400, 64), np.float32))
        manager.submit([gradient], {table.number: dict(table.spec.group)})
        manager.settle()
    manager.barrier()
    sent = manager.bytes_by_kind["gradient"] - before
    values = 3 * 4 * 64 * (400 - len(manager.rows_owned(table, rows)))
    assert sent < values / 10 if area_bytes == 1 << 28 else sent > values


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("own_stores")
def test_a_slot_is_asked_for_once(managers, comm):
    manager = managers(shared_memory=True)
    (table,) = manager.add_tables([make_spec(0, 200, 4, "float32", "sgd")])
    rows = np.arange(200, dtype=np.int64)
    dense = DenseTable(0, table.spec)
    take_steps(manager, table, dense, 1, lambda step, rank: rows, lookahead=0)
    manager.settle()
    manager.barrier()
    before = manager.bytes_by_kind
    take_steps(manager, table, dense, 8, lambda step, rank: rows)
    manager.settle()
    after = manager.bytes_by_kind
    for kind in ("seek", "found", "intent", "slots", "rows"):
        assert after.get(kind, 0) == before.get(kind, 0), kind


@pytest.mark.ranks(2)
@pytest.mark.parametrize("cached", [0, 20])
@pytest.mark.usefixtures("own_stores")
def test_slots_that_were_forgotten_are_asked_for_again(managers, comm, cached):
    manager = managers(shared_memory=True, cached_locations=cached)
    (table,) = manager.add_tables([make_spec(0, 900, 2, "float32", "adagrad")])
    rng = np.random.default_rng(4)
    first = rng.permutation(900)
    dense = DenseTable(0, table.spec)
    take_steps(manager, table, dense, 12, lambda step, rank: np.sort(np.roll(first, -60 * (step + rank))[:60]))
    assert len(manager.in_place._slots) <= max(cached, len(table.store))


@pytest.mark.ranks(2)
def test_one_rank_that_does_not_want_to_share_keeps_all_by_themselves(managers, comm):
    manager = managers(shared_memory=comm.rank != 1)
    assert manager.machine_ranks == 1
    (table,) = manager.add_tables([make_spec(0, 60, 2, "float32", "sgd")])
    rows = np.arange(60, dtype=np.int64)
    take_steps(manager, table, DenseTable(0, table.spec), 3, lambda step, rank: rows)
    assert not manager.traffic.neighbour_rows


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("own_stores")
def test_no_more_is_mapped_than_the_address_space_has_room_for(managers, monkeypatch, caplog):
    """Tables of terabytes leave each rank room for its own; what it does not map it gets by message."""
    spec = make_spec(0, 300, 60, "float64", "sgd")
    store_bytes = RecordStore.bytes_of(spec.record_class, 2 * 300)
    monkeypatch.setattr(pm.colocated.neighbours, "_MOST_MAPPED_BYTES", 2 * store_bytes - 1)  # of one other rank
    manager = managers(shared_memory=True)
    (table,) = manager.add_tables([spec])
    rows = np.arange(300, dtype=np.int64)
    take_steps(manager, table, DenseTable(0, table.spec), 4, lambda step, rank: rows)
    assert caplog.text.count(f"by message: {store_bytes:,} bytes of it would join {store_bytes:,}") == manager.ranks - 2
    assert manager.traffic.neighbour_rows
    assert manager.neighbours.have_all(table) == (manager.ranks == 2)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["page", "store", "mapping", "mapping of another rule"])
@pytest.mark.usefixtures("own_stores")
def test_memory_that_cannot_be_had_is_replaced_by_messages(managers, comm, monkeypatch, caplog, where):
    """On one rank, now and then: results are the same, and that rank says why."""

    def refuse(*arguments):
        raise OSError("there is none")

    odd = comm.rank == comm.size - 1
    if odd and where == "page":
        monkeypatch.setattr(pm.colocated.machine, "SharedBlock", refuse)
    if odd and where == "store":
        monkeypatch.setattr(pm.colocated.neighbours, "SharedBlock", refuse)
    if odd and where == "mapping":
        monkeypatch.setattr(pm.colocated.neighbours, "map_block", refuse)
    manager = managers(shared_memory=True)
    assert manager.machine_ranks == (1 if where == "page" else manager.ranks)
    (table,) = manager.add_tables([make_spec(0, 80, 3, "float32", "sgd")])
    rows = np.arange(80, dtype=np.int64)
    dense = DenseTable(0, table.spec)
    plans = [manager.intend(table, rows, version) for version in (0, 6)]
    take_steps(manager, table, dense, 4, lambda step, rank: rows[10 * rank : 10 * rank + 50])
    if odd and where == "mapping of another rule":
        monkeypatch.setattr(pm.colocated.neighbours, "map_block", refuse)
    manager.settle()
    values = dense.values.copy()
    manager.replace_rule(table, make_spec(0, 80, 3, "float32", "adagrad"))
    table.gradient_steps = 0
    dense = DenseTable(0, table.spec)
    dense.values[...] = values
    for plan in plans:
        dense.check(read(manager, plan), rows, "of another rule")
    take_steps(manager, table, dense, 4, lambda step, rank: rows[10 * rank : 10 * rank + 50])
    dense.check(pulled(manager, table, rows), rows, "in the end")
    said = [record.getMessage() for record in caplog.records if record.name == "adaloader"]
    assert not odd or any("there is none" in message for message in said), said


@pytest.mark.ranks(2)
def test_many_tables_take_no_file_descriptors(managers, comm):
    """Each has a store of its own under Adam: more of them than are shared at once."""
    manager = managers(shared_memory=True)
    count, files = 70, len(os.listdir("/proc/self/fd"))
    meet(comm)
    tables = manager.add_tables([make_spec(number, 40, 2, "float32", "adam") for number in range(count)])
    assert len({table.store.block for table in tables}) == count
    assert len(os.listdir("/proc/self/fd")) <= files + 2
    assert all(manager.neighbours.have_all(table) for table in tables)
    rows = np.arange(40, dtype=np.int64)
    take_steps(manager, tables[0], DenseTable(0, tables[0].spec), 3, lambda step, rank: rows)


@contextlib.contextmanager
def few_files(spare: int):
    """This process may open `spare` more files meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.open(os.devnull, os.O_RDONLY)
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("spare", [64, 74])
def test_without_file_descriptors_to_spare_rows_go_by_message(managers, comm, caplog, spare):
    """Of the stores for which none is left: on one rank, which says so once, and how to have more."""
    odd = comm.rank == comm.size - 1
    manager = managers(shared_memory=True)
    with few_files(spare) if odd else contextlib.nullcontext():
        tables = manager.add_tables([make_spec(number, 40, 2, "float32", "adam") for number in range(30)])
    without = sum(table.store.block is None for table in tables)
    assert (0 < without <= 30 if spare > 64 else without == 30) if odd else without == 0
    said = [record.getMessage() for record in caplog.records if "by message" in record.getMessage()]
    assert len(said) == odd and all("raise that limit (ulimit -n)" in message for message in said), said
    rows = np.arange(40, dtype=np.int64)
    take_steps(manager, tables[0], DenseTable(0, tables[0].spec), 3, lambda step, rank: rows)


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("own_stores")
def test_a_table_that_joins_a_store_later_is_read_in_place(managers, comm):
    """That store has no file any more by which it could be mapped; whoever reads another table of it has it mapped."""
    manager = managers(shared_memory=True)
    joining, first = manager.add_tables(
        [make_spec(n, 80, 3, "float32", rule) for n, rule in enumerate(["sgd", "adagrad"])]
    )
    rows = np.arange(80, dtype=np.int64)
    dense = DenseTable(0, joining.spec)
    take_steps(manager, joining, dense, 3, lambda step, rank: rows)
    manager.settle()
    values = dense.values.copy()
    manager.replace_rule(joining, make_spec(0, 80, 3, "float32", "adagrad"))
    assert joining.store is first.store and first.store.block.file < 0
    assert manager.neighbours.have_all(joining) and manager.neighbours.have_all(first)
    dense = DenseTable(0, joining.spec)
    dense.values[...] = values
    joining.gradient_steps = 0
    take_steps(manager, joining, dense, 3, lambda step, rank: rows)


@pytest.mark.ranks(2)
@pytest.mark.usefixtures("stores")
def test_a_row_that_is_scaled_down_is_never_half_so(managers, comm):
    """Its owner scales rows down (max_norm) while a neighbour reads them."""
    manager = managers(shared_memory=True)
    dim = 100_000  # so that reading a row takes long enough
    (table,) = manager.add_tables([make_spec(0, 16, dim, "float32", "sgd")])
    rows = np.arange(16, dtype=np.int64)
    owned = manager.rows_owned(table, rows)
    rounds = 8
    plan = manager.intend(table, rows, 0)
    read(manager, plan)
    for _ in range(rounds):
        with manager.still():
            manager.load_rows(table, owned, np.ones((len(owned), dim), np.float32), None)
            manager.rewrite_ended()
        manager.barrier()
        if manager.rank == 0:
            manager.renorm(table, rows, 1.0, np.inf)  # nothing is too long
            manager.renorm(table, rows, 0.25, np.inf)
        for _ in range(8):
            values = read(manager, plan)
            same = values.min(1) == values.max(1)
            assert same.all(), f"row {np.flatnonzero(~same)[0]} is half scaled down"
        manager.barrier()  # all owners have been told
        manager.barrier()  # and have done so
        np.testing.assert_allclose(read(manager, plan), 0.25, rtol=1e-5)
        manager.barrier()


@pytest.mark.ranks(2)
def test_rows_of_a_rank_that_has_closed_are_read_until_all_have(managers, comm):
    rows = np.arange(70, dtype=np.int64)
    for closes in range(comm.size):
        manager = managers(shared_memory=True)
        (table,) = manager.add_tables([make_spec(0, 70, 2, "float32", "adagrad")])
        dense = DenseTable(0, table.spec)
        take_steps(manager, table, dense, 3, lambda step, rank: rows)
        plan = manager.intend(table, rows, manager.steps)
        manager.settle()
        meet(comm)
        if manager.rank == closes:
            manager.close()
        meet(comm)
        if manager.rank != closes:
            for _ in range(3):
                dense.check(read(manager, plan), rows, "of a rank that has closed")
        meet(comm)
        manager.close()


def test_nothing_has_a_name(managers, comm):
    """Stores are in no folder, so that nothing can be left there whatever ends the ranks."""
    folder = Path("/dev/shm")
    before = set(os.listdir(folder)) if folder.exists() else set()
    meet(comm)
    manager = managers(shared_memory=True)
    (table,) = manager.add_tables([make_spec(0, 1000, 4, "float32", "sgd")])
    pulled(manager, table, np.arange(1000, dtype=np.int64))
    made = set(os.listdir(folder)) - before if folder.exists() else set()
    assert not [name for name in made if "adaloader" in name]
    time.sleep(0.01)
    meet(comm)
