"""Sums of pieces: in their order, with their scales, divided by frequencies where those count."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pm.pieces import Piece, Summing
from tests.pm.oracle import some_rows

SUMMING = Summing()  # one for all examples: what it keeps from call to call must not show


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "float64"]), st.booleans())
def test_sums_equal_a_dense_sum_to_the_bit(seed, dtype, scales_differ):
    rng = np.random.default_rng(seed)
    dim, most = int(rng.integers(1, 6)), int(rng.integers(1, 40))
    pieces = []
    for _ in range(rng.integers(1, 6)):
        slots = some_rows(rng, most)
        scale = float(rng.choice([0.5, 1.0, 2.0])) if scales_differ else 0.5
        pieces.append(Piece(slots, rng.standard_normal((len(slots), dim)).astype(dtype), scale, 0, None))
    kept = [(piece.slots.copy(), piece.values.copy()) for piece in pieces]
    slots, total, scale = SUMMING.combine(pieces, dim)
    expected = np.zeros((most, dim), dtype)
    for piece in pieces:
        expected[piece.slots] += piece.values * piece.values.dtype.type(piece.scale)
    everyone = sorted({slot for piece in pieces for slot in piece.slots.tolist()})
    assert sorted(slots.tolist()) == everyone
    np.testing.assert_array_equal(total * total.dtype.type(scale), expected[slots])
    assert total.dtype == dtype
    for piece, (before, values) in zip(pieces, kept, strict=True):
        np.testing.assert_array_equal(piece.slots, before)
        np.testing.assert_array_equal(piece.values, values)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_each_lookup_is_divided_by_its_own_frequencies_over_all_ranks(seed):
    rng = np.random.default_rng(seed)
    most, dim = int(rng.integers(1, 30)), 3
    pieces, expected = [], np.zeros((most, dim))
    for ordinal in range(rng.integers(1, 4)):
        summed, often = np.zeros((most, dim)), np.zeros(most)
        for _ in range(rng.integers(1, 4)):
            slots = some_rows(rng, most)
            counts = rng.integers(0, 4, len(slots))
            values = rng.standard_normal((len(slots), dim)) * (counts > 0)[:, None]
            pieces.append(Piece(slots, values, 0.25, ordinal + 1, counts))
            summed[slots] += 0.25 * values
            often[slots] += counts
        expected += summed / np.maximum(often, 1)[:, None]
    plain = some_rows(rng, most)
    pieces.insert(
        int(rng.integers(len(pieces) + 1)), Piece(plain, rng.standard_normal((len(plain), dim)), 2.0, 0, None)
    )
    (added,) = [piece for piece in pieces if piece.counts is None]
    expected[plain] += 2.0 * added.values
    slots, total, scale = SUMMING.combine(pieces, dim)
    result = np.zeros((most, dim))
    result[slots] = total * scale
    assert len(set(slots.tolist())) == len(slots)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)
