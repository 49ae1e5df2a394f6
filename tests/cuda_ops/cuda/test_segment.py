"""Sums and counts per segment on the device, against loops in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_ops.cuda.segment import CHUNK, segment_count, segment_sum
from tests.cuda_ops.cuda.device import DEVICE, SIMULATED, dims, drawn, dtypes, host, on_device, seeds

lookups = st.integers(0, 40 if SIMULATED else 20_000)


def popular(rng, n, segments):
    """Segments of lookups, a few of them far longer than a chunk."""
    inverse = rng.integers(0, segments, n)
    inverse[rng.random(n) < 0.5] = rng.integers(0, segments)
    return inverse


def in_chunks(rows):
    """Sum of rows in order, where there are more than a chunk first within chunks."""
    if len(rows) > CHUNK:
        rows = np.stack([in_chunks(rows[at : at + CHUNK]) for at in range(0, len(rows), CHUNK)])
        return plain_sum(rows)
    return plain_sum(rows)


def plain_sum(rows):
    total = np.zeros(rows.shape[1], rows.dtype)
    for row in rows:
        total += row
    return total


@drawn
@given(seeds, dtypes, dims, lookups, st.integers(1, 30), st.sampled_from(["none", "outside", "inside"]))
def test_sums_are_those_of_chunks_in_order_to_the_bit(seed, dtype, dim, n, segments, padding):
    rng = np.random.default_rng(seed)
    inverse = popular(rng, n, segments)
    skip = {"none": -1, "outside": -7, "inside": int(rng.integers(0, segments))}[padding]
    if padding == "outside" and n:
        inverse[rng.random(n) < 0.2] = skip
    grad = torch.from_numpy(rng.standard_normal((n, dim))).to(dtype)
    out = torch.full((segments, dim), torch.nan, dtype=dtype, device=DEVICE)
    assert segment_sum(grad.to(DEVICE), on_device(inverse), out, skip) is out
    kept = inverse != skip
    expected = np.stack([in_chunks(grad.numpy()[(inverse == u) & kept]) for u in range(segments)])
    np.testing.assert_array_equal(host(out), expected)
    counted = segment_count(on_device(inverse), segments, skip)
    np.testing.assert_array_equal(host(counted), [np.sum((inverse == u) & kept) for u in range(segments)])


def test_a_sum_does_not_depend_on_other_segments():
    rng = np.random.default_rng()
    rows = torch.from_numpy(rng.standard_normal((3 * CHUNK + 1, 5)).astype(np.float32)).to(DEVICE)
    alone = segment_sum(rows, torch.zeros(len(rows), dtype=torch.int64, device=DEVICE), torch.empty_like(rows[:1]))
    among = torch.cat([torch.randn_like(rows), rows, torch.randn_like(rows)])
    inverse = torch.arange(3, device=DEVICE).repeat_interleave(len(rows)) * 2 % 3
    summed = segment_sum(among, inverse, torch.empty(3, 5, device=DEVICE))
    assert torch.equal(summed[2], alone[0])


def test_it_is_the_backward_of_an_embedding():
    weight = torch.randn(50, 17, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 50, (40,))
    grad = torch.randn(40, 17, dtype=torch.float64)
    torch.nn.functional.embedding(ids, weight, padding_idx=7).backward(grad)
    out = segment_sum(grad.to(DEVICE), ids.to(DEVICE), torch.empty_like(weight, device=DEVICE).detach(), 7)
    torch.testing.assert_close(out.cpu(), weight.grad)


def test_no_segments_and_no_rows():
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    empty = torch.empty(0, 3, device=DEVICE)
    assert segment_sum(empty, none, empty.clone()).shape == (0, 3)
    assert segment_count(none, 0).shape == (0,)
    padding = torch.tensor([-1, -1], device=DEVICE)
    assert segment_sum(torch.ones(2, 3, device=DEVICE), padding, empty.clone()).shape == (0, 3)
    assert not segment_sum(empty, none, torch.full((2, 3), torch.nan, device=DEVICE)).any()


@pytest.mark.parametrize("bad", [-1, 2, -(2**63), 2**62])
def test_an_entry_outside_is_an_error(bad):
    inverse = torch.tensor([0, 1, bad], device=DEVICE)
    message = rf"inverse\[2\] is {bad}, neither in \[0, 2\) nor the skipped -5"
    with pytest.raises(IndexError, match=message):
        segment_sum(torch.ones(3, 3, device=DEVICE), inverse, torch.ones(2, 3, device=DEVICE), skip=-5)
    with pytest.raises(IndexError, match=message):
        segment_count(inverse, 2, skip=-5)
