"""Bags on the device against torch.nn.functional.embedding_bag, forward and backward."""

import numpy as np
import pytest
import torch
from hypothesis import given

import cuda_ops
from cuda_ops.cuda import bags as device_bags
from tests.cuda_ops.bag_cases import Bags, limits
from tests.cuda_ops.cuda.device import DEVICE, SIMULATED, dims, drawn, dtypes, seeds

SIZES = (7, 6) if SIMULATED else (500, 200)  # most bags, most lookups of one


@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@drawn
@given(seeds, dtypes, dims)
def test_bags_are_those_of_torch_and_of_the_cpu(mode, seed, dtype, dim):
    bags = Bags(np.random.default_rng(seed), mode, dtype, dim, *SIZES)
    ours = bags.under(device_bags, DEVICE)
    for got, expected, of_host in zip(ours, bags.under_torch(), bags.under(cuda_ops), strict=True):
        torch.testing.assert_close(got, expected, **limits(dtype, len(bags.positions)))
        torch.testing.assert_close(got, of_host, **limits(dtype, len(bags.positions)))


def test_what_does_not_fit_is_an_error_before_anything_is_written():
    slab, positions = torch.ones(3, 2, device=DEVICE), torch.tensor([0, 2, 1], device=DEVICE)
    offsets, out = torch.tensor([0, 2], device=DEVICE), torch.full((3, 2), 7.0, device=DEVICE)
    with pytest.raises(IndexError, match=r"positions\[1\] is 2, neither in \[0, 2\) nor the skipped -1"):
        device_bags.reduce_bags(slab[:2], positions, offsets)
    with pytest.raises(IndexError, match=r"positions\[1\] is 2"):
        device_bags.bags_backward(slab[:2], positions, offsets, out[:2])
    with pytest.raises(ValueError, match="offsets must ascend from 0 to at most 3"):
        device_bags.reduce_bags(slab, positions, offsets + 1)
    with pytest.raises(ValueError, match="weights go with mode 'sum'"):
        device_bags.reduce_bags(slab, positions, offsets, "max", torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match=r"weights must be float32 \(3,\), one for each position, got float32 \(2,\)"):
        device_bags.reduce_bags(slab, positions, offsets, weights=torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match="chosen must be int64"):
        device_bags.bags_backward(slab[:2], positions, offsets, out, "max")
    assert (out == 7).all()
