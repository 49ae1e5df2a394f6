"""Which rows are due when: known touches and what is to be sent, against lists of versions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import make_store, seeds

NEVER = np.iinfo(np.int64).max


@settings(deadline=None)
@given(seeds, st.booleans())
def test_due_is_the_version_after_the_last_known_touch(seed, in_order):
    rng = np.random.default_rng(seed)
    slots_of_store = int(rng.integers(1, 12))
    book = np.zeros((slots_of_store, 8), np.int32)
    touched = [set() for _ in range(slots_of_store)]
    versions = rng.integers(0, 12, 30)
    for version in np.sort(versions) if in_order else versions:
        slots = rng.permutation(slots_of_store)[: rng.integers(0, slots_of_store + 1)]
        due = cuda_ops.note_touches(book, slots, int(version))
        for slot, when in zip(slots.tolist(), due.tolist(), strict=True):
            exact = max((touch + 1 for touch in touched[slot] if touch < version), default=0)
            in_the_way = {touch for touch in touched[slot] if touch >= version}
            if len(in_the_way) < 2:  # the two latest are remembered
                assert when == exact
            else:
                assert when in (exact, version), "a touch may be forgotten, but then the row waits"
            touched[slot].add(int(version))
        for slot, known in enumerate(touched):
            last_two = sorted({touch + 1 for touch in known} | {0}, reverse=True)[:2]
            assert book[slot, 4] == last_two[0]
            assert book[slot, 5] == (last_two[1] if len(last_two) > 1 else 0)


@settings(deadline=None)
@given(seeds, st.sampled_from([np.float32, np.float64]), st.integers(1, 60))
def test_selects_what_is_stale_or_due(seed, dtype, count):
    rng = np.random.default_rng(seed)
    words, stride, steps = make_store(rng, count, 3, 0, dtype)
    stride_bytes = stride * words.itemsize
    updated = rng.integers(0, 10, count)
    for slot in range(count):
        cuda_ops.mark_steps(steps, stride_bytes, np.array([slot]), int(updated[slot]))
    slots = rng.permutation(count)[: rng.integers(0, count + 1)]
    sent_at = rng.integers(-1, 10, len(slots))
    due = rng.integers(0, 14, len(slots))
    due[rng.random(len(slots)) < 0.2] = NEVER
    version = 10
    for always in (False, True):
        sent_before, due_before = sent_at.copy(), due.copy()
        positions = cuda_ops.select_due(steps, stride_bytes, slots, sent_at, due, version, always)
        if always:
            expected = np.flatnonzero((sent_before < updated[slots]) | (sent_before < 0))
        else:
            expected = np.flatnonzero(due_before <= version)
        np.testing.assert_array_equal(positions, expected)
        chosen = np.isin(np.arange(len(slots)), expected)
        assert (sent_at[chosen] == version).all()
        np.testing.assert_array_equal(sent_at[~chosen], sent_before[~chosen])
        np.testing.assert_array_equal(due, np.where(chosen & (not always), NEVER, due_before))
        again = cuda_ops.select_due(steps, stride_bytes, slots, sent_at, due, version, always)
        assert not len(again), "what was sent is not sent again before it changes"


def test_a_row_that_changed_after_it_was_sent_early_is_sent_once_more_when_it_is_needed():
    steps, slots = np.zeros(3, np.int64), np.array([0, 2])
    sent_at, due = np.full(2, -1), np.array([1, 4])
    assert cuda_ops.select_due(steps, 8, slots, sent_at, due, 1, False).tolist() == [0]
    for version in (2, 3):  # somebody touches it after all
        cuda_ops.mark_steps(steps, 8, np.array([0]), version)
        assert cuda_ops.select_due(steps, 8, slots, sent_at, due, version, False).tolist() == []
    assert cuda_ops.select_due(steps, 8, slots, sent_at, due, 4, False).tolist() == [1]
    assert cuda_ops.select_due(steps, 8, slots, sent_at, due, 5, True).tolist() == [0]
    assert sent_at.tolist() == [5, 4]
