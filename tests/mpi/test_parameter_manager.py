"""The parameter manager by hand: sums, own writes, staleness, locality, `set`, and bad input, on several ranks."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import pm
from tests.mpi.meeting import meet
from tests.mpi.stress import stress
from tests.parameter_programs import TECHNIQUES

COPYING = ("all", "replication")


def make(comm, num_keys=12, length=4, **options):
    return pm.ParameterManager(num_keys, length, comm=comm, timeout_seconds=60.0, **options)


def test_random_programs_keep_sums_own_writes_and_staleness(comm, seed):
    programs, reads = stress(comm, 4.0, seed)
    assert programs > 0
    assert reads > 0


def is_local(manager, keys) -> bool:
    return manager.pull_if_local(keys, np.empty((len(keys), 4), np.float32))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("techniques", TECHNIQUES)
def test_keys_are_local_while_they_are_intended(comm, techniques):
    keys = np.arange(12)
    with make(comm, techniques=techniques) as manager:
        before = manager.is_local(keys)
        at_home = comm.allreduce(before.astype(int))
        assert (at_home == 1).all()  # each key is with its owner alone
        meet(comm)
        manager.intent(keys, 0, 1)
        manager.wait_sync()
        manager.wait_sync()
        wait_until_quiet(comm, manager)
        here = manager.is_local(keys)
        assert is_local(manager, keys) == here.all()
        counts = comm.allreduce(here.astype(int))
        if techniques in COPYING:
            assert (counts == comm.size).all()
        else:
            assert (counts == 1).all()
        meet(comm)
        manager.advance_clock()
        manager.advance_clock()
        manager.wait_sync()
        wait_until_quiet(comm, manager)
        assert (comm.allreduce(manager.is_local(keys).astype(int)) == 1).all()
        meet(comm)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("techniques", ["all", "relocation"])
def test_a_key_that_one_rank_intends_moves_there_and_stays(comm, techniques):
    keys = np.arange(12)
    with make(comm, techniques=techniques) as manager:
        for owner in (*range(comm.size), 0):
            clock = manager.current_clock
            if comm.rank == owner:
                manager.intent(keys, clock, clock)
            wait_until_quiet(comm, manager)
            assert is_local(manager, keys) == (comm.rank == owner)
            if comm.rank == owner:
                manager.push(keys, np.ones((12, 4), np.float32))
            manager.advance_clock()
            wait_until_quiet(comm, manager)
            assert is_local(manager, keys) == (comm.rank == owner)
            meet(comm)  # before the next one asks
        manager.barrier()
        out = np.empty((12, 4), np.float32)
        manager.wait(manager.pull(keys, out))
        assert (out == comm.size + 1).all()
        meet(comm)


def wait_until_quiet(comm, manager) -> None:
    """Wait until no rank has anything more to do (collective)."""
    quiet = 0
    sent = -1
    while quiet < 5:
        manager.wait_sync()
        meet(comm)
        now = comm.allreduce(manager.stats()["bytes_by_kind"].get("REQUEST", 0) + moved(manager))
        quiet, sent = (quiet + 1, sent) if now == sent else (0, now)


def moved(manager) -> int:
    kinds = manager.stats()["bytes_by_kind"]
    return sum(kinds.get(kind, 0) for kind in ("RECORDS", "COPIES", "PROMOTED", "REFUSED", "DROPS", "MOVED"))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("staleness", [None, 0, 2])
@pytest.mark.parametrize("techniques", TECHNIQUES)
def test_what_is_set_is_seen_everywhere_after_a_sync(comm, techniques, staleness):
    keys = np.arange(12)
    mine = keys[keys % comm.size == comm.rank]
    with make(comm, techniques=techniques, staleness=staleness) as manager:
        manager.intent(keys, 0, 5)
        wait_until_quiet(comm, manager)
        for turn in range(3):
            manager.push(mine, np.full((len(mine), 4), 100, np.float32))  # overwritten by what follows
            manager.set(mine, np.full((len(mine), 4), turn, np.float32))
            manager.push(mine, np.full((len(mine), 4), comm.rank, np.float32))
            manager.barrier()
            out = np.empty((12, 4), np.float32)
            manager.wait(manager.pull(keys, out))
            np.testing.assert_array_equal(out, np.repeat(turn + keys[:, None] % comm.size, 4, axis=1))
            meet(comm)


@pytest.mark.ranks(2)
def test_a_worker_that_is_done_keeps_nobody_waiting(comm):
    with make(comm, staleness=0) as manager:
        other = manager.worker()
        other.close()
        for _ in range(3):
            manager.advance_clock()
        assert manager.current_clock == 3


@pytest.mark.ranks(2)
def test_ranks_may_close_at_different_clocks(comm):
    with make(comm, staleness=1) as manager:
        for _ in range(3 + 4 * comm.rank):
            manager.push([0], np.ones((1, 4), np.float32))
            manager.advance_clock()


@pytest.mark.ranks(2)
def test_the_clock_of_a_worker_that_is_done_holds_nobody_up_and_is_not_kept(comm):
    with make(comm, staleness=1) as manager:
        for _ in range(4):
            other = manager.worker()
            other.intent([1, 2], other.current_clock, other.current_clock + 1)
            other.close()
            manager.advance_clock()
        assert manager._runtime.node.claims.clocks == [manager._clock]
        meet(comm)


@pytest.mark.ranks(2)
def test_operations_that_are_done_leave_nothing_behind(comm):
    with make(comm) as manager:
        elsewhere = np.flatnonzero(~manager.is_local(np.arange(12)))
        handles = []
        for _ in range(20):
            handles.append(manager.push(elsewhere, np.ones((len(elsewhere), 4), np.float32)))
            manager.push([], np.empty((0, 4), np.float32))
        assert max(handles) > 0
        manager._runtime.wait_until(lambda: not manager._requests, "pushes to be done")
        for handle in handles:
            manager.wait(handle)  # of what is done
        with pytest.raises(ValueError, match="not one that this worker was given"):
            manager.wait(max(handles) + 1)
        manager.barrier()
        out = np.empty((12, 4), np.float32)
        manager.wait(manager.pull(np.arange(12), out))
        assert not manager._requests
        assert (out == 20 * (comm.size - 1)).all()
        meet(comm)


@pytest.mark.ranks(2)
def test_a_read_only_out_is_refused_and_the_manager_goes_on(comm):
    with make(comm) as manager:
        elsewhere = np.flatnonzero(~manager.is_local(np.arange(12)))
        out = np.zeros((len(elsewhere), 4), np.float32)
        out.flags.writeable = False
        for keys in (elsewhere, elsewhere[[0, *range(len(elsewhere) - 1)]]):
            with pytest.raises(ValueError, match="out .*read-only"):
                manager.pull(keys, out)
        manager.push(np.arange(12), np.ones((12, 4), np.float32))
        manager.barrier()
        out = out.copy()
        manager.wait(manager.pull(elsewhere, out))
        assert (out == comm.size).all()
        meet(comm)


SAME = {"num_keys": 4, "length": [1, 2, 1, 2]}


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"length": [2, 1, 1, 2]}, ["value_length"]),
        ({"length": 1}, ["value_length"]),
        ({"num_keys": 5, "length": [1, 2, 1, 2, 1]}, ["num_keys", "value_length"]),
        ({"dtype": "float64"}, ["dtype"]),
        ({"staleness": 2}, ["staleness"]),
        ({"techniques": "none"}, ["techniques"]),
        ({"update_threshold": 1.0, "staleness": 1}, ["staleness", "update_threshold"]),
    ],
)
def test_ranks_that_give_different_arguments_are_told_so(comm, other, names):
    threads = threading.active_count()
    with pytest.raises(ValueError) as raised:
        make(comm, **(SAME | other if comm.rank == comm.size - 1 else SAME))
    for name in ("num_keys", "value_length", "dtype", "staleness", "techniques", "update_threshold"):
        said = f"ranks [{comm.size - 1}] have another {name} than rank 0" in str(raised.value)
        assert said == (name in names)
    assert f"this is rank {comm.rank}" in str(raised.value)
    assert threading.active_count() == threads
    meet(comm)


@pytest.mark.ranks(2)
def test_a_rank_that_cannot_write_its_record_keeps_nobody_waiting(comm, tmp_path):
    threads = threading.active_count()
    fails = comm.rank == comm.size - 1
    folder = tmp_path / "absent" if fails else tmp_path
    error, said = (OSError, str(folder)) if fails else (RuntimeError, f"rank {comm.size - 1} could not")
    with pytest.raises(error, match=said):
        make(comm, record=folder / "moves.jsonl")
    assert threading.active_count() == threads
    meet(comm)


@pytest.mark.ranks(2)
def test_ranks_may_give_different_arguments_of_their_own(comm):
    own = {"seed": comm.rank, "cache_keys": 5 + comm.rank, "act_late": comm.rank == 0}
    lengths = 4 if comm.rank == 0 else np.full(12, 4)  # the same
    with make(comm, length=lengths, update_threshold=(None, 0.0)[comm.rank % 2], **own) as manager:
        manager.push(np.arange(12), np.ones((12, 4), np.float32))
        manager.barrier()
        out = np.empty((12, 4), np.float32)
        manager.wait(manager.pull(np.arange(12), out))
        assert (out == comm.size).all()
        meet(comm)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.pull([99], np.empty((1, 4), np.float32)), IndexError),
        (lambda m: m.pull([-1], np.empty((1, 4), np.float32)), IndexError),
        (lambda m: m.pull([[1]], np.empty((1, 4), np.float32)), ValueError),
        (lambda m: m.pull([0.5], np.empty((1, 4), np.float32)), TypeError),
        (lambda m: m.push([1], np.ones((1, 4), np.float64)), TypeError),
        (lambda m: m.push([1, 2], np.ones((1, 4), np.float32)), ValueError),
        (lambda m: m.set([12], np.ones((1, 4), np.float32)), IndexError),
        (lambda m: m.intent([1], 5, 4), ValueError),
        (lambda m: m.intent([12], 5), IndexError),
        (lambda m: m.wait(77), ValueError),
        (lambda m: m.wait("x"), TypeError),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(comm, call, error):
    with make(comm) as manager:
        manager.push(np.arange(12), np.ones((12, 4), np.float32))
        with pytest.raises(error):
            call(manager)
        manager.barrier()
        out = np.empty((12, 4), np.float32)
        manager.wait(manager.pull(np.arange(12), out))
        assert (out == comm.size).all()
        meet(comm)
