"""dedup against a dictionary, over many calls on one scratch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from cuda_ops.cpu import dedup as dedup_file

int64s = st.integers(-(2**63), 2**63 - 1)


def reference(ids):
    positions = {}
    inverse = [positions.setdefault(int(key), len(positions)) for key in ids]
    return list(positions), inverse


def check(ids, scratch):
    unique, inverse, counts = cuda_ops.dedup_counts(ids, scratch)
    expected_unique, expected_inverse = reference(ids)
    assert unique.tolist() == expected_unique
    assert inverse.tolist() == expected_inverse
    assert counts.tolist() == np.bincount(inverse, minlength=len(unique)).tolist()
    assert {unique.dtype, inverse.dtype, counts.dtype} == {np.dtype(np.int64)}


@settings(deadline=None)
@given(st.lists(st.one_of(st.lists(int64s), st.lists(st.integers(-3, 3))), max_size=6))
def test_equals_a_dictionary_call_after_call(batches):
    scratch = cuda_ops.DedupScratch()
    for batch in batches:
        check(np.array(batch, np.int64), scratch)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20_000), st.integers(1, 30_000))
def test_equals_a_dictionary_at_size(seed, count, values):
    ids = np.random.default_rng(seed).integers(0, values, count) << np.random.default_rng(seed).integers(0, 40)
    check(ids, None)


def test_the_scratch_grows_and_is_then_reused():
    scratch = cuda_ops.DedupScratch()
    small = scratch.memory_bytes
    cuda_ops.dedup(np.arange(10_000), scratch)
    table = scratch.table
    assert scratch.memory_bytes > small
    check(np.arange(10_000)[::-1], scratch)
    check(np.arange(3), scratch)
    assert scratch.table is table


def test_results_stay_when_the_scratch_is_used_again():
    scratch = cuda_ops.DedupScratch()
    unique, inverse = cuda_ops.dedup(np.array([4, 9, 4]), scratch)
    cuda_ops.dedup(np.array([1, 2, 3]), scratch)
    assert (unique.tolist(), inverse.tolist()) == ([4, 9], [0, 1, 0])


def test_generations_run_out_and_begin_again(monkeypatch):
    monkeypatch.setattr(dedup_file, "_LAST_GENERATION", 3)
    scratch = cuda_ops.DedupScratch()
    rng = np.random.default_rng()
    for _ in range(10):
        check(rng.integers(0, 50, 100), scratch)
        assert 1 <= scratch.generation <= 3


def test_the_highest_generation_fits_its_bits():
    scratch = cuda_ops.DedupScratch()
    scratch.generation = dedup_file._LAST_GENERATION - 1
    check(np.array([7, 7, 8]), scratch)
    assert scratch.generation == dedup_file._LAST_GENERATION
    check(np.array([8, 7, 8]), scratch)


@pytest.mark.parametrize("ids", [np.zeros(2, np.int32), np.zeros(2, np.float64)])
def test_other_dtypes_are_refused(ids):
    with pytest.raises(TypeError, match=f"ids must be int64, got {ids.dtype}"):
        cuda_ops.dedup(ids)


def test_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"one dimension, got shape \(2, 2\)"):
        cuda_ops.dedup(np.zeros((2, 2), np.int64))
