"""gather and scatter against NumPy's indexing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_ops
from tests.cuda_ops.records import dims, dtypes, make_store, seeds


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 60), st.integers(0, 80), st.booleans())
def test_gather_reads_any_words_of_any_records(seed, dtype, dim, count, n, with_positions):
    rng = np.random.default_rng(seed)
    words, stride, _ = make_store(rng, count, dim, dim, dtype)
    slots = rng.integers(0, count, n)
    offset = int(rng.integers(0, stride))
    width = int(rng.integers(1, stride - offset + 1))
    taken = words.reshape(count, stride)[slots, offset : offset + width]
    if not with_positions:
        np.testing.assert_array_equal(cuda_ops.gather(words, stride, slots, offset=offset, width=width), taken)
        return
    positions = rng.permutation(n + 5)[:n]
    out = rng.standard_normal((n + 5, width)).astype(dtype)
    expected = out.copy()
    expected[positions] = taken
    assert cuda_ops.gather(words, stride, slots, out, positions, offset) is out
    np.testing.assert_array_equal(out, expected)


@settings(deadline=None)
@given(seeds, dtypes, dims, st.integers(1, 60), st.booleans())
def test_scatter_writes_those_words_and_no_others(seed, dtype, dim, count, with_positions):
    rng = np.random.default_rng(seed)
    words, stride, _ = make_store(rng, count, dim, dim, dtype)
    slots = rng.permutation(count)[: rng.integers(0, count + 1)]
    offset = int(rng.integers(0, stride))
    width = int(rng.integers(1, stride - offset + 1))
    rows = rng.standard_normal((len(slots) + (3 if with_positions else 0), width)).astype(dtype)
    positions = rng.integers(0, len(rows), len(slots)) if with_positions else None
    expected = words.copy()
    expected.reshape(count, stride)[slots, offset : offset + width] = rows if positions is None else rows[positions]
    cuda_ops.scatter(words, stride, slots, rows, positions, offset)
    np.testing.assert_array_equal(words, expected)


def test_the_last_of_repeated_slots_wins():
    words = np.zeros(8)
    cuda_ops.scatter(words, 4, np.array([1, 1]), np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert words.tolist() == [0, 0, 0, 0, 3, 4, 0, 0]


def test_whole_records_keep_every_bit_of_the_step_word():
    rng = np.random.default_rng()
    words, stride, steps = make_store(rng, 20, 3, 3, np.float32)
    steps[:] = rng.integers(-(2**63), 2**63 - 1, steps.size)  # among them what would be NaN as floats
    records = cuda_ops.gather(words, stride, np.arange(20), width=stride)
    copy = np.zeros_like(words)
    cuda_ops.scatter(copy, stride, np.arange(20), records)
    np.testing.assert_array_equal(copy.view(np.int64), steps)


def test_a_plain_matrix_with_an_odd_number_of_columns_will_do():
    matrix = np.arange(15, dtype=np.float32).reshape(5, 3)
    rows = cuda_ops.gather(matrix.reshape(-1), 3, np.array([4, 0]), width=3)
    np.testing.assert_array_equal(rows, matrix[[4, 0]])


@pytest.mark.parametrize("bad", [-1, 5, 2**62, -(2**63)])
def test_a_slot_outside_is_an_error_before_anything_is_written(bad):
    words = np.zeros(20)
    slots = np.array([0, 4, bad, 1])
    with pytest.raises(IndexError, match=rf"slots\[2\] is {bad}, which is not in \[0, 5\)"):
        cuda_ops.scatter(words, 4, slots, np.ones((4, 2)))
    assert not words.any()
    with pytest.raises(IndexError, match=r"slots\[2\]"):
        cuda_ops.gather(words, 4, slots, np.ones((4, 2)))


def test_an_empty_store_has_no_slot():
    with pytest.raises(IndexError, match=r"not in \[0, 0\)"):
        cuda_ops.gather(np.empty(0), 4, np.array([0]), width=2)
    assert cuda_ops.gather(np.empty(0), 4, np.empty(0, np.int64), width=2).shape == (0, 2)


def test_positions_outside_are_an_error():
    with pytest.raises(IndexError, match=r"positions\[1\] is 2, which is not in \[0, 2\)"):
        cuda_ops.gather(np.zeros(8), 4, np.array([0, 1]), np.zeros((2, 3)), np.array([0, 2]))


BAD_SHAPES = [
    (dict(out=np.zeros((3, 2))), "3 rows for 2 slots; pass positions"),
    (dict(out=np.zeros((2, 5))), r"words \[0, 5\) do not lie in a record of 4 words"),
    (dict(out=np.zeros((2, 2)), offset=3), r"words \[3, 5\)"),
    (dict(out=np.zeros((2, 2)), offset=-1), r"words \[-1, 1\)"),
    (dict(out=np.zeros((4, 2))[::2]), "out must be contiguous"),
    (dict(out=np.zeros((2, 2)), positions=np.array([0])), "1 positions given for 2 slots"),
    (dict(), "pass out"),
]


@pytest.mark.parametrize("arguments, message", BAD_SHAPES)
def test_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        cuda_ops.gather(np.zeros(8), 4, np.array([0, 1]), **arguments)


def test_dtypes_that_do_not_fit():
    with pytest.raises(TypeError, match="out must be float64, got float32"):
        cuda_ops.gather(np.zeros(8), 4, np.array([0]), np.zeros((1, 2), np.float32))
    with pytest.raises(TypeError, match="words must be float32, float64, float16 or bfloat16, got int64"):
        cuda_ops.gather(np.zeros(8, np.int64), 4, np.array([0]), width=1)
    with pytest.raises(ValueError, match="stride must be a positive number of words, got 0"):
        cuda_ops.gather(np.zeros(8), 0, np.array([0]), width=1)
