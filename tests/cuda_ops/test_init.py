"""Row initialisation: the generator's published vectors, the distributions, and values that depend on nothing
else."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ops import init
from cuda_ops.cpu.philox import fill_words, room_for

DTYPES = ("float32", "float64")
FILLS = {
    "normal": lambda out_ND, rows_N, key: init.fill_normal(out_ND, rows_N, *key, -0.5, 2.0),
    "uniform": lambda out_ND, rows_N, key: init.fill_uniform(out_ND, rows_N, *key, -3.0, 5.0),
    "trunc_normal": lambda out_ND, rows_N, key: init.fill_trunc_normal(out_ND, rows_N, *key, 0.5, 1.0, -1, 3.0),
}


def filled(name, rows_N, dim, dtype="float32", key=(1, 2)):
    out_ND = np.full((len(rows_N), dim), np.nan, dtype)
    FILLS[name](out_ND, np.asarray(rows_N, np.int64), key)
    return out_ND


def philox(counter, key):
    """Philox 4x32-10 in plain Python."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def largest_gap(sample, cdf):
    """Kolmogorov's statistic times the root of the sample size: above 1.95 in one run of a thousand."""
    sample = np.sort(sample.ravel().astype(np.float64))
    expected = np.array([cdf(x) for x in sample])
    steps = np.arange(len(sample) + 1) / len(sample)
    gap = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    return gap * math.sqrt(len(sample))


def test_reference_gives_the_published_vectors():
    # Known answers of the authors' library, Random123.
    assert philox((0,) * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30),
    *[st.integers(0, 2**32 - 1)] * 3,
    st.one_of(st.integers(1, 9), st.integers(60, 300)),
)
@settings(deadline=None, max_examples=50)
def test_words_are_philox_of_row_and_block(rows, version, key0, key1, blocks):
    keys = np.array(rows, np.int64)
    words, counters = room_for(blocks)
    first = 0
    while first < len(rows):
        numbers = np.uint64(version), np.uint64(key0), np.uint64(key1)
        count = fill_words(words, counters, keys, first, blocks, *numbers)
        assert 1 <= count <= len(rows) - first
        made = words.reshape(-1, blocks, 4)
        for i in range(count):
            low, high = rows[first + i] % 2**32, rows[first + i] % 2**64 >> 32
            for block in {0, 1, blocks - 1} & set(range(blocks)):
                assert made[i, block].tolist() == philox((low, high, block, version), (key0, key1))
        first += count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILLS)
@given(
    rows=st.lists(st.integers(0, 2**62), max_size=20),
    dim=st.integers(1, 70),
    key=st.tuples(*[st.integers(0, 9)] * 2),
)
@settings(deadline=None, max_examples=25)
def test_a_row_does_not_depend_on_the_rows_asked_with_it(name, dtype, rows, dim, key):
    together_ND = filled(name, rows, dim, dtype, key)
    assert not np.isnan(together_ND).any()
    for row, values_D in zip(rows, together_ND, strict=True):
        assert np.array_equal(filled(name, [row], dim, dtype, key)[0], values_D)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILLS)
def test_a_narrower_table_has_the_same_first_elements(name, dtype):
    rows = np.arange(50)
    wide_ND = filled(name, rows, 37, dtype)
    for dim in (1, 2, 3, 4, 5, 36):
        assert np.array_equal(filled(name, rows, dim, dtype), wide_ND[:, :dim])


