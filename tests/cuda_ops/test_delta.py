"""delta and merge: what was taken out goes back in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import dims, dtypes, make_store, seeds


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 40), st.integers(0, 60))
def test_merge_adds_to_values_alone_in_order(seed, dtype, dim, count, n):
    rng = np.random.default_rng(seed)
    words, stride, _ = make_store(rng, count, dim, dim, dtype)
    slots = rng.integers(0, count, n)
    change = cuda_ops.delta(*rng.standard_normal((2, n, dim)).astype(dtype))
    expected = words.copy()
    for slot, row in zip(slots, change, strict=True):
        expected.reshape(count, stride)[slot, :dim] += row
    cuda_ops.merge(words, stride, slots, change)
    np.testing.assert_array_equal(words, expected)


def test_delta_is_the_difference_and_may_overwrite_its_input():
    values, base = np.random.default_rng().standard_normal((2, 4, 5))
    expected = values - base
    np.testing.assert_array_equal(cuda_ops.delta(values, base), expected)
    assert cuda_ops.delta(values, base, values) is values
    np.testing.assert_array_equal(values, expected)
    assert cuda_ops.delta(np.empty((0, 3)), np.empty((0, 3))).shape == (0, 3)


def test_bad_input_is_named():
    words = np.zeros(8)
    with pytest.raises(IndexError, match=r"slots\[0\] is 2"):
        cuda_ops.merge(words, 4, np.array([2]), np.ones((1, 3)))
    with pytest.raises(ValueError, match="delta has 2 rows for 1 slots"):
        cuda_ops.merge(words, 4, np.array([1]), np.ones((2, 3)))
    with pytest.raises(ValueError, match="do not lie in a record of 4 words"):
        cuda_ops.merge(words, 4, np.array([1]), np.ones((1, 3)), offset=2)
    assert not words.any()
    with pytest.raises(ValueError, match=r"base must have shape \(2, 3\), got \(2, 4\)"):
        cuda_ops.delta(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(TypeError, match="base must be float64, got float32"):
        cuda_ops.delta(np.ones((2, 3)), np.ones((2, 3), np.float32))
