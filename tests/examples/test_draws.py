"""Draws that are a hash of what they are for: even, independent, and the same whoever asks."""

import numpy as np
import pytest
from draws import Weighted, integers, uniform, zipf_weights


@pytest.mark.parametrize("seed", [0, 1, -5, 2**70])
def test_a_draw_depends_on_its_counters_alone(seed):
    samples, draws = np.random.default_rng(1).integers(0, 1 << 40, 50), np.arange(7)
    whole = uniform(seed, 3, samples[:, None], draws)
    assert whole.shape == (50, 7) and whole.min() >= 0 and whole.max() < 1
    parts = [uniform(seed, 3, part[:, None], draws) for part in np.array_split(samples, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(uniform(seed, 3, samples, 4), whole[:, 4])
    assert len(np.unique(np.stack([whole, uniform(seed, 4, samples[:, None], draws)]))) == 700
    assert len(np.unique(np.stack([whole, uniform(seed + 1, 3, samples[:, None], draws)]))) == 700


def test_neighbouring_counters_give_even_and_uncorrelated_numbers():
    """64 cells of 262,144 draws; chi-square with 63 degrees of freedom is above 140 once in ten million times."""
    numbers = uniform(7, 0, np.arange(512)[:, None], np.arange(512))
    cells = np.bincount((numbers * 64).astype(int).ravel(), minlength=64)
    assert ((cells - 4096) ** 2 / 4096).sum() < 140
    for shifted, ours in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers.T, numbers)):
        assert abs(np.corrcoef(shifted.ravel(), ours.ravel())[0, 1]) < 0.02


def test_integers_reach_both_ends_and_no_further():
    drawn = integers(5, 0, np.arange(1000))
    assert drawn.dtype == np.int64 and sorted(set(drawn.tolist())) == [0, 1, 2, 3, 4]


def test_weighted_draws_follow_the_weights():
    weights = np.array([0.0, 3.0, 0.0, 1.0, 0.0])
    drawn = Weighted(weights).draw(uniform(0, np.arange(40_000)))
    assert np.bincount(drawn, minlength=5)[[0, 2, 4]].sum() == 0
    assert np.mean(drawn == 1) == pytest.approx(0.75, abs=0.015)  # 7 standard deviations
    assert Weighted(weights).draw(np.array([0.0, np.nextafter(1.0, 0.0)])).tolist() == [1, 3]
    for bad in (np.zeros(3), np.array([1.0, -1.0, 2.0]), np.empty(0), np.array([np.inf, 1.0])):
        with pytest.raises(ValueError, match="positive sum"):
            Weighted(bad)


def test_zipf_weights_are_powers():
    np.testing.assert_allclose(zipf_weights(3, 1.1), [1, 2**-1.1, 3**-1.1])
