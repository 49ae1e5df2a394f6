"""The manager of several ranks by itself, against dense tables that every rank computes for itself."""

from __future__ import annotations

import time

import numpy as np
import pytest

import pm
from pm.messages import Kind
from pm.same_step import Stepped
from tests.idleness import measured_idleness
from tests.mpi.meeting import meet
from tests.mpi.worlds import TIMEOUT, World, assert_nothing_is_held, pulled, read
from tests.pm.oracle import GROUPS, DenseTable, make_spec, random_gradient


@pytest.mark.parametrize("shared_memory", [True, False, "own stores"])
@pytest.mark.parametrize("number", range(8))
def test_random_programs_equal_dense_tables(managers, seed, number, shared_memory, request):
    if shared_memory == "own stores":
        request.getfixturevalue("own_stores")
        shared_memory = True
    manager = managers(shared_memory=shared_memory)
    World(manager, np.random.default_rng([seed, number])).run()
    assert manager.applied == manager.steps == 14


@pytest.mark.parametrize("shared_memory", [(True, True), (False, False), (True, False)])
def test_a_program_repeats_bit_by_bit(managers, seed, shared_memory):
    first, second = (
        World(managers(shared_memory=shared), np.random.default_rng(seed)).run() for shared in shared_memory
    )
    for one, other in zip(first, second, strict=True):
        for row in one.keys() & other.keys():  # rows that were only intended may not have been made everywhere
            value, state = one[row]
            np.testing.assert_array_equal(value, other[row][0])
            np.testing.assert_array_equal(state, other[row][1])


@pytest.mark.parametrize("shared_memory", [True, False])
def test_nothing_is_left_of_what_is_done(managers, seed, shared_memory):
    manager = managers(shared_memory=shared_memory)
    World(manager, np.random.default_rng(seed)).run_to_the_end()
    serving, asking = manager.serving, manager.asking
    assert not any(asked.plans or asked.overtaken for asked in serving._asked)
    assert not asking._plans and not asking._released and not any(asking._promised)
    assert not manager._on_demand.under_way and not manager.requests._kept and not manager.inbox.first_waiting()
    assert not serving._rounds and not serving.groups
    assert_nothing_is_held(manager)


# --- what travels, and when ---


class Tap:
    """Counts the rows that this rank sends as an owner: (peer, plan) -> [(version at which they left, how many)]."""

    def __init__(self, manager: pm.SynchronousManager):
        self.rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.arrived: list[tuple[int, int]] = []
        send, on_rows = manager.transport.send, manager.inbox._handlers[Kind.ROWS]

        def tapped(peer, message):
            if message.kind == Kind.ROWS:
                left = self.rows.setdefault((peer, message.numbers[0]), [])
                left.append((manager.applied, len(message.arrays[1])))
            send(peer, message)

        def arriving(source, message):
            self.arrived.append((message.numbers[0], manager.others.ready[source]))
            on_rows(source, message)

        manager.transport.send = tapped
        manager.inbox._handlers[Kind.ROWS] = arriving
        manager.barrier()  # nothing is sent before every rank counts

    def total(self) -> int:
        return sum(count for left in self.rows.values() for _, count in left)


def run_steps(manager, table, rows_of_step, steps, lookahead):
    """Intend `lookahead` steps ahead, look up and train; meet between, so that intents are known in time."""
    plans = {}
    for step in range(steps + lookahead):
        plans[step] = manager.intend(table, rows_of_step(step), step)
        manager.flush_intents()
        manager.barrier()
        at = step - lookahead
        if at >= 0:
            values = read(manager, plans[at])
            gradient = pm.TableGradient(table, plans[at].rows, np.ones_like(values), 1.0, plans[at])
            manager.submit([gradient], {0: GROUPS["sgd"]}, finished=[plans[at]])
            manager.settle()
    return plans


