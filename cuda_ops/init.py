"""Row initialisation from a counter-based generator: the start of a row without the rows before it.

The bits of element `j` of row `r` are Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) of the counter (r, block of j) under a 64-bit key. So a value depends
on the key, the row and the element alone: rows may be asked in any order, number and repetition, anywhere.

Normal values are Wichura's inverse of the normal distribution function (AS 241, PPND16, Applied Statistics
37, 1988; relative error 1e-16) of one uniform each. That is preferred to Box and Muller's pairs because a
truncated normal is then the same transform of a narrower uniform, and because it needs nothing but +, *, /
and a square root, the tails' logarithm included: every IEEE machine gives the same bits, with any libm.

Shapes: `out_ND` float32 or float64 [rows asked, dim], any strides, written whole; `rows_N` int64 [rows
asked]. A float32 element takes 32 bits and a float64 element 64, so the two dtypes have unrelated values of
one distribution. Arithmetic is in float64, rounded once to the dtype of `out_ND`. Bytes moved: `out_ND` once.
"""

import math

import numpy as np

from cuda_ops.cpu.kernels import inlined, kernel, part
from cuda_ops.cpu.philox import fill_words, room_for
from cuda_ops.dispatch import by_device

_SHIFT32 = np.uint64(32)
_SHIFT24 = np.uint64(8)  # 32 bits to 24, the width of a float32 mantissa
_SHIFT53 = np.uint64(11)
_SHIFT52 = np.uint64(12)

_SQRT_HALF = math.sqrt(0.5)
_SQRT_TWO = math.sqrt(2.0)
_LOG_TWO = math.log(2.0)


@by_device
def fill_normal(out_ND, rows_N, key0: int, key1: int, mean: float, std: float) -> None:
    """Fill with independent normal values of `mean` and `std` (>= 0), within 8.3 std (6.4 in float32).

    `key0`, `key1`: the two 32-bit words of the key.
    """
    numbers = 0.0, 1.0, mean, std, -np.inf, np.inf
    _fill_normal(out_ND, rows_N, np.uint64(key0), np.uint64(key1), *numbers, *_room(out_ND))


@by_device
def fill_trunc_normal(out_ND, rows_N, key0: int, key1: int, mean: float, std: float, low: float, high: float) -> None:
    """Fill with normal values of `mean` and `std` (> 0) conditioned on [`low`, `high`].

    The bounds, rounded to the dtype of `out_ND`, are never exceeded. The conditioning is exact (inverse
    distribution function of a uniform between those of the bounds) until both bounds lie so deep in one tail
    that double precision cannot tell them apart (beyond about 38 std); there the nearer bound is the value.
    """
    numbers = truncation(mean, std, low, high, out_ND.dtype.type)
    if isinstance(numbers, float):
        out_ND[:] = numbers
    else:
        _fill_normal(out_ND, rows_N, np.uint64(key0), np.uint64(key1), *numbers, *_room(out_ND))


def truncation(mean, std, low, high, kind):
    """Return what a kernel needs to draw from a normal distribution cut to [low, high].

    Args:
        mean, std, low, high: as in fill_trunc_normal.
        kind: NumPy scalar type of the values.

    Returns:
        (start, width, mean, scale, low, high): the value is mean + scale * (normal quantile of start + width *
        uniform), cut to the bounds; or one float, where that is the only value.
    """
    if not (std > 0.0 and low <= high):
        raise ValueError(f"fill_trunc_normal needs std > 0 and low <= high, got std={std}, [{low}, {high}]")
    below, above = (low - mean) / std, (high - mean) / std
    # The distribution function keeps its relative precision in the lower tail only: mirror an interval of the
    # upper.
    sign = -1.0 if below > 0.0 else 1.0
    first, last = (-above, -below) if sign < 0.0 else (below, above)
    start, stop = _normal_cdf(first), _normal_cdf(last)
    if stop <= 0.0:
        return float(low if sign < 0.0 else high)
    return start, stop - start, mean, sign * std, float(kind(low)), float(kind(high))


