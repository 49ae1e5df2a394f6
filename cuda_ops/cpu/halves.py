"""Arithmetic of one element in half precision: to float32 and back, to the nearest or at random, and the random bits.

float16 is IEEE 754's binary16, bfloat16 the upper half of a float32. Kernels have both as int16, for neither NumPy nor
Numba has a bfloat16; `bfloat` says which is meant.

Rounding at random ("stochastic rounding", mode 1 of Croci, Fasi, Higham, Mary, Mikaitis, Royal Society Open Science
9:211631, 2022; in training: Gupta, Agrawal, Gopalakrishnan, Narayanan, ICML 2015): a value between two neighbours
becomes either with the probability that makes the mean right. Of the 32 random bits r, as many as the format drops
from a float32, s, are used: the upper neighbour in magnitude is taken where (dropped bits) + (r >> (32 - s)) >= 2^s,
which is exact for every value of at least 2^-32 of the distance between neighbours. What the nearest rounding keeps
finite stays finite.

The bits are word j % 4 of Philox 4x32-10 (philox.py) of the counter (key low, key high,
j // 4, version mod 2^32), for element j of the row of a key, at a step of a number, under the 64 bits of a seed:
whoever rounds that element at that step gets the same bits.
"""

import numpy as np

from cuda_ops.cpu.kernels import inlined
from cuda_ops.cpu.philox import philox

_LEAST_NORMAL = 0x38800000
"""The bits of 2^-14, the least float16 that is not subnormal, as a float32."""
TO_NEAREST = -1
"""In the place of random bits: round to the nearest, ties to even, as `torch.Tensor.to` does."""


@inlined
def bits_of(value):
    """The bits of a float32, as an uint32."""
    return np.float32(value).view(np.uint32)


@inlined
def float_of(bits):
    """The float32 of an uint32."""
    return np.uint32(bits).view(np.float32)


# Every result is cut to 32 bits, and there are choices in place of branches: so loops over elements become vectors.


@inlined
def widen(half, bfloat):
    """The float32 of a half, which is exact; `half` is its int16."""
    bits = np.uint32(np.uint16(half))
    if bfloat:
        return float_of(np.uint32(bits << np.uint32(16)))
    sign = np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))
    size = np.uint32(bits & np.uint32(0x7FFF))
    bias = np.uint32(0x70000000) if size >= np.uint32(0x7C00) else np.uint32(0x38000000)
    normal = np.uint32(np.uint32(size << np.uint32(13)) + bias)
    subnormal = bits_of(np.float32(np.int32(size)) * np.float32(2.0**-24))
    return float_of(np.uint32(sign | (subnormal if size < np.uint32(0x400) else normal)))


@inlined
def narrow(value, bfloat, random):
    """The half (its int16) of a float32: the nearest for `random` TO_NEAREST, else one of two by those 32 bits."""
    return to_nearest(value, bfloat) if random < 0 else at_random(value, bfloat, np.uint32(random))


@inlined
def to_nearest(value, bfloat):
    """The nearest half (its int16) of a float32, ties to even."""
    bits = bits_of(value)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if bfloat:
        odd = np.uint32(np.uint32(size >> np.uint32(16)) & np.uint32(1))
        half = np.uint32(np.uint32(np.uint32(size + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
    else:
        odd = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
        kept = np.uint32(max(size, np.uint32(_LEAST_NORMAL)) - np.uint32(112 << 23))
        normal = np.uint32(np.uint32(np.uint32(kept + np.uint32(0xFFF)) + odd) >> np.uint32(13))
        # The last place of a sum with one half is that of the subnormal halves: the addition rounds.
        small = float_of(min(size, np.uint32(_LEAST_NORMAL)))
        subnormal = np.uint32(bits_of(small + np.float32(0.5)) - np.uint32(0x3F000000))
        half = subnormal if size < np.uint32(_LEAST_NORMAL) else min(normal, np.uint32(0x7C00))
    return _with_sign(bits, size, half, bfloat)


@inlined
def at_random(value, bfloat, random):
    """One of the two halves (its int16) around a float32, by 32 random bits (uint32)."""
    bits = bits_of(value)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if bfloat:
        half = _up_or_down(size, np.uint32(16), random, np.uint32(0x7F80))
    else:
        kept = np.uint32(max(size, np.uint32(_LEAST_NORMAL)) - np.uint32(112 << 23))
        normal = min(_up_or_down(kept, np.uint32(13), random, np.uint32(0x7C00)), np.uint32(0x7C00))
        # In places of the subnormal halves: whole ones, and the rest in parts of 2^-32, to which the bits are added.
        places = float_of(min(size, np.uint32(_LEAST_NORMAL))) * np.float32(2.0**24)
        whole = np.int32(places)
        rest = np.uint32((places - np.float32(whole)) * np.float32(2.0**32))
        both = np.uint32(np.uint32(rest & random) & np.uint32(1))
        halved = np.uint32(np.uint32(rest >> np.uint32(1)) + np.uint32(random >> np.uint32(1)))
        carry = np.uint32(np.uint32(halved + both) >> np.uint32(31))  # of rest + random
        half = np.uint32(np.uint32(whole) + carry) if size < np.uint32(_LEAST_NORMAL) else normal
    return _with_sign(bits, size, half, bfloat)


@inlined
def _up_or_down(kept, dropped, random, infinity):
    """`kept` / 2^dropped, rounded by the leading bits of `random`; infinity only where the nearest is that too."""
    down = np.uint32(kept >> dropped)
    up = np.uint32(np.uint32(kept + np.uint32(random >> np.uint32(np.uint32(32) - dropped))) >> dropped)
    middle = np.uint32(np.uint32(1) << np.uint32(dropped - np.uint32(1)))
    rest = np.uint32(kept - np.uint32(down << dropped))
    return down if up == infinity and rest < middle else up


@inlined
def _with_sign(bits, size, half, bfloat):
    """The int16 of a half without its sign, of a float32 of those bits; a NaN where that is one."""
    if size > np.uint32(0x7F800000):
        half = np.uint32(0x7FC0) if bfloat else np.uint32(0x7E00)
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.int16(np.uint16(np.uint32(sign | half)))


@inlined
def random_words(key, block, version, seed):
    """Four words of 32 random bits (int64) for elements 4 * block to 4 * block + 3 of the row of `key`; all int64."""
    seed = np.uint64(seed)
    w0, w1, w2, w3 = philox(np.uint64(key), np.uint64(block), np.uint64(version), seed, seed >> np.uint64(32))
    return np.int64(w0), np.int64(w1), np.int64(w2), np.int64(w3)


@inlined
def word_at(words, k):
    """Word k of four; a choice, where an index would put them into memory."""
    if k < 2:
        return words[0] if k == 0 else words[1]
    return words[2] if k == 2 else words[3]