@pytest.mark.ranks(2)
def test_a_row_that_nobody_touches_in_between_travels_once_and_early(managers, comm):
    manager, per_step, steps, lookahead = managers(techniques="replication", shared_memory=False), 60, 12, 4
    (table,) = manager.add_tables([make_spec(0, 100_000, 4, "float32", "sgd")])
    tap = Tap(manager)
    rng = np.random.default_rng(3)
    schedule = rng.permutation(100_000)[: (steps + lookahead) * manager.ranks * per_step]
    schedule = schedule.reshape(steps + lookahead, manager.ranks, per_step)
    plans = run_steps(manager, table, lambda step: schedule[step, manager.rank], steps, lookahead)
    manager.barrier()
    by_number = {plan.number: step for step, plan in plans.items()}  # all ranks number their plans alike
    for (peer, number), left in tap.rows.items():
        wanted = schedule[by_number[number], peer]
        assert [count for _, count in left] == [len(manager.rows_owned(table, wanted))], "once, and all of them"
        assert left[0][0] <= max(0, by_number[number] - lookahead + 1), "as soon as it was known"
    sent = {peer: [by_number[n] for p, n in tap.rows if p == peer] for peer in manager.peers}
    for peer, of_steps in sent.items():
        needed = [s for s in range(steps) if len(manager.rows_owned(table, schedule[s, peer]))]
        assert set(needed) <= set(of_steps)
    for number, ready in tap.arrived:
        if by_number[number] >= lookahead:
            assert ready < by_number[number], "it arrived before READY of the version that uses it"


@pytest.mark.ranks(2)
def test_rows_of_consecutive_steps_travel_when_they_are_needed(managers, comm):
    manager, steps, lookahead = managers(techniques="replication", shared_memory=False), 10, 4
    (table,) = manager.add_tables([make_spec(0, 500, 4, "float32", "sgd")])
    tap = Tap(manager)
    hot = np.arange(200, dtype=np.int64)
    plans = run_steps(manager, table, lambda step: hot, steps, lookahead)
    manager.barrier()
    by_number = {plan.number: step for step, plan in plans.items()}
    owned = len(manager.rows_owned(table, hot))
    for (_, number), left in tap.rows.items():
        assert left == [(by_number[number], owned)], "once, at the version that uses them"
    assert tap.total() == (steps + 1) * owned * len(manager.peers)


@pytest.mark.ranks(2)
def test_intents_in_the_wrong_order_cost_a_row_sent_in_vain_at_most(managers, comm):
    manager = managers(techniques="replication", shared_memory=False)
    (table,) = manager.add_tables([make_spec(0, 400, 2, "float32", "sgd")])
    tap = Tap(manager)
    rows = np.arange(400, dtype=np.int64)
    plans = {}
    for version in (5, 6, 2, 3):  # the later ones first; rank 0 uses the rows at 2 and 5, rank 1 at 3 and 6
        if manager.rank == (0 if version in (2, 5) else 1):
            plans[version] = manager.intend(table, rows, version)
            manager.flush_intents()
        elif manager.rank > 1:
            manager.intend(table, rows[:0], version)
        manager.barrier()
    for version in range(8):
        plan = plans.get(version)
        mine = [] if plan is None else [pm.TableGradient(table, rows, np.ones_like(read(manager, plan)), 1.0, plan)]
        manager.submit(mine, {0: GROUPS["sgd"]}, finished=[plan] if mine else [])
        manager.settle()
        manager.barrier()
    owned = len(manager.rows_owned(table, rows))
    user = 1 - manager.rank
    if user in (0, 1):
        first, second = sorted(number for peer, number in tap.rows if peer == user)
        late, soon = (5, 2) if user == 0 else (6, 3)
        assert tap.rows[user, first] == ([(0, owned)] if user == 0 else []) + [(late, owned)]
        assert tap.rows[user, second] == [(soon, owned)]


@pytest.mark.ranks(2)
def test_rows_without_remote_parts_cost_no_bytes(managers, comm):
    manager = managers()
    (table,) = manager.add_tables([make_spec(0, 1000, 64, "float32", "sgd")])
    mine = manager.rows_owned(table, np.arange(1000, dtype=np.int64))
    manager.barrier()
    before = manager.bytes_sent
    run_steps(manager, table, lambda step: mine, 5, 2)
    assert manager.bytes_sent - before < 5 * 4000, "no rows and no gradients, which take 256 bytes each"


# --- waiting, and ranks that do not come ---


@pytest.mark.ranks(2)
def test_a_rank_that_takes_no_step_is_named_when_time_is_up(managers, comm, monkeypatch):
    manager = managers(timeout_seconds=60.0)
    (table,) = manager.add_tables([make_spec(0, 50, 2, "float32", "sgd")])
    rows = np.arange(50, dtype=np.int64)
    last = manager.ranks - 1
    if manager.rank != last:
        manager.submit([], {0: GROUPS["sgd"]})
        before = manager.traffic.wait_seconds
        with monkeypatch.context() as patch:
            patch.setattr(manager._waiting, "timeout_seconds", 0.5)  # for this wait alone, however busy the machine is
            with pytest.raises(pm.PeerError, match=rf"timeout_seconds=0.5\) for rank {last} to take step 0"):
                pulled(manager, table, rows)
        assert 0.5 <= manager.traffic.wait_seconds - before
    meet(comm)
    if manager.rank == last:
        manager.submit([], {0: GROUPS["sgd"]})
    DenseTable(0, table.spec).check(pulled(manager, table, rows), rows, "the others have come")
    meet(comm)


