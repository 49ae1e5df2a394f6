"""keys_of_segments and sum_segments against NumPy and the functions that take one segment at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import dims, dtypes, seeds

lengths = st.lists(st.integers(0, 20), min_size=0, max_size=6)


@settings(deadline=None)
@given(seeds, lengths)
def test_keys_are_ids_beside_the_base_of_their_segment(seed, sizes):
    rng = np.random.default_rng(seed)
    bounds = rng.integers(1, 1000, len(sizes))
    bases = rng.integers(0, 1 << 50, len(sizes))
    ids = np.concatenate([np.empty(0, np.int64), *(rng.integers(0, b, n) for b, n in zip(bounds, sizes, strict=True))])
    keys = np.full(len(ids), -1)
    ends = np.cumsum(np.array(sizes, np.int64))
    assert cuda_ops.keys_of_segments(ids, ends, bases, bounds, keys) == -1
    np.testing.assert_array_equal(keys, ids + np.repeat(bases, sizes))
    if len(ids):
        at = int(rng.integers(len(ids)))
        segment = int(np.searchsorted(ends, at, side="right"))
        ids[at] = rng.choice([-1, bounds[segment], bounds[segment] + 7, -(1 << 62)])
        assert cuda_ops.keys_of_segments(ids, ends, bases, bounds, keys) == at


@settings(deadline=None)
@given(seeds, dtypes, dims, lengths, st.integers(1, 30))
def test_sums_are_those_of_all_segments_in_order(seed, dtype, dim, sizes, rows):
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    positions = rng.integers(0, rows, total)
    skips = rng.integers(-1, rows, len(sizes))
    wide = rng.standard_normal((total, dim + 3)).astype(dtype)  # gradients that are part of a wider matrix
    ends = np.cumsum(np.array(sizes, np.int64))
    given_here = rng.random(len(sizes)) < 0.8
    addresses, expected = np.zeros(len(sizes), np.int64), np.zeros((rows, dim), dtype)
    for s, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        if given_here[s]:
            addresses[s] = wide.ctypes.data + (end - size) * wide.strides[0] + wide.itemsize
            for i in range(end - size, end):
                if positions[i] != skips[s]:
                    expected[positions[i]] += wide[i, 1 : dim + 1]
    out = np.full((rows, dim), np.nan, dtype)
    layouts = np.tile([dim + 3, 0, 0], (len(sizes), 1))
    cuda_ops.sum_segments(addresses, layouts, ends, positions, skips, out)
    np.testing.assert_array_equal(out, expected)


@settings(deadline=None)
@given(seeds, dtypes, dims, lengths, st.integers(1, 40), st.integers(1, 30))
def test_gradients_may_lie_in_groups(seed, dtype, dim, groups, group, rows):
    rng = np.random.default_rng(seed)
    sizes = [count * group for count in groups]
    positions = rng.integers(0, rows, sum(sizes))
    wide = [rng.standard_normal((count, group * dim + 5)).astype(dtype) for count in groups]
    flat = np.concatenate([np.empty((0, dim), dtype), *(w[:, 2 : 2 + group * dim].reshape(-1, dim) for w in wide)])
    addresses = np.array([w.ctypes.data + 2 * w.itemsize for w in wide], np.int64)
    layouts = np.tile([dim, group, group * dim + 5], (len(groups), 1))
    out = np.full((rows, dim), np.nan, dtype)
    ends = np.cumsum(np.array(sizes, np.int64))
    cuda_ops.sum_segments(addresses, layouts, ends, positions, np.full(len(groups), -1), out)
    np.testing.assert_array_equal(out, cuda_ops.segment_sum(flat, positions, np.empty((rows, dim), dtype)))


@settings(deadline=None)
@given(seeds, dtypes, dims, lengths, st.integers(1, 30))
def test_rows_of_several_segments_are_added_up_segment_by_segment_from_the_last(seed, dtype, dim, sizes, rows):
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    positions, skips = rng.integers(0, rows, total), rng.integers(-1, rows, len(sizes))
    grads = (rng.standard_normal((total, dim)) * 10.0 ** rng.integers(-3, 4, (total, 1))).astype(dtype)
    ends = np.cumsum(np.array(sizes, np.int64))
    given_here = rng.random(len(sizes)) < 0.8
    addresses, expected = np.zeros(len(sizes), np.int64), np.zeros((rows, dim), dtype)
    for s in reversed(range(len(sizes))):
        if given_here[s]:
            addresses[s] = grads.ctypes.data + (ends[s] - sizes[s]) * grads.strides[0]
            of_segment = np.zeros_like(expected)
            for i in range(ends[s] - sizes[s], ends[s]):
                if positions[i] != skips[s]:
                    of_segment[positions[i]] += grads[i]
            expected += of_segment
    out, seen = np.full((2 * rows, dim), np.nan, dtype), np.full(2 * rows, 7)
    layouts = np.tile([dim, 0, 0], (len(sizes), 1))
    cuda_ops.sum_segments(addresses, layouts, ends, positions, skips, out, seen)
    np.testing.assert_array_equal(out[:rows], expected)


def test_what_does_not_fit_is_an_error():
    one, out = np.array([1]), np.zeros((2, 3), np.float32)
    grad = np.ones((1, 3), np.float32)
    address, layout = np.array([grad.ctypes.data]), np.array([[3, 0, 0]])
    with pytest.raises(ValueError, match="ends must ascend from 0 or more to 1"):
        cuda_ops.sum_segments(address, layout, np.array([2]), np.array([0]), -one, out)
    with pytest.raises(ValueError, match="2 segments with"):
        cuda_ops.sum_segments(address, layout, np.array([1, 1]), np.array([0]), -one, out)
    with pytest.raises(ValueError, match="1 segments with 1 numbers of layouts"):
        cuda_ops.sum_segments(address, one, one, np.array([0]), -one, out)
    with pytest.raises(IndexError, match=r"positions\[0\] is 2, which is not in \[0, 2\)"):
        cuda_ops.sum_segments(address, layout, one, np.array([2]), -one, out)
    with pytest.raises(IndexError, match=r"positions\[0\] is 1, which is not in \[0, 1\)"):
        cuda_ops.sum_segments(address, layout, one, np.array([1]), -one, out, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="seen"):
        cuda_ops.sum_segments(address, layout, one, np.array([0]), -one, out, np.zeros(3, np.int64))
    with pytest.raises(TypeError, match="out must be float32 or float64"):
        cuda_ops.sum_segments(address, layout, one, np.array([0]), -one, np.zeros((2, 3), np.int64))
    with pytest.raises(ValueError, match="1 segments with 2 bases"):
        cuda_ops.keys_of_segments(one, one, np.array([0, 1]), one, one.copy())
