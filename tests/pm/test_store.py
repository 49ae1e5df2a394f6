"""The record store against a dictionary, and its behaviour at the ends of its memory."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pm.storage.store import RecordClass, RecordStore

CAPACITY = 40


class StoreMachine(RuleBasedStateMachine):
    """Any order of allocating, writing, moving, pinning and releasing keeps each key's record as it was written."""

    @initialize(dim=st.integers(1, 5), words=st.sampled_from([0, 1, 3]), dtype=st.sampled_from(["float32", "float64"]))
    def make(self, dim, words, dtype):
        self.store = RecordStore(RecordClass(dim, dtype, "any", words), CAPACITY)
        self.held: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.pins: dict[int, int] = {}
        self.written = 0
        self.keys_made = 0

    def _write(self, keys):
        slots = self.store.index.find(np.array(keys, np.int64))
        record = self.store.record_class
        values = self.written + np.arange(len(keys) * record.dim, dtype=record.dtype).reshape(len(keys), record.dim)
        states = -1 - self.written - np.arange(len(keys) * record.state_words, dtype=record.dtype)
        states = states.reshape(len(keys), record.state_words)
        self.store.set_values(slots, values)
        self.store.set_states(slots, states)
        self.written += values.size
        self.held.update(zip(keys, zip(values, states, strict=True), strict=True))

    def _some(self, data, least=1):
        return data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=least, unique=True))

    @rule(count=st.integers(0, 12))
    def add(self, count):
        kept_by_pins = len([s for s in self.pins if s not in self._slots().values()])
        if len(self.held) + kept_by_pins + count > CAPACITY:
            with pytest.raises(MemoryError, match="record store is full"):
                self.store.allocate(count)
            return
        keys = list(range(self.keys_made, self.keys_made + count))
        self.keys_made += count
        slots = self.store.allocate(count)
        assert len(set(slots.tolist())) == count
        assert not set(slots.tolist()) & (set(self._slots().values()) | set(self.pins)), "a slot is in use"
        self.store.index.add(np.array(keys, np.int64), slots)
        self._write(keys)

    def _slots(self):
        keys = sorted(self.held)
        return dict(zip(keys, self.store.index.find(np.array(keys, np.int64)).tolist(), strict=True))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def overwrite(self, data):
        self._write(self._some(data))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        keys = self._some(data)
        self.store.release(np.array(keys, np.int64))
        for key in keys:
            del self.held[key]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def pin(self, data):
        slots = [self._slots()[key] for key in self._some(data)]
        self.store.pin(np.array(slots, np.int64))
        for slot in slots:
            self.pins[slot] = self.pins.get(slot, 0) + 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        slots = data.draw(st.lists(st.sampled_from(sorted(self.pins)), min_size=1, unique=True))
        self.store.unpin(np.array(slots, np.int64))
        for slot in slots:
            self.pins[slot] -= 1
            if not self.pins[slot]:
                del self.pins[slot]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def move(self, data):
        keys = self._some(data)
        kept_by_pins = len([s for s in self.pins if s not in self._slots().values()])
        if len(self.held) + kept_by_pins + len(keys) > CAPACITY:
            return
        before = self._slots()
        new = self.store.move(np.array(keys, np.int64))
        assert new.tolist() == [self._slots()[key] for key in keys]
        assert not set(new.tolist()) & set(before.values())

    @invariant()
    def records_are_as_written(self):
        if not hasattr(self, "held"):
            return
        keys = sorted(self.held)
        slots = self.store.index.find(np.array(keys, np.int64))
        assert (slots >= 0).all() and len(set(slots.tolist())) == len(keys)
        record = self.store.record_class
        values = self.store.values(slots, np.empty((len(keys), record.dim), record.dtype))
        states = self.store.states(slots)
        for key, value, state in zip(keys, values, states, strict=True):
            np.testing.assert_array_equal(value, self.held[key][0])
            np.testing.assert_array_equal(state, self.held[key][1])
        assert len(self.store.index) == len(self.held)
        assert len(self.store) >= len(self.held)


StoreMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestStore = StoreMachine.TestCase


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dim", [1, 2, 3, 16])
@pytest.mark.parametrize("words", [0, 1, 16])
def test_the_step_word_is_aligned_and_of_its_own(dim, words, dtype):
    record = RecordClass(dim, dtype, "any", words)
    assert record.record_bytes % 8 == 0
    assert record.record_bytes >= (dim + words) * np.dtype(dtype).itemsize + 8
    store = RecordStore(record, 3)
    store.words[...] = 0
    store.set_values(np.array([1]), np.ones((1, dim), dtype))
    store.set_states(np.array([1]), np.ones((1, words), dtype))
    assert not store.steps[record.record_bytes // 8 * 2 - 1 :: record.record_bytes // 8].any()


def test_unpinning_what_is_not_pinned_is_an_error():
    store = RecordStore(RecordClass(1, "float32", "any", 0), 4)
    store.pin(store.allocate(1))
    store.unpin(np.array([0]))
    with pytest.raises(ValueError, match="slot 0 is not pinned"):
        store.unpin(np.array([0]))


def test_a_declared_store_costs_no_memory():
    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident_bytes()
    store = RecordStore(RecordClass(128, "float32", "adagrad", 128), 30_000_000)
    assert store.capacity * store.record_class.record_bytes > 30e9
    slots = store.allocate(1000)
    store.set_values(slots, np.ones((1000, 128), np.float32))
    assert resident_bytes() - before < 16 << 20


def test_address_space_that_cannot_be_had_is_named():
    with pytest.raises(MemoryError, match="address space"):
        RecordStore(RecordClass(128, "float64", "any", 128), 1 << 50)
