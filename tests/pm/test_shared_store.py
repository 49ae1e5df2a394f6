"""Stores of several ranks over the same memory: rows are made once, no update is lost, snapshots are whole."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import cuda_ops
from pm.rules import SGD
from pm.storage.records import take_records
from pm.storage.shared_memory import SharedBlock
from pm.storage.shared_store import SharedStore
from pm.storage.snapshot import Snapshot
from pm.storage.store import RecordClass

DIM, RANKS = 3, 3
CLASS = RecordClass(DIM, "float64", "sgd", 0)


class Impatient(Exception):
    pass


def stores(rows: int, patience=None, ask_to_keep=None) -> list[SharedStore]:
    block = SharedBlock(SharedStore.block_bytes(CLASS, rows, RANKS))

    def be_patient(what: str, since: float) -> None:
        if patience is not None:
            patience(what)

    return [
        SharedStore(CLASS, rows, block, rank, RANKS, True, be_patient, ask_to_keep or (lambda *args: None))
        for rank in range(RANKS)
    ]


def filler(store: SharedStore, made: list):
    def fill(keys: np.ndarray, slots: np.ndarray) -> None:
        made.append(keys)
        store.set_new(slots, np.repeat(keys[:, None].astype(np.float64), DIM, 1), np.empty((len(slots), 0)))

    return fill


def slots_of(store: SharedStore, keys: np.ndarray) -> np.ndarray:
    return store.make(keys, filler(store, []))


def values(store: SharedStore, keys: np.ndarray) -> np.ndarray:
    return store.values(slots_of(store, keys), np.empty((len(keys), DIM)))


def test_ranks_own_each_key_once_and_every_rank_sees_every_record(seed):
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 200))
    ours, made = stores(rows), []
    for store in ours:
        store.make(rng.permutation(rows)[: rows // 2 + 1], filler(store, made))
    touched = np.concatenate(made)
    assert len(np.unique(touched)) == len(touched)
    assert sorted(touched) == sorted(np.concatenate([store.index.items()[0] for store in ours]))
    assert sum(map(len, ours)) == len(touched)
    owners = np.array([store.owns(np.arange(rows)) for store in ours])
    assert (owners.sum(0) == 1).all()
    for store in ours:
        keys, slots = store.index.items()
        assert store.owns(keys).all() and (store.keys_at(slots) == keys).all()
        free = store.slots_free_in(store.index)
        assert len(free) == store.slots_in_use == len(touched) and (np.flatnonzero(~free) == np.sort(slots)).all()
        assert (values(store, touched) == touched[:, None]).all()


def test_rows_that_threads_want_at_once_are_made_once():
    ours, made = stores(500), []
    start = threading.Barrier(RANKS)

    def work(rank: int) -> None:
        rng = np.random.default_rng(rank)
        start.wait()
        for _ in range(50):
            keys = rng.permutation(500)[:40]
            slots = ours[rank].make(keys, filler(ours[rank], made))
            assert (ours[rank].values(slots, np.empty((40, DIM))) == keys[:, None]).all()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    touched = np.concatenate(made)
    assert len(np.unique(touched)) == len(touched) == sum(map(len, ours))


def test_rows_that_could_not_be_made_can_be_made_later():
    first, second, _ = stores(20)
    slots, made = np.array([4, 11, 2]), []

    def fail(keys: np.ndarray, slots: np.ndarray) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        first.make(slots, fail)
    second.make(slots, filler(second, made))
    assert sorted(made[0]) == [2, 4, 11]


def test_places_that_were_lost_are_missed_by_whoever_has_none_left():
    store, other, _ = stores(20)

    def fail(keys: np.ndarray, slots: np.ndarray) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError):
        store.make(np.arange(3), fail)
    other.make(np.arange(17), filler(other, []))
    with pytest.raises(MemoryError, match="2 records are to be made, and 0 of 20 places are left"):
        store.make(np.arange(16, 19), filler(store, []))
    assert (values(store, np.arange(17)) == np.arange(17)[:, None]).all()


def test_it_waits_for_rows_that_another_is_making_and_says_so():
    asked = []

    def patience(what: str) -> None:
        asked.append(what)
        if len(asked) == 3:
            raise Impatient(what)

    first, second, _ = stores(20, patience)

    def fill(keys: np.ndarray, slots: np.ndarray) -> None:  # meanwhile another wants one of them
        with pytest.raises(Impatient, match="another rank to make records"):
            second.make(np.array([5, 6]), filler(second, []))
        filler(first, [])(keys, slots)

    first.make(np.array([6, 7]), fill)
    assert (values(second, np.array([5, 6, 7])) == [[5] * DIM, [6] * DIM, [7] * DIM]).all()


def test_it_waits_for_a_record_that_another_is_updating():
    asked = []

    def patience(what: str) -> None:
        asked.append(what)
        if len(asked) == 2:
            steps[4 * longs - 1] = 0  # the other is done

    store, *_ = stores(10, patience)
    store.make(np.arange(10), filler(store, []))
    steps, longs = store.steps, store.record_class.record_bytes // 8
    steps[4 * longs - 1] = np.iinfo(np.int64).min
    rule, grads = SGD(), np.ones((5, DIM))
    rule.apply(store, slots_of(store, np.array([1, 3, 5, 7, 9])), grads, 1.0, {"lr": 1.0, "maximize": False}, 1, 1)
    assert (values(store, np.arange(10))[:, 0] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]).all()
    assert asked == ["the record at slot 3, which another rank is updating"] * 2


def test_a_snapshot_of_one_rank_has_what_others_change(seed):
    rng = np.random.default_rng(seed)
    rows, kept = 90, []

    def ask_to_keep(store: SharedStore, rank: int, slots: np.ndarray) -> None:
        kept.append(rank)
        ours[rank].keep_own(slots)

    ours = stores(rows, None, ask_to_keep)
    ours[0].make(rng.permutation(rows)[:70], filler(ours[0], []))
    indices = [store.index.copy() for store in ours[:2]]
    snapshots = [
        Snapshot(store, 1 << 20, store.slots_free_in(index)) for store, index in zip(ours, indices, strict=False)
    ]
    assert all(map(len, indices))
    for store in ours:
        store.make(np.arange(rows), filler(store, []))  # some rows are new
        store.add(slots_of(store, rng.permutation(rows)[:50]), np.ones((50, DIM)), 1)
    assert set(kept) == {0, 1}  # and not 2, which has none
    for index, snapshot in zip(indices, snapshots, strict=True):
        keys, slots = index.items()
        taken = list(take_records(snapshot, CLASS, keys, slots, 7))
        assert (np.concatenate([part.values for part in taken]) == keys[:, None]).all()
        snapshot.end()
    kept.clear()
    ours[2].add(slots_of(ours[2], np.arange(rows)), np.ones((rows, DIM)), 2)
    assert not kept
    assert sum(values(ours[0], np.arange(rows))[:, 0] - np.arange(rows)) == 3 * 50 + rows


def test_adding_and_states():
    assert cuda_ops.ABSENT == 0  # memory that nobody has written has no rows
    store, other, _ = stores(10)
    store.make(np.arange(10), filler(store, []))
    other.add(slots_of(other, np.array([2, 8])), np.full((2, DIM), 0.25), 3)
    assert (values(store, np.array([2, 3, 8]))[:, 0] == [2.25, 3, 8.25]).all()
    assert not other.owns(np.array([0]))[0] and store.owns(np.array([0]))[0]


@pytest.mark.parametrize("made", [True, False], ids=["all made", "one not made"])
def test_records_of_which_all_were_made_are_put_into_large_pages(monkeypatch, made):
    monkeypatch.setattr("pm.storage.shared_store._LEAST_LARGE_BYTES", 1 << 20)
    rows = 200_000  # of 32 bytes
    store, other, _ = stores(rows)
    keys = np.arange(rows if made else rows - 1)
    store.make(keys, filler(store, []))
    for each in (other, store, store):  # one rank does so, once
        each.use_large_pages()
    threads = [thread for thread in threading.enumerate() if thread.name == "adaloader-pages"]
    assert len(threads) <= 1 and (store._is_enlarging, other._is_enlarging) == (made, False)
    other.add(slots_of(other, keys[::7]), np.ones((len(keys[::7]), DIM)), 1)  # meanwhile
    for thread in threads:
        thread.join()
    found = values(other, keys)[:, 0]
    assert (found == keys + (keys % 7 == 0)).all()
