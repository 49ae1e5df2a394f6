"""Leaving entries out of several arrays at once is what NumPy does for each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuda_ops


@given(st.integers(0, 70), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_compress_is_indexing_with_a_mask(count, seed, share):
    rng = np.random.default_rng(seed)
    kept, flags = rng.random(count) < share, rng.random(count) < 0.5
    columns = [rng.integers(-(2**60), 2**60, count) for _ in range(5)]
    found_flags, found = cuda_ops.compress(kept, flags, *columns)
    np.testing.assert_array_equal(found_flags, flags[kept])
    for mine, column in zip(found, columns, strict=True):
        np.testing.assert_array_equal(mine, column[kept])


def test_arrays_of_other_lengths_are_refused():
    three, four = np.zeros(3, np.int64), np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="an array has 4 entries, where 3 are kept or not"):
        cuda_ops.compress(np.ones(3, bool), np.ones(3, bool), three, three, four, three, three)
