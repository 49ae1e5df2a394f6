"""expand, segment_sum and segment_count against NumPy and PyTorch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import dims, dtypes, seeds


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 30), st.integers(0, 100))
def test_expand_repeats_rows(seed, dtype, dim, segments, n):
    rng = np.random.default_rng(seed)
    slab = rng.standard_normal((segments, dim)).astype(dtype)
    inverse = rng.integers(0, segments, n)
    np.testing.assert_array_equal(cuda_ops.expand(slab, inverse), slab[inverse])
    out = np.full((n, dim), np.nan, dtype)
    assert cuda_ops.expand(slab, inverse, out) is out
    np.testing.assert_array_equal(out, slab[inverse])


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 30), st.integers(0, 100), st.sampled_from([-1, 0, 3, -7]))
def test_segment_sum_adds_in_order(seed, dtype, dim, segments, n, skip):
    rng = np.random.default_rng(seed)
    grad = rng.standard_normal((n, dim)).astype(dtype)
    inverse = rng.integers(0, segments, n)
    inverse[rng.random(n) < 0.2] = skip if skip < segments else 0
    expected = np.zeros((segments, dim), dtype)
    for i, segment in enumerate(inverse):
        if segment != skip:
            expected[segment] += grad[i]
    out = np.full((segments, dim), np.nan, dtype)
    assert cuda_ops.segment_sum(grad, inverse, out, skip) is out
    np.testing.assert_array_equal(out, expected)
    counts = cuda_ops.segment_count(inverse, segments, skip)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, np.bincount(inverse[inverse != skip], minlength=segments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_sum_is_the_backward_of_an_embedding_bit_by_bit(dtype):
    weight = torch.randn(50, 17, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, 50, (400,))
    grad = torch.randn(400, 17, dtype=dtype)
    torch.nn.functional.embedding(ids, weight, padding_idx=7).backward(grad)
    out = cuda_ops.segment_sum(grad, ids, torch.empty(50, 17, dtype=dtype), 7)
    assert torch.equal(out, weight.grad)


def test_no_segments_and_no_rows():
    assert cuda_ops.segment_sum(np.empty((0, 3)), np.empty(0, np.int64), np.empty((0, 3))).shape == (0, 3)
    assert cuda_ops.segment_count(np.empty(0, np.int64), 0).shape == (0,)
    assert cuda_ops.expand(np.empty((0, 3)), np.empty(0, np.int64)).shape == (0, 3)
    assert cuda_ops.segment_sum(np.ones((2, 3)), np.array([-1, -1]), np.empty((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("bad", [-1, 2, -(2**63), 2**62])
def test_an_entry_outside_is_an_error(bad):
    inverse = np.array([0, 1, bad])
    with pytest.raises(IndexError, match=rf"inverse\[2\] is {bad}, which is not in \[0, 2\)"):
        cuda_ops.expand(np.ones((2, 3)), inverse)
    message = rf"inverse\[2\] is {bad}, neither in \[0, 2\) nor the skipped -5"
    with pytest.raises(IndexError, match=message):
        cuda_ops.segment_sum(np.ones((3, 3)), inverse, np.ones((2, 3)), skip=-5)
    with pytest.raises(IndexError, match=message):
        cuda_ops.segment_count(inverse, 2, skip=-5)


def test_shapes_and_dtypes_that_do_not_fit():
    inverse = np.array([0, 1])
    with pytest.raises(ValueError, match="grad has 3 rows for 2 entries"):
        cuda_ops.segment_sum(np.ones((3, 3)), inverse, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"out must have shape \(2, 3\), got \(2, 4\)"):
        cuda_ops.segment_sum(np.ones((2, 3)), inverse, np.ones((2, 4)))
    with pytest.raises(TypeError, match="out must be float64, got float32"):
        cuda_ops.segment_sum(np.ones((2, 3)), inverse, np.ones((2, 3), np.float32))
    with pytest.raises(TypeError, match="slab must be float32 or float64, got float16"):
        cuda_ops.expand(np.ones((2, 3), np.float16), inverse)
    with pytest.raises(ValueError, match=r"slab must have two dimensions, got shape \(2,\)"):
        cuda_ops.expand(np.ones(2), inverse)
