"""Several machines of several ranks each: what crosses the network between them does so once for each machine."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

import pm
import pm.colocated.machine
from adaloader import AdaLoader
from pm.messages import Kind, message_bytes
from tests.mpi.meeting import meet
from tests.mpi.test_exactness import FIELDS, MODELS, OPTIMIZERS, ROWS, Run, assert_exact, digest
from tests.mpi.test_moving import check_one_owner, delay_messages
from tests.mpi.worlds import TIMEOUT, World, assert_nothing_is_held, read, train
from tests.pm.oracle import GROUPS, DenseTable, make_spec

pytestmark = pytest.mark.ranks(3)

PAIRS = {"shared_memory": 2}
"""Ranks 0 and 1, 2 and 3, ... as machines: of three ranks the last is by itself."""
ALL = ["all", "relocation", "replication", "none"]


def same_bits(one: list[dict], other: list[dict]) -> None:
    """Compare what two random programs have gathered."""
    for mine, theirs in zip(one, other, strict=True):
        for row in mine.keys() & theirs.keys():  # rows that were only intended may not have been made everywhere
            for a, b in zip(mine[row], theirs[row], strict=True):
                assert a.tobytes() == b.tobytes()


class CrossingBytes:
    """Bytes of messages that this rank sends to ranks of other pairs, by kind, whatever machines there are."""

    def __init__(self, manager: pm.SynchronousManager):
        self.bytes: Counter[Kind] = Counter()
        send = manager.transport.send

        def tapped(peer, message):
            if peer // 2 != manager.rank // 2:
                self.bytes[message.kind] += message_bytes(message)
            send(peer, message)

        manager.transport.send = tapped


# --- results ---


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("techniques", ALL)
def test_random_programs_equal_dense_tables_however_late_messages_are(
    managers, comm, seed, techniques, moving, request
):
    if moving:
        request.getfixturevalue("moving_at_once")
    manager = managers(techniques=techniques, **PAIRS)
    assert (
        manager.machine_ranks
        == len(manager.machines.of(manager.rank))
        == (1 if manager.rank == 2 == manager.ranks - 1 else 2)
    )
    delay_messages(manager, seed)
    world = World(manager, np.random.default_rng([seed, moving]))
    world.run()
    for table in world.tables:
        check_one_owner(manager, comm, table)


@pytest.mark.usefixtures("moving_at_once")
def test_neither_delays_nor_where_rows_are_change_a_bit(managers, seed):
    results = []
    for turn, techniques in enumerate(("all", "all", "relocation", "none")):
        manager = managers(techniques=techniques, **PAIRS)
        delay_messages(manager, seed + turn)
        results.append(World(manager, np.random.default_rng(seed)).run())
    for other in results[1:]:
        same_bits(results[0], other)


@pytest.mark.parametrize("area_bytes", [0, 1000])
def test_without_room_in_shared_memory_a_bit_is_the_same(managers, seed, monkeypatch, area_bytes):
    results = [World(managers(**PAIRS), np.random.default_rng(seed)).run()]
    monkeypatch.setattr(pm.colocated.machine, "_AREA_BYTES", area_bytes)
    results.append(World(managers(**PAIRS), np.random.default_rng(seed)).run())
    same_bits(*results)


@pytest.mark.parametrize("lookahead", [0, 1, 5])
@pytest.mark.parametrize("model", ["four lookups", "options"])
def test_loaders_train_as_one_process(comm, seed, model, lookahead):
    run = Run(MODELS[model], OPTIMIZERS["Adagrad"], seed, length=8 * comm.size + 2, schedule=True)
    assert_exact(comm, run, lookahead=lookahead, **PAIRS)


def test_a_training_repeats_to_the_bit(comm, seed):
    run = Run(MODELS["options"], OPTIMIZERS["Adagrad"], seed, dtype=torch.float32, length=8 * comm.size + 2)
    assert len({digest(run.managed(lookahead=ahead, **PAIRS)) for ahead in (0, 2, 2, 9)}) == 1


# --- what crosses ---


def crossing(managers, shared_memory, rows_of, steps, dim=32) -> tuple[Counter, pm.SynchronousManager]:
    """Train and return what this rank has sent to other pairs, but for the first steps, whose intents come late."""
    manager = managers(shared_memory=shared_memory, techniques="replication")
    (table,) = manager.add_tables([make_spec(0, 600, dim, "float32", "sgd")])
    dense = DenseTable(0, table.spec)
    plans = train(manager, table, dense, rows_of, 3, 3)
    for plan in plans:
        manager.release(plan)
    manager.settle()
    manager.barrier()
    counted = CrossingBytes(manager)
    first = manager.steps
    plans = {}
    for step in range(first, first + steps + 3):
        plans[step] = manager.intend(table, rows_of(step, manager.rank), step)
        manager.flush_intents()
        manager.barrier()
        at = step - 3
        if at < first:
            continue
        values = read(manager, plans[at])
        gradient = pm.TableGradient(table, plans[at].rows, np.ones_like(values), 1.0, plans[at])
        manager.submit([gradient], {0: dict(GROUPS["sgd"])}, finished=[plans[at]])
    manager.settle()
    manager.barrier()
    return counted.bytes, manager


def over_all(comm, counted: Counter, *kinds: Kind) -> int:
    """Return the bytes of some kinds that all ranks have counted (collective)."""
    mine, total = np.array([sum(counted[kind] for kind in kinds)], np.int64), np.empty(1, np.int64)
    request = comm.Iallreduce(mine, total)
    while not request.Test():
        time.sleep(1e-4)
    return int(total[0])


ROWS_SENT = (Kind.ROWS, Kind.ROWS_TO_PASS_ON, Kind.COMMON_ROWS)
GRADIENTS_SENT = (Kind.GRADIENT, Kind.SUM)


@pytest.mark.ranks(4)
def test_what_two_ranks_of_a_machine_need_crosses_once(managers, comm, seed):
    """The same rows on all ranks: half the bytes. Different rows on each: no more than before."""
    ranks = comm.size // 2 * 2
    same = np.random.default_rng(seed).permuted(np.tile(np.arange(600), (40, 1)), axis=1)[:, :240]
    for alike in (True, False):
        sizes = {}

        def rows_of(step, rank, alike=alike):
            return same[step] if alike else np.sort(same[step])[rank * 240 // ranks : (rank + 1) * 240 // ranks]

        for shared_memory in (2, False):
            counted, _ = crossing(managers, shared_memory, rows_of, 12)
            sizes[shared_memory] = [over_all(comm, counted, *kinds) for kinds in (ROWS_SENT, GRADIENTS_SENT)]
        for once, each in zip(sizes[2], sizes[False], strict=True):
            if alike and comm.size == 4:
                assert once < 0.62 * each, "half, and what says where they go"
            else:
                assert once < 1.2 * each


@pytest.mark.ranks(4)
def test_bytes_to_other_machines_are_counted(managers, comm):
    manager = managers(**PAIRS)
    (table,) = manager.add_tables([make_spec(0, 100, 4, "float32", "sgd")])
    train(manager, table, DenseTable(0, table.spec), lambda step, rank: np.arange(100), 4, 2)
    manager.settle()
    manager.barrier()
    counted = manager.transport.bytes_to
    apart = [peer for peer in range(manager.ranks) if peer // 2 != manager.rank // 2]
    assert 0 < manager.bytes_to_other_machines == sum(counted[peer] for peer in apart) < manager.bytes_sent
    assert sum(counted) == manager.bytes_sent
    alone = managers(shared_memory=False)
    assert alone.bytes_to_other_machines == alone.bytes_sent


def test_a_loader_says_what_crosses(comm, seed):
    run = Run(MODELS["DLRM"], OPTIMIZERS["SGD"], seed, length=4 * comm.size)
    torch.manual_seed(seed)
    model = run.model().to(run.dtype)
    optimizer = run.optimizer(model.parameters())
    loader = AdaLoader(run.data(), batch_size=2, model=model, optimizer=optimizer, min_rows=1, **PAIRS)
    for batch in loader:
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    stats = loader.stats()
    assert stats["machine_ranks"] == (1 if comm.rank == 2 == comm.size - 1 else 2)
    assert 0 < stats["bytes_to_other_machines"] <= stats["bytes_sent"]
    assert stats["lookups"] <= FIELDS * ROWS * stats["steps"]
    loader.close()


# --- which ranks are a machine ---


def test_the_smallest_number_holds(managers, comm):
    manager = managers(shared_memory=2 if comm.rank == 1 else 3)
    assert manager.machines.of(0) == [0, 1] and manager.machine_ranks <= 2


def test_one_rank_of_a_machine_that_shares_nothing(managers, comm, seed):
    manager = managers(shared_memory=comm.rank != 0 and 2)
    assert manager.machines.of(0) == [0] and manager.machines.of(1) == [1]
    assert manager.machine_ranks == (2 if comm.size > 3 and 2 <= comm.rank < 4 else 1)
    World(manager, np.random.default_rng(seed)).run()


def test_a_number_that_is_none(comm):
    with pytest.raises(ValueError, match="shared_memory must be True, False or a number of ranks, 1 or more; got 0"):
        pm.SynchronousManager(comm, 1.0, shared_memory=0 * comm.size)


# --- nothing is left, nobody waits for ever ---


def test_nothing_is_left_of_what_was_summed_and_passed_on(managers, seed):
    manager = managers(**PAIRS)
    World(manager, np.random.default_rng(seed)).run_to_the_end()
    assert not manager.machine_sums._portions and not manager.common_rows.under_way
    assert not manager.serving._rounds and not manager.inbox.first_waiting()
    assert_nothing_is_held(manager)


def test_ranks_that_close_without_waiting_leave_nobody_behind(managers, comm, seed):
    rows = np.arange(90, dtype=np.int64)
    for turn in range(4):
        manager = managers(**PAIRS)
        (table,) = manager.add_tables([make_spec(0, 90, 2, "float32", "sgd")])
        train(manager, table, DenseTable(0, table.spec), lambda step, rank: rows, 3, 2, meets=False)
        if turn % 2:
            for step in range(3, 6):
                manager.intend(table, rows, step)
            manager.flush_intents()
        time.sleep(0.002 * ((manager.rank + turn) % manager.ranks))
        manager.close(linger=True)
        transport = manager.transport
        assert transport._left == transport._parted == set(manager.peers), "all took leave of all, before time was up"


def test_a_collective_operation_is_over_when_what_was_sent_before_has_had_its_turn(managers, comm):
    """Rows are passed on late; what their owner sent a rank after them waits for them."""
    manager = managers(timeout_seconds=20.0, techniques="replication", **PAIRS)
    (table,) = manager.add_tables([make_spec(0, 80, 2, "float32", "sgd")])
    late = []

    def in_its_turn(source, message):
        pass_on(source, message)
        manager.inbox.resume()

    def pass_on_late(source, message):
        late.append(message)
        threading.Timer(0.2, lambda: manager.transport.post(lambda: in_its_turn(source, message))).start()

    pass_on = manager.inbox._handlers[Kind.ROWS_TO_PASS_ON]
    if manager.rank == manager.machines.agent([0, 1], 2):
        manager.inbox._handlers[Kind.ROWS_TO_PASS_ON] = pass_on_late
    meet(comm)
    rows = np.arange(80, dtype=np.int64)
    for plan in train(manager, table, DenseTable(0, table.spec), lambda step, rank: rows, 3, 2, meets=False):
        manager.release(plan)
    manager.settle()
    manager.barrier()
    assert not manager.inbox.first_waiting()
    assert bool(late) == (manager.rank == manager.machines.agent([0, 1], 2))


@pytest.mark.parametrize("what", ["rows", "sums"])
def test_a_rank_that_does_not_deal_for_its_machine_is_named(managers, comm, what):
    """One of ranks 0 and 1 neither passes on what the other is to get of rank 2, nor sums what both have for it."""
    manager = managers(techniques="replication", **PAIRS)
    (table,) = manager.add_tables([make_spec(0, 80, 2, "float32", "sgd")])
    rows = np.arange(80, dtype=np.int64)
    idle = manager.machines.agent([0, 1], 2)
    other = 1 - idle
    if manager.rank == idle:
        name = Kind.ROWS_TO_PASS_ON if what == "rows" else Kind.SUM
        send, handlers = manager.transport.send, manager.inbox._handlers
        if what == "rows":
            handlers[name] = lambda source, message: None
        else:
            manager.transport.send = lambda peer, message: message.kind == name or send(peer, message)
    meet(comm)
    plans = [manager.intend(table, rows, step) for step in range(2)]
    manager.flush_intents()
    manager.barrier()
    values = read(manager, plans[0])
    gradient = pm.TableGradient(table, rows, np.ones_like(values), 1.0, plans[0])
    manager.submit([gradient], {0: dict(GROUPS["sgd"])}, finished=[plans[0]])
    if manager.rank == (other if what == "rows" else 2):
        deadline = time.monotonic() + TIMEOUT
        while not (manager.missing.passing_on() if what == "rows" else manager.missing.summing_for(0)):
            assert time.monotonic() < deadline, "all else is here"
            time.sleep(1e-3)
        manager._waiting.timeout_seconds = 0.1
        with pytest.raises(pm.PeerError, match=rf"for rank [0-9, ]*\b{idle}\b[0-9, ]* to"):
            read(manager, plans[1])
    meet(comm)
