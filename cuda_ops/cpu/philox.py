"""Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random bits of a
counter, so that the bits of an element are known without those before it.

A row's bits are those of its blocks: 32-bit words 4 * b to 4 * b + 3 are the four of the counter (key low, key high,
b, version mod 2^32), `key` being whatever tells the row from others.
"""

import numpy as np

from cuda_ops.cpu.kernels import inlined, part

_BLOCKS_AT_ONCE = 512


@inlined
def philox(key, block, version, key0, key1):
    """The four 32-bit words (uint64) of the counter (key low, key high, block, version); all arguments uint64."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = key & mask, key >> shift, block & mask, version & mask
    k0, k1 = key0 & mask, key1 & mask
    for _ in range(10):
        product_0 = np.uint64(0xD2511F53) * c0
        product_1 = np.uint64(0xCD9E8D57) * c2
        c0 = (product_1 >> shift) ^ c1 ^ k0
        c1 = product_1 & mask
        c2 = (product_0 >> shift) ^ c3 ^ k1
        c3 = product_0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


def room_for(blocks):
    """Return what `fill_words` needs to make the words of some rows of `blocks` blocks, of as many as fill vectors.

    Returns:
        (words, counters): uint32 [4 * rows * blocks], uint64 [2, rows * blocks]; they fit into the first cache, unless
            one row does not.
    """
    rows = max(_BLOCKS_AT_ONCE // max(blocks, 1), 1)
    return np.empty(4 * rows * blocks, np.uint32), np.empty((2, rows * blocks), np.uint64)


@inlined
def fill_words(words, counters, keys, first, blocks, version, key0, key1):
    """Write the words of the rows of keys[first:], of as many as there is room for; return how many.

    The blocks of all rows are made in one loop, several side by side: 2.5 ns a block where one by one they took 10.

    Args:
        words, counters: of `room_for`, arguments of the kernel; row i's words are words[4 * (i - first) * blocks:].
        keys: [any] int64.
        blocks: int, of 4 words each, in a row; not zero.
        version, key0, key1: uint64.
    """
    room = counters.shape[1]
    count = min(room // blocks, keys.size - first)
    of_row, of_block = part(counters, 0, room), part(counters, room, room)
    at = np.uint64(0)
    for i in range(first, first + count):
        for block in range(blocks):
            of_row[at] = np.uint64(keys[i])
            of_block[at] = np.uint64(block)
            at += np.uint64(1)
    for t in range(count * blocks):
        u = np.uint64(t)
        word = np.uint64(4) * u
        w0, w1, w2, w3 = philox(of_row[u], of_block[u], version, key0, key1)
        words[word] = np.uint32(w0)
        words[word + np.uint64(1)] = np.uint32(w1)
        words[word + np.uint64(2)] = np.uint32(w2)
        words[word + np.uint64(3)] = np.uint32(w3)
    return count
