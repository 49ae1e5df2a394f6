"""Record stores for the tests of this folder: random words, and the int64 view of the same bytes."""

import numpy as np
from hypothesis import strategies as st

dtypes = st.sampled_from([np.float32, np.float64])
dims = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 1024]))
seeds = st.integers(0, 2**32 - 1)


def make_store(rng, count, dim, state_words, dtype):
    """Return (words, stride, steps): `count` records of value, state and a last-step word of 8 bytes."""
    longs = 8 // np.dtype(dtype).itemsize
    stride = dim + state_words + longs
    stride += stride % longs
    words = rng.standard_normal(count * stride).astype(dtype)
    return words, stride, words.view(np.int64)