@pytest.mark.ranks(2)
def test_a_rank_that_does_not_join_a_collective_is_named(managers, comm):
    manager = managers(timeout_seconds=0.5 if comm.rank == 0 else 60.0)
    if manager.rank == 0:
        with pytest.raises(TimeoutError, match=r"rank 0 waited 0.5 s in a collective operation for rank 1"):
            manager.barrier()
    meet(comm)
    if manager.rank > 0:
        manager.barrier()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("what", ["step", "barrier", "gather"])
def test_a_rank_that_has_closed_is_named_at_once(managers, comm, what):
    manager = managers()
    (table,) = manager.add_tables([make_spec(0, 50, 2, "float32", "sgd")])
    last = manager.ranks - 1
    meet(comm)
    if manager.rank == last:
        manager.close()
    else:
        started = time.monotonic()
        with pytest.raises(pm.PeerError, match=rf"rank {manager.rank} waits for .* of rank {last}, which has closed"):
            if what == "step":
                manager.submit([], {0: GROUPS["sgd"]})
                manager.settle()
            elif what == "barrier":
                manager.barrier()
            else:
                manager.gather_table(table, lambda *arrays: None)
        assert time.monotonic() - started < TIMEOUT / 2
        assert manager.closed_peers >= {last}
    meet(comm)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_rank_that_has_closed_serves_its_rows_until_all_have(managers, comm, shared_memory):
    for turn in range(4):
        manager = managers(shared_memory=shared_memory)
        (table,) = manager.add_tables([make_spec(0, 50, 2, "float32", "sgd")])
        rows = np.arange(50, dtype=np.int64)
        dense = DenseTable(0, table.spec)
        plan = manager.intend(table, rows, 0)
        for _ in range(2):
            dense.check(read(manager, plan), rows, "in a step")
            manager.submit([pm.TableGradient(table, rows, np.ones((50, 2), np.float32))], {0: GROUPS["sgd"]})
            dense.step([(rows, np.ones((50, 2), np.float32), 1.0, 0, None)] * manager.ranks)
        if manager.rank > turn % manager.ranks:
            time.sleep(0.02 * manager.rank)
            for _ in range(10):  # an evaluation, while others have closed
                dense.check(pulled(manager, table, rows), rows, "after the last step")
                dense.check(read(manager, plan), rows, "after the last step")
        manager.close()
        manager.close()
        assert manager.steps == 2


def test_a_rank_that_has_closed_refuses_to_go_on(managers, comm):
    manager = managers()
    (table,) = manager.add_tables([make_spec(0, 50, 2, "float32", "sgd")])
    rows = np.arange(50, dtype=np.int64)
    plan = manager.intend(table, rows, 0)
    manager.barrier()
    manager.close()
    for call in (
        lambda: pulled(manager, table, rows),
        lambda: read(manager, plan),
        lambda: manager.intend(table, rows, 1),
        lambda: manager.submit([], {}),
        lambda: manager.gather_table(table, None),
        lambda: manager.renorm(table, rows, 1.0, 2.0),
        manager.barrier,
        manager.settle,
    ):
        with pytest.raises(RuntimeError, match=f"manager of rank {manager.rank} is closed"):
            call()
    manager.release(plan)


@pytest.mark.ranks(2)
def test_a_rank_that_lingers_waits_for_all_others(managers, comm):
    manager = managers()
    if manager.rank == 0:
        manager.close(linger=True)
        assert manager.closed_peers == set(manager.peers)
    else:
        while 0 not in manager.closed_peers:
            time.sleep(1e-3)
        assert manager.transport.alive
        manager.close()
    meet(comm)


def test_closing_leaves_nothing_in_the_network(managers, comm):
    """Large messages, which a rank takes in only while it reads, do not keep a rank from closing."""
    rows = np.arange(300_000, dtype=np.int64)
    for turn in range(3):
        manager = managers()
        (table,) = manager.add_tables([make_spec(0, len(rows), 1, "float32", "sgd")])
        if (manager.rank + turn) % 2:
            for step in range(3):
                manager.intend(table, rows, step)
            manager.flush_intents()
        manager.close(linger=True)
        transport = manager.transport
        assert not transport._sending and not any(transport._outbox)
        assert transport._left == transport._parted == set(manager.peers), "all took leave of all, before time was up"


