"""Bags against torch.nn.functional.embedding_bag: forward and backward, ragged, empty, padded, weighted."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.bag_cases import Bags, limits
from tests.cuda_ops.records import dims, seeds

MODES = ["sum", "mean", "max", "weighted"]


@pytest.mark.parametrize("mode", MODES)
@given(seeds, st.sampled_from([torch.float32, torch.float64]), dims)
def test_bags_are_those_of_torch(mode, seed, dtype, dim):
    bags = Bags(np.random.default_rng(seed), mode, dtype, dim)
    for got, expected in zip(bags.under(cuda_ops), bags.under_torch(), strict=True):
        torch.testing.assert_close(got, expected, **limits(dtype))


def test_the_first_of_equal_rows_is_chosen_and_none_of_an_empty_bag():
    slab = np.array([[1.0, 5.0], [1.0, 7.0], [0.0, 7.0]])
    reduced, chosen = cuda_ops.reduce_bags(slab, np.array([2, 0, 1, 1]), np.array([0, 0, 4]), "max")
    assert reduced.tolist() == [[0, 0], [1, 7], [0, 0]]
    assert chosen.tolist() == [[-1, -1], [1, 0], [-1, -1]]


def test_all_negative_rows_have_a_negative_maximum_and_padding_does_not_count():
    slab = -np.ones((3, 2), np.float32)
    reduced, _ = cuda_ops.reduce_bags(slab, np.array([1, 2, 1]), np.array([0]), "max", skip=1)
    assert reduced.tolist() == [[-1, -1]]
    reduced, _ = cuda_ops.reduce_bags(slab, np.array([1, 2, 1]), np.array([0]), "mean", skip=1)
    assert reduced.tolist() == [[-1, -1]]


def test_what_does_not_fit_is_an_error_before_anything_is_written():
    slab, positions, offsets = torch.ones(3, 2), torch.tensor([0, 2, 1]), torch.tensor([0, 2])
    out, grad = torch.full((3, 2), 7.0), torch.ones(2, 2)
    with pytest.raises(IndexError, match=r"positions\[1\] is 3, neither in \[0, 3\) nor the skipped -1"):
        cuda_ops.reduce_bags(slab, torch.tensor([0, 3]), offsets)
    with pytest.raises(IndexError, match=r"positions\[0\] is -2"):
        cuda_ops.bags_backward(grad, torch.tensor([-2, 0]), offsets, out)
    for wrong in ([1, 2], [0, 4], [0, 2, 1]):
        with pytest.raises(ValueError, match="offsets must ascend from 0 to at most 3"):
            cuda_ops.reduce_bags(slab, positions, torch.tensor(wrong))
    with pytest.raises(ValueError, match="3 positions are in none of 0 bags"):
        cuda_ops.reduce_bags(slab, positions, offsets[:0])
    with pytest.raises(ValueError, match="mode must be one of sum, mean, max, got 'median'"):
        cuda_ops.reduce_bags(slab, positions, offsets, "median")
    with pytest.raises(ValueError, match="weights go with mode 'sum', not 'mean'"):
        cuda_ops.reduce_bags(slab, positions, offsets, "mean", torch.ones(3))
    with pytest.raises(ValueError, match=r"weights must be float32 \(3,\), one for each position, got float64 \(3,\)"):
        cuda_ops.reduce_bags(slab, positions, offsets, weights=torch.ones(3).double())
    with pytest.raises(ValueError, match="grad has 3 rows for 2 bags"):
        cuda_ops.bags_backward(torch.ones(3, 2), positions, offsets, out)
    with pytest.raises(ValueError, match=r"chosen must be int64 \(2, 2\) for mode 'max', got None"):
        cuda_ops.bags_backward(grad, positions, offsets, out, "max")
    with pytest.raises(IndexError, match=r"1 \+ chosen\[3\] is 4, which is not in \[0, 4\)"):
        cuda_ops.bags_backward(grad, positions, offsets, out, "max", chosen=torch.tensor([[0, 1], [2, 3]]))
    assert (out == 7).all()
