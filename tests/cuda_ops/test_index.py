"""KeyIndex as a state machine against a dictionary, and its edges."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import cuda_ops
from cuda_ops.cpu import index as index_file

# Few values, so that keys meet again, some of them in another table (bits 40 and above).
keys = st.one_of(st.integers(0, 40), st.integers(0, 40).map(lambda row: (3 << 40) | row), st.integers(0, 2**63 - 1))


def check_invariant(index):
    """What the class promises of its entries."""
    entries, capacity = index._entries, index._capacity
    taken = np.flatnonzero(entries[:, 0] != -1)
    assert len(taken) == len(index) <= capacity * 0.85
    assert entries[-1].tolist() == [-1, -1]
    assert (entries[entries[:, 0] == -1, 1] == -1).all()
    homes = np.empty(len(taken), np.int64)
    index_file._homes(entries[taken, 0], capacity, homes)
    filled = np.concatenate([[0], np.cumsum(entries[:, 0] != -1)])
    assert (homes <= taken).all()
    assert (filled[taken] - filled[homes] == taken - homes).all()


class IndexMachine(RuleBasedStateMachine):
    """Adds, removes and finds in a KeyIndex and in a dictionary."""

    def __init__(self):
        super().__init__()
        self.index = cuda_ops.KeyIndex()
        self.model = {}

    @rule(batch=st.lists(keys, unique=True, max_size=60), first=st.integers(0, 2**40))
    def add(self, batch, first):
        new = [key for key in batch if key not in self.model]
        slots = np.arange(first, first + len(new))
        self.index.add(np.array(new, np.int64), slots)
        self.model.update(zip(new, slots.tolist(), strict=True))

    @rule(batch=st.lists(keys, max_size=60), first=st.integers(0, 2**40), part=st.integers(1, 4))
    def put(self, batch, first, part):
        batch = sorted(self.model)[::part] + batch  # some that are there, and some twice
        slots = np.arange(first, first + len(batch))
        self.index.put(np.array(batch, np.int64), slots)
        self.model.update(zip(batch, slots.tolist(), strict=True))

    @rule(batch=st.lists(keys, max_size=60), first=st.integers(0, 60), part=st.integers(1, 4))
    def put_larger(self, batch, first, part):
        batch = sorted(self.model)[::part] + batch
        slots = np.arange(first, first + len(batch))
        self.index.put_larger(np.array(batch, np.int64), slots)
        for key, slot in zip(batch, slots.tolist(), strict=True):
            self.model[key] = max(slot, self.model.get(key, -1))

    @rule(batch=st.lists(keys, unique=True, min_size=1, max_size=20), known=st.randoms(use_true_random=False))
    def add_a_known_key(self, batch, known):
        if not self.model:
            return
        batch = [key for key in batch if key not in self.model] + [known.choice(sorted(self.model))]
        known.shuffle(batch)
        with pytest.raises(KeyError, match="is in the index already"):
            self.index.add(np.array(batch, np.int64), np.zeros(len(batch), np.int64))

    @rule(batch=st.lists(keys, max_size=60))
    def remove(self, batch):
        slots = self.index.remove(np.array(batch, np.int64))
        assert slots.tolist() == [self.model.pop(key, -1) for key in batch]

    @rule(part=st.integers(1, 4))
    def remove_many(self, part):
        batch = sorted(self.model)[::part]
        assert self.index.remove(np.array(batch, np.int64)).tolist() == [self.model.pop(key) for key in batch]

    @rule(batch=st.lists(st.one_of(keys, st.integers(-(2**63), -1)), max_size=60))
    def find(self, batch):
        assert self.index.find(np.array(batch, np.int64)).tolist() == [self.model.get(key, -1) for key in batch]

    @invariant()
    def holds_the_same(self):
        found_keys, slots = self.index.items()
        assert dict(zip(found_keys.tolist(), slots.tolist(), strict=True)) == self.model
        assert len(self.index) == len(self.model)
        check_invariant(self.index)


IndexMachine.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=20)
TestIndexMachine = IndexMachine.TestCase


@pytest.mark.parametrize("again", range(3))
def test_grows_through_many_sizes(again, rng):
    universe = np.unique(rng.integers(0, 2**62, 60_000))
    rng.shuffle(universe)
    index = cuda_ops.KeyIndex()
    for begin in range(0, len(universe), 997):
        part = universe[begin : begin + 997]
        index.add(part, np.arange(begin, begin + len(part)))
    check_invariant(index)
    assert (index.find(universe) == np.arange(len(universe))).all()
    assert (index.find(rng.integers(-(2**63), 0, 1000)) == -1).all()
    gone = rng.random(len(universe)) < 0.5
    assert (index.remove(universe[gone]) == np.flatnonzero(gone)).all()
    check_invariant(index)
    assert (index.find(universe) == np.where(gone, -1, np.arange(len(universe)))).all()


def test_growth_is_bounded_in_memory():
    index = cuda_ops.KeyIndex()
    index.add(np.arange(100_000), np.arange(100_000))
    assert index.memory_bytes <= 100_000 * 16 / 0.85 + 16 * 300
    for key in range(100_000, 140_000, 1000):
        index.add(np.arange(key, key + 1000), np.arange(1000))
    assert index.memory_bytes <= 140_000 * 16 / 0.85 * 1.5 + 16 * 300


def test_expected_keys_are_made_room_for_at_once():
    index = cuda_ops.KeyIndex(expected=5000)
    before = index.memory_bytes
    index.add(np.arange(5000), np.arange(5000))
    assert index.memory_bytes == before


@pytest.mark.parametrize("way", ["add", "put"])
def test_a_full_tail_makes_the_index_grow(monkeypatch, way):
    monkeypatch.setattr(index_file, "_MAX_TAIL", 2)  # one place that can be taken: adds and copies meet its end
    rng = np.random.default_rng()
    index = cuda_ops.KeyIndex()
    universe = rng.permutation(20_000)
    for begin in range(0, 20_000, 50):
        getattr(index, way)(universe[begin : begin + 50], np.arange(begin, begin + 50))
        check_invariant(index)
    assert (index.find(universe) == np.arange(20_000)).all()


@pytest.mark.parametrize("way", ["add", "put"])
def test_keys_crowded_at_the_end_make_it_grow_until_they_fit(monkeypatch, way):
    monkeypatch.setattr(index_file, "_MAX_TAIL", 2)
    candidates = np.unique(np.random.default_rng().integers(0, 2**62, 20_000))
    homes = np.empty(len(candidates), np.int64)
    index_file._homes(candidates, 1 << 30, homes)
    crowd = candidates[np.argsort(homes)[-8:]]  # all at the very end of a small index
    index = cuda_ops.KeyIndex()
    getattr(index, way)(crowd, np.arange(8))
    check_invariant(index)
    assert (index.find(crowd) == np.arange(8)).all()


def test_setting_what_is_there_takes_no_room():
    index = cuda_ops.KeyIndex()
    keys = np.random.default_rng().permutation(50_000)
    for turn in range(6):
        index.put(keys, keys + turn)
        check_invariant(index)
    assert (index.find(keys) == keys + 5).all()
    assert len(index) == 50_000 and index.memory_bytes <= 100_000 * 16 / 0.85 * 1.5 + 16 * 300


def test_empty_batches():
    index = cuda_ops.KeyIndex()
    nothing = np.empty(0, np.int64)
    index.add(nothing, nothing)
    index.put(nothing, nothing)
    assert index.find(nothing).size == index.remove(nothing).size == len(index) == 0
    assert [part.size for part in index.items()] == [0, 0]


def test_find_writes_into_out():
    index = cuda_ops.KeyIndex()
    index.add(np.array([5, 6]), np.array([50, 60]))
    out = np.empty(3, np.int64)
    assert index.find(np.array([6, 7, 5]), out) is out
    assert out.tolist() == [60, -1, 50]


@pytest.mark.parametrize("batch", [[1, 2, 1], [9, 1]])
def test_a_refused_add_leaves_the_index_as_it_was(batch):
    index = cuda_ops.KeyIndex()
    index.add(np.array([9]), np.array([0]))
    with pytest.raises(KeyError, match=f"key {batch[2] if len(batch) == 3 else 9} "):
        index.add(np.array(batch), np.arange(len(batch)))
    assert index.items()[0].tolist() == [9]
    assert len(index) == 1


def test_bad_input_is_named():
    index = cuda_ops.KeyIndex()
    with pytest.raises(ValueError, match="key -4"):
        index.add(np.array([1, -4]), np.array([0, 1]))
    with pytest.raises(ValueError, match="key -4"):
        index.put(np.array([1, -4]), np.array([0, 1]))
    with pytest.raises(ValueError, match="slot -2"):
        index.add(np.array([1, 4]), np.array([0, -2]))
    with pytest.raises(ValueError, match="2 keys given with 1 slots"):
        index.add(np.array([1, 4]), np.array([0]))
    with pytest.raises(TypeError, match="keys must be int64, got int32"):
        index.find(np.zeros(1, np.int32))
    with pytest.raises(ValueError, match=r"out must have shape \(2,\)"):
        index.find(np.zeros(2, np.int64), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="too many for one index"):
        cuda_ops.KeyIndex(expected=2**31)
    assert len(index) == 0
