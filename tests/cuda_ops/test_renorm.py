"""renorm against torch.embedding_renorm_."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import dims, dtypes, seeds

NORM_TYPES = [1, 2, 3, 0.5, 2.5, 0, float("inf"), float("-inf")]


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(0, 30), st.sampled_from(NORM_TYPES))
def test_equals_torch(seed, dtype, dim, count, norm_type):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((count, dim)) * rng.exponential(size=(count, 1))).astype(dtype)
    exact = torch.from_numpy(rows.astype(np.float64))  # in float32 PyTorch's own sums of 1,024 roots are less precise
    norms = exact.norm(norm_type, dim=1).numpy()
    max_norm = float(np.median(norms)) * 1.0001 if count else 1.0  # no norm is within a rounding of it
    torch.embedding_renorm_(exact, torch.arange(count), max_norm, norm_type)
    changed = cuda_ops.renorm(rows, max_norm, norm_type)
    np.testing.assert_array_equal(changed, norms > max_norm)
    np.testing.assert_allclose(rows, exact.numpy(), rtol=16 * np.finfo(dtype).eps)


def test_rows_within_the_limit_keep_their_bits():
    rows = np.random.default_rng().standard_normal((5, 4)).astype(np.float32)
    before = rows.copy()
    assert not cuda_ops.renorm(rows, 1e9).any()
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("norm_type", [1, 2, 3, float("inf")])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limiting_twice_is_limiting_once(dtype, norm_type):
    rng = np.random.default_rng()
    rows = (rng.standard_normal((2000, 7)) * rng.exponential(size=(2000, 1)) * 30).astype(dtype)
    for max_norm in (0.37, 1.0, 25.0):
        cuda_ops.renorm(rows, max_norm * 1.01, norm_type)
        assert cuda_ops.renorm(rows, max_norm, norm_type).any()
        once = rows.copy()
        assert not cuda_ops.renorm(rows, max_norm, norm_type).any()
        np.testing.assert_array_equal(rows, once)
        rows *= dtype(80)


def test_zero_rows_stay_zero():
    rows = np.zeros((2, 3))
    assert not cuda_ops.renorm(rows, 0.0).any()
    assert not rows.any()


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="rows must be float32 or float64, got int64"):
        cuda_ops.renorm(np.zeros((2, 3), np.int64), 1.0)
    with pytest.raises(ValueError, match="two dimensions"):
        cuda_ops.renorm(np.zeros(3), 1.0)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        cuda_ops.renorm(np.zeros((4, 3))[::2], 1.0)
