"""The parameter manager by hand in one process: what its arguments may be, and what workers leave behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pm
from pm.by_hand.lengths import Lengths
from pm.by_hand.sampling import SCHEMES


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"timeout_seconds": float("nan")}, ValueError, "timeout_seconds must be .*more than 0; got nan"),
        ({"timeout_seconds": 0}, ValueError, "timeout_seconds must be .*got 0"),
        ({"timeout_seconds": -1}, ValueError, "timeout_seconds must be .*got -1"),
        ({"timeout_seconds": "x"}, TypeError, "timeout_seconds must be .*got 'x'"),
        ({"timeout_seconds": True}, TypeError, "timeout_seconds must be .*got True"),
        ({"update_threshold": float("nan")}, ValueError, "update_threshold must be .*0 or more; got nan"),
        ({"update_threshold": -0.5}, ValueError, "update_threshold must be .*got -0.5"),
        ({"update_threshold": "x"}, TypeError, "update_threshold must be .*got 'x'"),
        ({"update_threshold": True}, TypeError, "update_threshold must be .*got True"),
        ({"update_threshold": 0.5, "staleness": np.int64(0)}, ValueError, "update_threshold=0.5 holds changes back"),
        ({"cache_keys": -1}, ValueError, "cache_keys must be .*0 or more; got -1"),
        ({"cache_keys": 1.5}, TypeError, "cache_keys must be .*got 1.5"),
        ({"cache_keys": None}, TypeError, "cache_keys must be .*got None"),
        ({"max_rounds_per_second": 0}, ValueError, "max_rounds_per_second must be .*got 0"),
        ({"max_rounds_per_second": float("nan")}, ValueError, "max_rounds_per_second must be .*got nan"),
        ({"max_rounds_per_second": "x"}, TypeError, "max_rounds_per_second must be .*got 'x'"),
        ({"act_late": "x"}, TypeError, "act_late must be True or False; got 'x'"),
        ({"seed": None}, TypeError, "seed must be an integer; got None"),
        ({"seed": 1.5}, TypeError, "seed must be an integer; got 1.5"),
        ({"comm": 5}, TypeError, "comm must be an mpi4py communicator.*got 5"),
        ({"staleness": -1}, ValueError, "staleness must be .*0 or more; got -1"),
        ({"staleness": 1.5}, TypeError, "staleness must be .*got 1.5"),
        ({"staleness": True}, TypeError, "staleness must be .*got True"),
        ({"techniques": "some"}, ValueError, "techniques must be .*got 'some'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_built(monkeypatch, argument, error, message):
    monkeypatch.setattr("pm.by_hand.parameter_manager.Runtime", None)
    with pytest.raises(error, match=message):
        pm.ParameterManager(10, 4, **argument)


@pytest.mark.parametrize("power", [40, 62])
def test_more_keys_than_address_space_are_refused_with_their_number(power):
    with pytest.raises(MemoryError, match=r"cannot reserve \d+ bytes of address space .*ulimit -v"):
        pm.ParameterManager(1 << power, 2)


def test_numbers_may_be_those_of_numpy():
    options = {"staleness": np.int64(2), "cache_keys": np.int32(8), "seed": np.uint8(1), "act_late": np.True_}
    floats = {"update_threshold": np.float32(0.5), "timeout_seconds": np.int64(9), "max_rounds_per_second": 1e3}
    with pm.ParameterManager(10, 4, **options, **floats) as manager:
        assert manager.advance_clock() == 1


@pytest.fixture
def manager():
    with pm.ParameterManager(10, 4) as manager:
        yield manager


@pytest.mark.parametrize("flat", [False, True])
def test_nothing_is_pulled_into_a_read_only_array(manager, flat):
    keys, out = np.arange(3), np.full(12 if flat else (3, 4), 7, np.float32)
    out.flags.writeable = False
    sample = manager.prepare_sample(3)
    drawn = np.full(3, -1)
    for call in (
        lambda: manager.pull(keys, out),
        lambda: manager.pull([1, 1, 2], out),
        lambda: manager.pull_if_local(keys, out),
        lambda: manager.pull_sample(sample, drawn, out),
    ):
        with pytest.raises(ValueError, match="out .*read-only"):
            call()
    assert (out == 7).all() and (drawn == -1).all()
    manager.push(keys, out)  # which is only read
    manager.pull_sample(sample, drawn, np.empty((3, 4), np.float32))


def test_values_of_different_lengths_are_not_pulled_into_a_read_only_array():
    lengths, out = Lengths(3, [1, 2, 1]), np.zeros(4, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out .*read-only"):
        lengths.check_values(out, np.arange(3), out.dtype, "out", written=True)
    assert lengths.check_values(out, np.arange(3), out.dtype, "values") is out


@pytest.mark.parametrize("values", [torch.ones(2, 4, dtype=torch.bfloat16), torch.eye(2, 4).to_sparse()])
def test_tensors_that_numpy_cannot_hold_are_refused(manager, values):
    with pytest.raises(TypeError, match="values must be a dense tensor of float32.*got one of torch"):
        manager.push([1, 2], values)


@pytest.mark.parametrize("handle", ["x", None, 0.5])
def test_a_handle_is_an_integer(manager, handle):
    manager.enable_sampling()

    def pull_sample(handle):
        manager.pull_sample(handle, np.zeros(1, np.int64), None)

    for call in (manager.wait, pull_sample, manager.finish_sample):
        with pytest.raises(TypeError, match=f"a handle must be an int .*got {handle!r}"):
            call(handle)


@pytest.mark.parametrize("clock", ["x", 0.5, float("nan"), float("inf"), True])
def test_a_clock_is_an_integer(manager, clock):
    for name, clocks in (("start", (clock,)), ("end", (3, clock))):
        for call in (
            lambda *clocks: manager.intent([1, 2], *clocks),
            lambda *clocks: manager.prepare_sample(2, *clocks),
        ):
            with pytest.raises(TypeError, match=rf"{name} must be a clock .*got {clock!r}"):
                call(*clocks)
    with pytest.raises(TypeError, match="start must be a clock .*got None"):
        manager.intent([1, 2], None)
    manager.intent([1, 2], np.int64(0), torch.tensor(3))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_samples_that_are_finished_are_forgotten(manager, scheme):
    """Not pulled, pulled in part, and pulled whole."""
    manager.enable_sampling(scheme=scheme)
    keys, out = np.zeros(2, np.int64), np.zeros((2, 4), np.float32)
    for pulls in (0, 1, 2):
        handle = manager.prepare_sample(4)
        for _ in range(pulls):
            manager.pull_sample(handle, keys, out)
        manager.finish_sample(handle)
        assert not manager._sampling._samples
        with pytest.raises(ValueError, match=f"sample {handle} is over"):
            manager.pull_sample(handle, keys, out)


def test_closed_workers_leave_nothing_behind(manager):
    claims = manager._runtime.node.claims
    for _ in range(50):
        worker = manager.worker()
        worker.intent([1, 2], 0, 5)
        worker.close()
        worker.close()
    assert len(claims.clocks) == 1
    manager.advance_clock()
    assert (claims._node.holdings[0].owned.live == 0).all()


def test_the_fastest_clock_stays_when_its_worker_is_done(manager):
    claims = manager._runtime.node.claims
    worker = manager.worker()
    for _ in range(3):
        worker.advance_clock()
    worker.close()
    assert (claims.fastest, claims.now, claims.slowest) == (3, 0, 0)
    manager.advance_clock()
    assert (claims.fastest, claims.now, claims.slowest) == (3, 1, 1)
    later = manager.worker()
    assert later.current_clock == 1
    manager._runtime.close_clocks()
    assert (claims.fastest, claims.now, claims.slowest) == (3, 0, 1 << 62)


def test_a_closed_worker_has_no_clock_and_no_intents(manager):
    worker = manager.worker()
    worker.close()
    for call in (worker.advance_clock, lambda: worker.intent([1], 0)):
        with pytest.raises(RuntimeError, match=r"this worker is closed.*worker\(\) gives another"):
            call()
    assert worker.current_clock == 0
    assert manager.advance_clock() == 1