@by_device
def fill_uniform(out_ND, rows_N, key0: int, key1: int, low: float, high: float) -> None:
    """Fill with independent values, uniform on 2**24 (float32) or 2**53 (float64) steps of [`low`, `high`].

    `low` is a possible value; `high` only by rounding, as in PyTorch.
    """
    _fill_uniform(out_ND, rows_N, np.uint64(key0), np.uint64(key1), low, high, *_room(out_ND))


def erfinv(values_ND) -> None:
    """Replace each value by its inverse error function, in place; outside [-1, 1] NaN, at the ends
    infinity."""
    _erfinv(values_ND)


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / _SQRT_TWO)


def _room(out_ND):
    """Return what a fill needs of blocks of four words, of 32 bits each."""
    return room_for((out_ND.shape[1] * out_ND.itemsize // 4 + 3) // 4)


@kernel
def _log(x):
    """Natural logarithm of a positive x by its series in (m - 1) / (m + 1), m the mantissa within sqrt(2) of
    1."""
    mantissa, exponent = math.frexp(x)
    if mantissa < _SQRT_HALF:
        mantissa *= 2.0
        exponent -= 1
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    series = 1.0 / 21.0
    series = series * z + 1.0 / 19.0
    series = series * z + 1.0 / 17.0
    series = series * z + 1.0 / 15.0
    series = series * z + 1.0 / 13.0
    series = series * z + 1.0 / 11.0
    series = series * z + 1.0 / 9.0
    series = series * z + 1.0 / 7.0
    series = series * z + 1.0 / 5.0
    series = series * z + 1.0 / 3.0
    series = series * z + 1.0
    return exponent * _LOG_TWO + 2.0 * s * series


@kernel
def _central_quantile(q):
    """AS 241 for |q| = |p - 0.5| <= 0.425; finite, and wrong, for every other p in [0, 1]."""
    r = 0.180625 - q * q
    above = 2.5090809287301226727e3
    above = above * r + 3.3430575583588128105e4
    above = above * r + 6.7265770927008700853e4
    above = above * r + 4.5921953931549871457e4
    above = above * r + 1.3731693765509461125e4
    above = above * r + 1.9715909503065514427e3
    above = above * r + 1.3314166789178437745e2
    above = above * r + 3.3871328727963666080e0
    below = 5.2264952788528545610e3
    below = below * r + 2.8729085735721942674e4
    below = below * r + 3.9307895800092710610e4
    below = below * r + 2.1213794301586595867e4
    below = below * r + 5.3941960214247511077e3
    below = below * r + 6.8718700749205790830e2
    below = below * r + 4.2313330701600911252e1
    below = below * r + 1.0
    return q * above / below


@kernel
def _tail_quantile(p):
    """AS 241 for p < 0.075: the (negative) normal quantile of p; minus infinity for p = 0."""
    if p <= 0.0:
        return -np.inf
    r = math.sqrt(-_log(p))
    if r <= 5.0:
        r -= 1.6
        above = 7.74545014278341407640e-4
        above = above * r + 2.27238449892691845833e-2
        above = above * r + 2.41780725177450611770e-1
        above = above * r + 1.27045825245236838258e0
        above = above * r + 3.64784832476320460504e0
        above = above * r + 5.76949722146069140550e0
        above = above * r + 4.63033784615654529590e0
        above = above * r + 1.42343711074968357734e0
        below = 1.05075007164441684324e-9
        below = below * r + 5.47593808499534494600e-4
        below = below * r + 1.51986665636164571966e-2
        below = below * r + 1.48103976427480074590e-1
        below = below * r + 6.89767334985100004550e-1
        below = below * r + 1.67638483018380384940e0
        below = below * r + 2.05319162663775882187e0
        below = below * r + 1.0
    else:
        r -= 5.0
        above = 2.01033439929228813265e-7
        above = above * r + 2.71155556874348757815e-5
        above = above * r + 1.24266094738807843860e-3
        above = above * r + 2.65321895265761230930e-2
        above = above * r + 2.96560571828504891230e-1
        above = above * r + 1.78482653991729133580e0
        above = above * r + 5.46378491116411436990e0
        above = above * r + 6.65790464350110377720e0
        below = 2.04426310338993978564e-15
        below = below * r + 1.42151175831644588870e-7
        below = below * r + 1.84631831751005468180e-5
        below = below * r + 7.86869131145613259100e-4
        below = below * r + 1.48753612908506148525e-2
        below = below * r + 1.36929880922735805310e-1
        below = below * r + 5.99832206555887937690e-1
        below = below * r + 1.0
    return -above / below


@inlined
def _bits_of_two(words, j):
    """Element j's 64 random bits."""
    return np.uint64(words[2 * j]) | (np.uint64(words[2 * j + 1]) << _SHIFT32)


@inlined
def _open_uniforms(words, uniforms, itemsize):
    """Turn words into uniforms strictly inside (0, 1), exact in float64 and symmetric about one half."""
    if itemsize == 4:
        for j in range(len(uniforms)):
            uniforms[j] = (np.float64(np.int64(words[j])) + 0.5) * 2.0**-32
    else:
        for j in range(len(uniforms)):
            uniforms[j] = (np.float64(np.int64(_bits_of_two(words, j) >> _SHIFT52)) + 0.5) * 2.0**-52


@kernel
def _fill_normal(out_ND, rows_N, key0, key1, start, width, mean, scale, low, high, random, counters):
    """Fill with mean + scale * (normal quantile of a uniform on [start, start + width]), cut to [low,
    high]."""
    dim = out_ND.shape[1]
    blocks = (dim * (out_ND.itemsize // 4) + 3) // 4
    p_D = np.empty(dim, np.float64)
    z_D = np.empty(dim, np.float64)
    drawn = first = 0
    for i in range(len(rows_N)):
        if i == drawn:
            first = i
            drawn += fill_words(random, counters, rows_N, i, blocks, np.uint64(0), key0, key1)
        _open_uniforms(part(random, 4 * (i - first) * blocks, 4 * blocks), p_D, out_ND.itemsize)
        # Two passes: the first, for most elements, has no branch and vectorises; the second mends the tails.
        for j in range(dim):
            p_D[j] = start + width * p_D[j]
            z_D[j] = _central_quantile(p_D[j] - 0.5)
        for j in range(dim):
            if p_D[j] < 0.075:
                z_D[j] = _tail_quantile(p_D[j])
            elif p_D[j] > 0.925:
                z_D[j] = -_tail_quantile(1.0 - p_D[j])
        for j in range(dim):
            out_ND[i, j] = min(max(mean + scale * z_D[j], low), high)


@kernel
def _fill_uniform(out_ND, rows_N, key0, key1, low, high, random, counters):
    dim = out_ND.shape[1]
    blocks = (dim * (out_ND.itemsize // 4) + 3) // 4
    width = high - low
    drawn = first = 0
    for i in range(len(rows_N)):
        if i == drawn:
            first = i
            drawn += fill_words(random, counters, rows_N, i, blocks, np.uint64(0), key0, key1)
        words = part(random, 4 * (i - first) * blocks, 4 * blocks)
        if out_ND.itemsize == 4:
            for j in range(dim):
                out_ND[i, j] = low + width * (np.float64(np.int32(words[j] >> _SHIFT24)) * 2.0**-24)
        else:
            for j in range(dim):
                out_ND[i, j] = low + width * (np.float64(np.int64(_bits_of_two(words, j) >> _SHIFT53)) * 2.0**-53)


@kernel
def _erfinv(values_ND):
    for i in range(values_ND.shape[0]):
        for j in range(values_ND.shape[1]):
            y = np.float64(values_ND[i, j])
            if abs(y) <= 0.85:
                z = _central_quantile(0.5 * y)
            elif abs(y) <= 1.0:
                z = math.copysign(_tail_quantile(0.5 * (1.0 - abs(y))), y)
            else:
                z = np.nan
            values_ND[i, j] = z / _SQRT_TWO