@pytest.mark.ranks(2)
@pytest.mark.parametrize("what", ["value", "length", "optimizer", "batch"])
def test_ranks_that_take_different_steps_are_told_so(comm, what):
    manager = pm.SynchronousManager(comm, TIMEOUT)
    manager.describe_hyperparameter = lambda: lambda optimizer, at: f"parameter {at} of optimizer {optimizer}"
    odd = manager.rank == manager.ranks - 1
    vector = np.array([np.nan, 0.5, 0.25 if odd and what == "value" else 1.0] + [1.0] * (odd and what == "length"))
    batches = (2, 5, 6 + manager.rank) if not odd or what != "batch" else (2, 7 + manager.ranks, 9 + manager.ranks)
    manager.submit([], {}, stepped=Stepped(int(odd and what == "optimizer"), vector, batches))
    last = manager.ranks - 1
    said = {
        "value": rf"step 0: ranks disagree on parameter 2 of optimizer 0: 1.0 on rank 0.*0.25 on rank {last}",
        "length": "different groups",
        "optimizer": rf"rank 0: optimizer 0, .*rank {last}: optimizer 1",
        "batch": rf"one of numbers 5 to 6 on rank 0, .*one of numbers {last + 8} to {last + 10} on rank {last}\.",
    }
    with pytest.raises(pm.PeerError, match=said[what]):
        manager.settle()
    with pytest.raises(pm.PeerError, match="step 0"):
        manager.barrier()
    manager.close(linger=True)
    meet(comm)


# --- what changes while plans are outstanding ---


@pytest.mark.parametrize("shared_memory", [True, False])
def test_another_rule_while_plans_are_outstanding(managers, seed, shared_memory):
    manager = managers(shared_memory=shared_memory)
    rng = np.random.default_rng(seed)
    specs = [make_spec(n, 80, 3, "float32", "sgd") for n in range(2)]
    tables = manager.add_tables(specs)
    dense = [DenseTable(n, spec) for n, spec in enumerate(specs)]
    everything = np.arange(80, dtype=np.int64)
    plans = [manager.intend(table, everything, expected) for table in tables for expected in (0, 1, 2, 3)]
    manager.flush_intents()
    for step in range(4):
        for plan in plans:
            dense[plan.table.number].check(read(manager, plan), plan.rows, f"step {step}")
        pieces = {
            n: [random_gradient(rng, specs[n], everything, False) for _ in range(manager.ranks)] for n in range(2)
        }
        mine = []
        for number, of_ranks in pieces.items():
            _, values, scale, *_ = of_ranks[manager.rank]
            plan = plans[4 * number + step]
            mine.append(pm.TableGradient(tables[number], everything, values, scale, plan))
            dense[number].step(of_ranks)
        manager.submit(mine, {n: specs[n].group for n in range(2)})
        if step == 1:
            specs[0] = make_spec(0, 80, 3, "float32", "adagrad")
            manager.settle()
            values = dense[0].values.copy()
            dense[0] = DenseTable(0, specs[0])
            dense[0].values[...] = values
            manager.replace_rule(tables[0], specs[0])
            tables[0].gradient_steps = 0
    for number, table in enumerate(tables):
        dense[number].check(pulled(manager, table, everything), everything, "in the end")


def test_a_large_table_is_gathered_in_chunks(managers, comm):
    manager = managers()
    (table,) = manager.add_tables([make_spec(0, 200_000, 2, "float64", "adagrad")])
    everything = np.arange(200_000, dtype=np.int64)
    pulled(manager, table, everything)
    calls = []

    def receive(rows, values, states):
        calls.append(len(rows))
        np.testing.assert_array_equal(values, DenseTable(0, table.spec).values[rows])
        assert (states == 0.25).all()

    manager.gather_table(table, receive if manager.rank == 0 else None)
    assert sum(calls) == (200_000 if manager.rank == 0 else 0)
    assert max(calls, default=0) <= 1 << 16


def test_the_background_thread_rests(managers, comm):
    manager = managers()
    manager.barrier()
    time.sleep(0.2)
    with measured_idleness() as idle:
        time.sleep(1.0)
    assert idle.share < 0.1 and idle.wakes_per_second < 400, idle
    meet(comm)
