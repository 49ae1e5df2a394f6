"""owners against splitmix64 in plain Python, partition against a stable sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import seeds

MASK = 2**64 - 1


def splitmix64(key):
    bits = key & MASK
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
    return bits ^ (bits >> 31)


@settings(deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.integers(1, 2**31))
def test_owners_are_the_hash_modulo_ranks(keys, ranks):
    assert cuda_ops.owners(np.array(keys, np.int64), ranks).tolist() == [splitmix64(key) % ranks for key in keys]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_owners_share_consecutive_and_strided_rows_evenly(ranks):
    for keys in (np.arange(70_000), (5 << 40) | np.arange(0, 7_000_000, 100)):
        counts = np.bincount(cuda_ops.owners(keys, ranks), minlength=ranks)
        assert abs(counts - 70_000 / ranks).max() < 6 * (70_000 / ranks) ** 0.5


@settings(deadline=None)
@given(seeds, st.integers(0, 300), st.integers(1, 9))
def test_partition_is_a_stable_sort(seed, n, ranks):
    owner = np.random.default_rng(seed).integers(0, ranks, n)
    order, counts = cuda_ops.partition(owner, ranks)
    np.testing.assert_array_equal(order, np.argsort(owner, kind="stable"))
    np.testing.assert_array_equal(counts, np.bincount(owner, minlength=ranks))
    assert order.dtype == counts.dtype == np.int64


def test_bad_input_is_named():
    with pytest.raises(IndexError, match=r"owner\[1\] is 3, which is not in \[0, 3\)"):
        cuda_ops.partition(np.array([0, 3]), 3)
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        cuda_ops.owners(np.array([0, 3]), 0)
    with pytest.raises(ValueError, match=r"out must have shape \(2,\)"):
        cuda_ops.owners(np.array([0, 3]), 2, np.zeros(1, np.int64))
