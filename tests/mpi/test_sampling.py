"""Sampling through `pm.ParameterManager` on several ranks: values are right, and keys come to where they are used."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

import pm
from pm.by_hand.sampling import SCHEMES, Sampling

NUM_KEYS = 300
SECONDS_TO_ARRIVE = 30.0


@pytest.fixture
def manager(comm, seed):
    """Keys 0 to 299, each with its own number as its three values."""
    with pm.ParameterManager(NUM_KEYS, 3, comm=comm, dtype="float64", seed=seed) as manager:
        own = np.arange(manager.rank, NUM_KEYS, manager.ranks)
        manager.set(own, np.repeat(own[:, None], 3, axis=1).astype(np.float64))
        manager.barrier()
        yield manager
        manager.barrier()


def pulled(manager: pm.ParameterManager, handle: int, n: int) -> np.ndarray:
    keys, values = np.full(n, -1), np.full((n, 3), np.nan)
    manager.pull_sample(handle, keys, values)
    assert (values == keys[:, None]).all()
    return keys


def remote_pulls(manager: pm.ParameterManager) -> int:
    return manager.stats()["remote_pulls"]


class Recording:
    """A manager's access that remembers what was intended."""

    def __init__(self, manager: pm.ParameterManager):
        self.manager, self.rank, self.stream, self.num_keys = manager, manager.rank, 0, NUM_KEYS
        self.intended: list[np.ndarray] = []

    @property
    def current_clock(self) -> int:
        return self.manager.current_clock

    def intend(self, keys: np.ndarray, start: int, end: int) -> None:
        self.intended.append(keys)
        self.manager.intent(keys, start, end)

    def is_local(self, keys: np.ndarray) -> np.ndarray:
        return self.manager.is_local(keys)

    def pull(self, keys: np.ndarray, out: np.ndarray) -> None:
        self.manager.wait(self.manager.pull(keys, out))


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_samples_have_the_values_of_their_keys(scheme, replacement, manager, seed):
    rng = np.random.default_rng([seed, manager.rank])
    manager.enable_sampling(np.arange(50, 250), None, scheme, replacement)
    for n in rng.integers(0, 60, size=15):
        handle = manager.prepare_sample(n, manager.current_clock + int(rng.integers(3)))
        manager.advance_clock()
        parts = np.diff(np.sort(np.append(rng.integers(0, n + 1, size=2), [0, n])))
        keys = np.concatenate([pulled(manager, handle, part) for part in parts])
        assert len(keys) == n and ((keys >= 50) & (keys < 250)).all()
        assert replacement or len(np.unique(keys)) == n


@pytest.mark.parametrize("scheme", ["naive", "preloc", "pool"])
def test_all_ranks_draw_by_the_weights_and_not_the_same(scheme, manager, comm):
    weights = np.zeros(NUM_KEYS)
    weights[::10] = np.arange(1, 31)
    manager.enable_sampling(None, weights, scheme)
    # Pools of 250 keys, each key 16 times: after so many draws, each key has come 16 times as often as it was drawn.
    each = 16 if scheme == "pool" else 1
    counts = np.zeros(NUM_KEYS)
    for _ in range(8):
        handle = manager.prepare_sample(500 * each)
        counts += np.bincount(pulled(manager, handle, 500 * each), minlength=NUM_KEYS) / each
    everyone = np.empty((comm.size, NUM_KEYS))
    comm.Allgather(counts, everyone)
    expected = weights / weights.sum() * everyone.sum()
    some = expected > 0
    chi_square = ((everyone.sum(0)[some] - expected[some]) ** 2 / expected[some]).sum()
    assert everyone.sum(0)[~some].sum() == 0
    assert chi_square <= 29 + 2 * math.sqrt(29 * 25) + 50  # exceeded by chance once in 10^10 (Laurent & Massart 2000)
    assert len(np.unique(everyone, axis=0)) == comm.size


@pytest.mark.ranks(2)
@pytest.mark.parametrize("scheme", ["preloc", "pool"])
def test_what_is_prepared_is_here_when_it_is_pulled(scheme, manager, seed):
    access = Recording(manager)
    sampling = Sampling(access, seed=seed, scheme=scheme, pool_size=40)
    handle = sampling.prepare(60, manager.current_clock, manager.current_clock + 10)
    intended = np.unique(np.concatenate(access.intended))
    until = time.monotonic() + SECONDS_TO_ARRIVE
    while not manager.is_local(intended).all():
        assert time.monotonic() < until, "what was intended did not come"
        time.sleep(0.005)
    before = remote_pulls(manager)
    keys, values = np.empty(60, np.int64), np.empty((60, 3))
    sampling.pull(handle, keys, values)
    assert (values == keys[:, None]).all() and remote_pulls(manager) == before
    manager.barrier()  # until here no rank's intent ends


@pytest.mark.ranks(2)
def test_local_samples_need_no_message_and_naive_ones_do(manager, comm):
    before = remote_pulls(manager)
    manager.enable_sampling(scheme="local", replacement=False)
    held = int(manager.is_local(np.arange(NUM_KEYS)).sum())
    assert 0 < held < NUM_KEYS
    for _ in range(10):
        assert manager.is_local(pulled(manager, manager.prepare_sample(held), held)).all()
    assert remote_pulls(manager) == before
    manager.enable_sampling(scheme="naive")
    pulled(manager, manager.prepare_sample(300), 300)
    assert remote_pulls(manager) > before


def test_workers_and_ranks_draw_differently_and_a_run_repeats(manager, comm):
    def drawn(worker) -> list[int]:
        worker.enable_sampling()
        keys, values = np.empty(40, np.int64), np.empty((40, 3))
        worker.pull_sample(worker.prepare_sample(40), keys, values)
        return keys.tolist()

    first, again = drawn(manager), drawn(manager)
    other = manager.worker()
    assert first == again != drawn(other)
    other.close()
    everyone = np.empty((comm.size, 40), dtype=np.int64)
    comm.Allgather(np.array(first), everyone)
    assert len(np.unique(everyone, axis=0)) == comm.size


def test_a_sample_that_was_not_prepared_is_refused(manager):
    keys, values = np.empty(1, np.int64), np.empty((1, 3))
    with pytest.raises(ValueError, match="handle 1 is of no sample: prepare_sample was not called"):
        manager.pull_sample(1, keys, values)
    handle = manager.prepare_sample(1)
    with pytest.raises(TypeError, match="int64 array"):
        manager.pull_sample(handle, [0], values)
    pulled(manager, handle, 1)
