"""same_ids against NumPy's own comparison."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import seeds


@given(seeds, st.integers(0, 40), st.integers(0, 2), st.integers(1, 5))
def test_ids_are_the_same_where_numbers_and_order_are(seed, count, changes, step):
    rng = np.random.default_rng(seed)
    expected = rng.integers(-(1 << 62), 1 << 62, count)
    ids = np.repeat(expected, step)[::step]  # a column of a wider matrix
    for at in rng.integers(0, count, changes) if count else ():
        ids[at] ^= 1 << int(rng.integers(63))
    assert cuda_ops.same_ids(expected, ids) == np.array_equal(expected, ids)
    assert not cuda_ops.same_ids(expected, np.append(ids, 0))
    assert not cuda_ops.same_ids(np.append(expected, 0), ids)