@pytest.mark.parametrize("name", FILLS)
def test_strided_output_and_rows(name):
    rows = np.arange(20)[::2]
    frame = np.zeros((10, 33), np.float32)
    FILLS[name](frame[:, 5:30:2], rows, (1, 2))
    assert np.array_equal(frame[:, 5:30:2], filled(name, rows.copy(), 13))
    assert not frame[:, 30:].any() and not frame[:, :5].any() and not frame[:, 6:30:2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions(dtype):
    rows = np.arange(700)
    low, high = normal_cdf(-1.5), normal_cdf(2.5)
    expected = {
        "normal": lambda x: normal_cdf((x + 0.5) / 2.0),
        "uniform": lambda x: (x + 3.0) / 8.0,
        "trunc_normal": lambda x: (normal_cdf(x - 0.5) - low) / (high - low),
    }
    for name, cdf in expected.items():
        assert largest_gap(filled(name, rows, 30, dtype), cdf) < 1.95, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_are_independent(dtype):
    sample_ND = filled("normal", np.arange(2000), 32, dtype, key=(7, 0))
    others = (
        np.roll(sample_ND, 1, axis=0),
        np.roll(sample_ND, 1, axis=1),
        filled("normal", np.arange(2000), 32, dtype, key=(7, 1)),
        filled("normal", np.arange(2000) + (1 << 32), 32, dtype, key=(7, 0)),
    )
    for other_ND in others:
        correlation = np.corrcoef(sample_ND.ravel(), other_ND.ravel())[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(sample_ND.size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (0.1, 0.3), (4.0, 7.0), (-9.0, -6.0), (1.0, 1.0), (-1.0, np.inf)])
def test_truncation_keeps_its_bounds_and_its_distribution(dtype, bounds):
    low, high = bounds
    out_ND = np.empty((300, 30), dtype)
    init.fill_trunc_normal(out_ND, np.arange(300), 3, 4, 0.0, 1.0, low, high)
    kind = out_ND.dtype.type
    assert out_ND.min() >= kind(low) and out_ND.max() <= kind(high)
    if low < high:
        # The upper tail is computed mirrored, where it keeps its digits.
        mirror = -1.0 if low > 0.0 else 1.0
        first, last = sorted((normal_cdf(mirror * low), normal_cdf(mirror * high)))
        assert largest_gap(mirror * out_ND, lambda x: (normal_cdf(x) - first) / (last - first)) < 1.95


def test_bounds_beyond_double_precision_give_the_nearer_one():
    out_ND = np.empty((3, 4), np.float32)
    init.fill_trunc_normal(out_ND, np.arange(3), 0, 0, 0.0, 1.0, 50.0, 60.0)
    assert (out_ND == 50.0).all()
    init.fill_trunc_normal(out_ND, np.arange(3), 0, 0, 0.0, 1.0, -60.0, -50.0)
    assert (out_ND == -50.0).all()


@pytest.mark.parametrize("arguments", [(0.0, 0.0, -1.0, 1.0), (0.0, -1.0, -1.0, 1.0), (0.0, 1.0, 2.0, 1.0)])
def test_truncation_refuses_what_has_no_meaning(arguments):
    with pytest.raises(ValueError, match="std > 0"):
        init.fill_trunc_normal(np.empty((1, 1)), np.zeros(1, np.int64), 0, 0, *arguments)


def test_quantiles_agree_with_the_standard_library():
    plain = NormalDist()
    for p in (1e-300, 1e-100, 1e-20, 1e-9, 1e-3, 0.02, 0.0749, 0.0751, 0.3, 0.5, 0.7, 0.9249):
        got = init._tail_quantile(p) if p < 0.075 else init._central_quantile(p - 0.5)
        assert got == pytest.approx(plain.inv_cdf(p), rel=4e-15, abs=1e-16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_error_function(dtype):
    x_ND = np.linspace(-3.0, 3.0, 61).reshape(1, -1)
    y_ND = np.vectorize(math.erf)(x_ND).astype(dtype)
    exact_ND = np.array([[NormalDist().inv_cdf((float(y) + 1.0) / 2.0) / math.sqrt(2.0) for y in y_ND[0]]])
    got_ND = y_ND.copy()
    init.erfinv(got_ND)
    assert np.allclose(got_ND, exact_ND, rtol=2e-7 if dtype == "float32" else 1e-11, atol=1e-15)
    ends_ND = np.array([[-1.0, 1.0, 1.5, np.nan]], dtype)
    init.erfinv(ends_ND)
    assert ends_ND[0, :2].tolist() == [-np.inf, np.inf] and np.isnan(ends_ND[0, 2:]).all()


def test_degenerate_widths():
    rows = np.arange(4)
    out_ND = np.empty((4, 3), np.float32)
    init.fill_normal(out_ND, rows, 1, 2, 7.0, 0.0)
    assert (out_ND == 7.0).all()
    init.fill_uniform(out_ND, rows, 1, 2, 2.0, 2.0)
    assert (out_ND == 2.0).all()
    assert filled("normal", [], 5).shape == (0, 5)
