"""Row initialisation on the device: the CPU's bits where it is integer arithmetic, and its values to a few ulp."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_ops import init as host_init
from cuda_ops.cuda import init
from tests.cuda_ops.cuda.device import DEVICE, counts, dims, drawn, dtypes, host, on_device, seeds

keys = st.integers(0, 2**32 - 1)
FILLS = {
    "fill_uniform": (-2.5, 3.0),
    "fill_normal": (0.5, 2.0),
    "fill_trunc_normal": (0.5, 2.0, -1.0, 1.5),
}


@pytest.mark.parametrize("name", FILLS)
@drawn
@given(seeds, dtypes, dims, counts, keys, keys)
def test_values_are_those_of_the_cpu(name, seed, dtype, dim, count, key0, key1):
    rows = np.random.default_rng(seed).integers(0, 2**62, count)
    expected = torch.empty(count, dim, dtype=dtype).numpy()
    getattr(host_init, name)(expected, rows, key0, key1, *FILLS[name])
    out = torch.empty(count, dim, dtype=dtype, device=DEVICE)
    getattr(init, name)(out, on_device(rows), key0, key1, *FILLS[name])
    spread = 6.0  # the widest of the numbers that are added
    limit = 8 * np.finfo(np.float64).eps * spread + np.spacing(np.abs(expected))
    assert (np.abs(host(out) - expected) <= limit).all()


@drawn
@given(seeds, dims, counts, keys, keys)
def test_uniforms_of_a_power_of_two_are_the_bits_of_the_generator(seed, dim, count, key0, key1):
    rows = np.random.default_rng(seed).integers(0, 2**62, count)
    for dtype in (torch.float32, torch.float64):
        expected = torch.empty(count, dim, dtype=dtype).numpy()
        host_init.fill_uniform(expected, rows, key0, key1, 0.0, 4.0)
        out = torch.empty(count, dim, dtype=dtype, device=DEVICE)
        init.fill_uniform(out, on_device(rows), key0, key1, 0.0, 4.0)
        np.testing.assert_array_equal(host(out), expected)


def test_one_value_where_double_precision_cannot_tell_the_bounds_apart():
    out = torch.empty(2, 3, device=DEVICE)
    init.fill_trunc_normal(out, torch.arange(2, device=DEVICE), 1, 2, 0.0, 1.0, 50.0, 60.0)
    assert (out == 50.0).all()
    with pytest.raises(ValueError, match="std > 0"):
        init.fill_trunc_normal(out, torch.arange(2, device=DEVICE), 1, 2, 0.0, 0.0, 1.0, 2.0)


def test_what_it_cannot_fill():
    rows = torch.arange(2, device=DEVICE)
    with pytest.raises(TypeError, match="float32 or float64 matrix"):
        init.fill_uniform(torch.empty(2, 3, dtype=torch.float16, device=DEVICE), rows, 1, 2, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"out_ND must have shape \(2, 3\), got \(3, 3\)"):
        init.fill_uniform(torch.empty(3, 3, device=DEVICE), rows, 1, 2, 0.0, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        init.fill_uniform(torch.empty(2, 6, device=DEVICE)[:, ::2], rows, 1, 2, 0.0, 1.0)
