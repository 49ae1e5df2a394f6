"""Alias tables give the probabilities of their weights, exactly, for weights of any size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

import cuda_ops


def probabilities(threshold: np.ndarray, other: np.ndarray) -> np.ndarray:
    """What a draw by this table comes to."""
    own = threshold.copy()
    np.add.at(own, other, 1.0 - threshold)
    return own / len(own)


def assert_follows(weights: np.ndarray) -> None:
    before = weights.copy()
    threshold, other = cuda_ops.alias_table(weights)
    assert np.array_equal(weights, before)
    assert threshold.min() >= 0 and threshold.max() <= 1 and other.min() >= 0 and other.max() < len(weights)
    relative = weights / weights.max()
    drawn = probabilities(threshold, other)
    np.testing.assert_allclose(drawn, relative / relative.sum(), rtol=1e-12, atol=1e-14)
    assert (drawn[weights == 0] == 0).all()


WEIGHT = st.one_of(st.just(0.0), st.floats(0, 1e300, allow_nan=False), st.floats(0, 1), st.integers(0, 3).map(float))


@given(np_st.arrays(np.float64, st.integers(1, 60), elements=WEIGHT))
def test_a_table_draws_by_its_weights(weights):
    if weights.max() > 0:
        assert_follows(weights)


@pytest.mark.parametrize("size", [1, 2, 1000, 100_003])
def test_equal_and_zipf_weights(size):
    assert_follows(np.full(size, 0.1))
    assert_follows(np.arange(1, size + 1) ** -1.1)
    assert_follows(np.where(np.arange(size) == size // 2, 1e-300, 0.0))


def test_rounding_never_makes_a_weight_of_0_possible():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        assert_follows(np.where(rng.random(50) < 0.5, 0.0, rng.random(50) ** 8 * 0.1))


def test_tensors_give_tensors():
    threshold, other = cuda_ops.alias_table(torch.tensor([1.0, 3.0], dtype=torch.float64))
    np.testing.assert_allclose(probabilities(threshold.numpy(), other.numpy()), [0.25, 0.75])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.array([1.0, -2.0, -3.0]), ValueError, r"weights\[1\] is -2.0"),
        (np.array([np.nan, 1.0]), ValueError, r"weights\[0\] is nan"),
        (np.array([1.0, np.inf]), ValueError, r"weights\[1\] is inf"),
        (np.zeros(4), ValueError, "all 4 weights are 0"),
        (np.empty(0), ValueError, "n at least 1"),
        (np.ones((2, 2)), ValueError, r"\[2, 2\]"),
        (np.ones(3, np.float32), TypeError, "float64, got float32"),
    ],
)
def test_what_are_no_weights_is_named(weights, error, message):
    with pytest.raises(error, match=message):
        cuda_ops.alias_table(weights)
