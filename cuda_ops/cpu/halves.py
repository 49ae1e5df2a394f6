"""Arithmetic of one element in half precision: to float32 and back, to the nearest or at random, and the random bits.

float16 is IEEE 754's binary16, bfloat16 the upper half of a float32. Kernels have both as int16, for neither NumPy nor
Numba has a bfloat16; `bfloat` says which is meant.

Rounding at random ("stochastic rounding", mode 1 of Croci, Fasi, Higham, Mary, Mikaitis, Royal Society Open Science
9:211631, 2022; in training: Gupta, Agrawal, Gopalakrishnan, Narayanan, ICML 2015): a value between two neighbours
becomes either with the probability that makes the mean right. Of the 32 random bits r, as many as the format drops
from a float32, s, are used: the upper neighbour in magnitude is taken where (dropped bits) + (r >> (32 - s)) >= 2^s,
which is exact for every value of at least 2^-32 of the distance between neighbours. What the nearest rounding keeps
finite stays finite.

The bits are word j % 4 of Philox 4x32-10 (see cuda_ops/init.py for its source) of the counter (key low, key high,
j // 4, version mod 2^32), for element j of the row of a key, at a step of a number, under the 64 bits of a seed:
whoever rounds that element at that step gets the same bits.
"""

import numpy as np

from cuda_ops.cpu.kernels import helper

TO_NEAREST = -1
"""In the place of random bits: round to the nearest, ties to even, as `torch.Tensor.to` does."""


@helper
def bits_of(value):
    """The bits of a float32, as an int64 in [0, 2^32)."""
    return np.int64(np.float32(value).view(np.int32)) & 0xFFFFFFFF


@helper
def float_of(bits):
    """The float32 of an int64 in [0, 2^32)."""
    return np.uint32(bits).view(np.float32)


@helper
def widen(half, bfloat):
    """The float32 of a half, which is exact; `half` is its int16."""
    bits = np.int64(half) & 0xFFFF
    if bfloat:
        return float_of(bits << 16)
    sign = (bits & 0x8000) << 16
    exponent, mantissa = (bits >> 10) & 0x1F, bits & 0x3FF
    if exponent == 0:
        small = bits_of(np.float32(mantissa) * np.float32(2.0**-24))
        return float_of(sign | small)
    if exponent == 31:
        return float_of(sign | 0x7F800000 | (mantissa << 13))
    return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13))


@helper
def narrow(value, bfloat, random):
    """The half (its int16) of a float32: the nearest for `random` TO_NEAREST, else one of two by those 32 bits."""
    bits = bits_of(value)
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    infinity = 0x7F80 if bfloat else 0x7C00
    if size > 0x7F800000:
        half = 0x7FC0 if bfloat else 0x7E00
    elif size == 0x7F800000 or (not bfloat and size >= 0x47800000):  # 65536
        half = infinity
    else:
        # The half is kept / 2^dropped, rounded: of the bits themselves, or of the mantissa where the half is subnormal.
        if bfloat:
            kept, dropped = size, 16
        elif size >= 0x38800000:  # 2^-14
            kept, dropped = size - (112 << 23), 13
        else:
            kept, dropped = (size & 0x7FFFFF) | 0x800000, 126 - (size >> 23)
            if dropped > 32:
                kept, dropped = kept >> min(dropped - 32, 31), 32
        half = kept >> dropped
        rest, middle = kept & ((1 << dropped) - 1), 1 << (dropped - 1)
        if random < 0:
            up = rest > middle or (rest == middle and (half & 1) == 1)
        else:
            up = rest + (random >> (32 - dropped)) >= 2 * middle
            if half + 1 == infinity:
                up = up and rest >= middle
        half += up
    return np.int16(np.uint16(sign | half))


@helper
def random_words(key, block, version, seed):
    """Four words of 32 random bits (int64) for elements 4 * block to 4 * block + 3 of the row of `key`; all int64."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1 = np.uint64(key) & mask, np.uint64(key) >> shift
    c2, c3 = np.uint64(block), np.uint64(version) & mask
    k0, k1 = np.uint64(seed) & mask, np.uint64(seed) >> shift
    for _ in range(10):
        product_0 = np.uint64(0xD2511F53) * c0
        product_1 = np.uint64(0xCD9E8D57) * c2
        c0 = (product_1 >> shift) ^ c1 ^ k0
        c1 = product_1 & mask
        c2 = (product_0 >> shift) ^ c3 ^ k1
        c3 = product_0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return np.int64(c0), np.int64(c1), np.int64(c2), np.int64(c3)


@helper
def word_at(words, k):
    """Word k of four; a choice, where an index would put them into memory."""
    if k < 2:
        return words[0] if k == 0 else words[1]
    return words[2] if k == 2 else words[3]
