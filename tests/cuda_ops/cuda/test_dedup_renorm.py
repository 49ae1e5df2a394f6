"""Unique ids, and limits of norms, on the device."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cuda_ops
from cuda_ops.cuda.dedup import dedup, dedup_counts
from cuda_ops.cuda.renorm import renorm
from tests.cuda_ops.cuda.device import DEVICE, counts, dims, drawn, dtypes, host, on_device, seeds


@drawn
@given(seeds, counts, st.sampled_from([1, 7, 1000, 2**62]))
def test_unique_ids_come_in_order_of_first_occurrence(seed, n, span):
    ids = np.random.default_rng(seed).integers(-span, span, n)
    expected = cuda_ops.dedup_counts(ids)
    for got, wanted in zip(dedup_counts(on_device(ids)), expected, strict=True):
        np.testing.assert_array_equal(host(got), wanted)
    for got, wanted in zip(dedup(on_device(ids)), expected, strict=False):
        np.testing.assert_array_equal(host(got), wanted)


@drawn
@given(seeds, dtypes, dims, counts, st.sampled_from([2.0, 1.0, math.inf, -math.inf, 0.0, 3.0]))
def test_renorm_is_that_of_the_cpu(seed, dtype, dim, count, norm_type):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((count, dim)) * 10.0 ** rng.integers(-2, 2, (count, 1))).astype(
        np.float32 if dtype == torch.float32 else np.float64
    )
    rows[rng.random((count, dim)) < 0.2] = 0
    ours = on_device(rows)
    changed = renorm(ours, 1.5, norm_type)
    norms = np.linalg.norm(rows.astype(np.float64), norm_type, axis=1) if count else np.empty(0)
    clear = np.abs(norms - 1.5) > 1e-5  # at the limit itself the last bit of a sum decides
    np.testing.assert_array_equal(host(changed)[clear], (norms > 1.5)[clear])
    assert cuda_ops.renorm(rows, 1.5, norm_type).shape == changed.shape
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    np.testing.assert_allclose(host(ours)[clear], rows[clear], rtol=limit)
    assert not renorm(ours, 1.5, norm_type).any() or norm_type in (0.0, -math.inf)


def test_renorm_writes_in_place_only():
    with pytest.raises(ValueError, match="contiguous"):
        renorm(torch.ones(2, 6, device=DEVICE)[:, ::2], 1.0)
    with pytest.raises(TypeError, match="rows must be float32 or float64"):
        renorm(torch.ones(2, 6, device=DEVICE).half(), 1.0)
