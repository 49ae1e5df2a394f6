"""The last-step words, read and set through the int64 view."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import dims, dtypes, make_store, seeds


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 60), st.integers(-(2**63), 2**63 - 1))
def test_marks_those_records_and_nothing_else(seed, dtype, dim, count, version):
    rng = np.random.default_rng(seed)
    words, stride, steps = make_store(rng, count, dim, dim, dtype)
    stride_bytes = stride * words.itemsize
    slots = rng.permutation(count)[: rng.integers(0, count + 1)]
    expected = steps.copy().reshape(count, stride_bytes // 8)
    expected[slots, -1] = version
    cuda_ops.mark_steps(steps, stride_bytes, slots, version)
    np.testing.assert_array_equal(steps, expected.reshape(-1))
    everyone = rng.integers(0, count, 80)
    out = np.empty(80, np.int64)
    assert cuda_ops.last_steps(steps, stride_bytes, everyone, out) is out
    np.testing.assert_array_equal(out, expected[everyone, -1])


def test_bad_input_is_named():
    steps = np.zeros(6, np.int64)
    with pytest.raises(IndexError, match=r"slots\[0\] is 2, which is not in \[0, 2\)"):
        cuda_ops.last_steps(steps, 24, np.array([2]))
    with pytest.raises(IndexError, match=r"slots\[1\] is -1"):
        cuda_ops.mark_steps(steps, 24, np.array([0, -1]), 5)
    assert not steps.any()
    with pytest.raises(ValueError, match="stride_bytes is 12"):
        cuda_ops.last_steps(steps, 12, np.array([0]))
    with pytest.raises(TypeError, match="steps must be"):
        cuda_ops.last_steps(np.zeros(6), 24, np.array([0]))
