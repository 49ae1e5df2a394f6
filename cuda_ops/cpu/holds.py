"""Which ranks need a record: sums from which one can tell whether they are all the same rank.

A book is `[slots, 4]` int32: for the holds of a slot their number n, the sum of their ranks s, the sum of the squares
q, and a word that is not used here. The sum of (rank - r)^2 over the holds is q - 2 r s + r^2 n, and zero exactly where
all of them are rank r's: three numbers a slot, whatever the number of ranks. Sums may wrap around: they are compared
modulo 2^32, which is more than they can be with fewer than a million holds of 64 ranks.
"""

import numpy as np

from cuda_ops.cpu.checks import in_range, int_vector, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, kernel, prefetch


def add_holds(book, slots, rank, count):
    """Add `count` holds of `rank` to each slot; a negative `count` takes them back.

    Args:
        book: [slots of the store, 4] int32, updated in place.
        slots: [n] int64, distinct.
        rank: int >= 0.
        count: int.

    Raises:
        IndexError: a slot is outside the book.
    """
    slots = _checked(book, slots)
    _add_holds(book.reshape(-1), slots, np.int32(rank), np.int32(count))


def held_by_one(book, slots, rank):
    """Return for each slot whether all its holds are those of `rank`: bool [n]; True also where there is none.

    Args:
        book, slots, rank: as in `add_holds`.

    Raises:
        IndexError: a slot is outside the book.
    """
    slots = _checked(book, slots)
    alone = np.empty(slots.size, np.bool_)
    _held_by_one(book.reshape(-1), slots, np.int32(rank), alone)
    return alone


def _checked(book, slots):
    writable(book, "book", np.int32, (len(book), 4))
    slots = int_vector(slots, "slots")
    in_range(slots, len(book), "slots")
    return slots


@kernel
def _add_holds(book, slots, rank, count):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, 4 * slots[i + ROWS_AHEAD])
        at = 4 * slots[i]
        book[at] += count
        book[at + 1] += count * rank
        book[at + 2] += count * rank * rank


@kernel
def _held_by_one(book, slots, rank, alone):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, 4 * slots[i + ROWS_AHEAD])
        at = 4 * slots[i]
        apart = np.int64(book[at + 2]) - 2 * np.int64(rank) * book[at + 1] + np.int64(rank) * rank * book[at]
        alone[i] = (apart & 0xFFFFFFFF) == 0
