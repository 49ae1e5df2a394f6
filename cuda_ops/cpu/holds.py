"""Which ranks need a record, when it is used, and by whom it was: what an owner notes of it, in one line of memory.

A book is `[slots, 8]` int32. For the holds of a slot it has their number n, the sum of their ranks s, the sum of the
squares q: the sum of (rank - r)^2 over the holds is q - 2 r s + r^2 n, and zero exactly where all of them are rank r's.
Three numbers a slot tell it, whatever the number of ranks. Sums may wrap around: they are compared modulo 2^32, which
is more than they can be with fewer than a million holds of 64 ranks. The fourth word is not used here, then come the
two latest touches (see schedule.py), and a run of uses by one rank alone (see `select_moves`).
"""

import numpy as np

from cuda_ops.cpu.checks import in_range, int_vector, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, helper, kernel, prefetch

WORDS = 8
LATEST, BEFORE, _RUN, _BY = 4, 5, 6, 7


def add_holds(book, slots, rank, count):
    """Add `count` holds of `rank` to each slot; a negative `count` takes them back.

    Args:
        book: [slots of the store, 8] int32, updated in place.
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


def has_count(book, slots, count):
    """Return for each slot whether its number of holds is `count`: bool [n].

    Args:
        book, slots: as in `add_holds`.
        count: int.

    Raises:
        IndexError: a slot is outside the book.
    """
    slots = _checked(book, slots)
    same = np.empty(slots.size, np.bool_)
    _has_count(book.reshape(-1), slots, np.int32(count), same)
    return same


def select_moves(book, slots, rank, version, needed):
    """Return for each slot whether its record should move to `rank`, and note those uses of `rank` alone.

    A record should where `rank` alone holds it, and either has `needed` holds, which are uses ahead, or has used it as
    often before, with no touch by anybody between these uses, each of which was noted here. (To move a record once as
    many uses have been paid for as cost what a move does is competitive with whoever knows the future: Black and
    Sleator 1989 on the migration of pages.)

    Args:
        book: as in `add_holds`; its runs are updated in place where `rank` alone holds the slot: (the last use of a
            run, as a touch; its rank * 256 + the number of its uses, at most 255). Zeros: no run.
        slots, rank: as in `held_by_one`.
        version: int, at which `rank` uses the slots now.
        needed: int >= 1.

    Returns:
        moves: bool [n].
        counts: int64 [3]: how many of the slots `rank` alone holds and has not been asked about at this version; of
            how many of these a run was known; and how many of those runs go on.

    Raises:
        IndexError: a slot is outside the book.
    """
    slots = _checked(book, slots)
    moves, counts = np.empty(slots.size, np.bool_), np.empty(3, np.int64)
    _select_moves(book.reshape(-1), slots, np.int32(rank), version, needed, moves, counts)
    return moves, counts


def _checked(book, slots):
    writable(book, "book", np.int32, (len(book), WORDS))
    slots = int_vector(slots, "slots")
    in_range(slots, len(book), "slots")
    return slots


@kernel
def _add_holds(book, slots, rank, count):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, WORDS * slots[i + ROWS_AHEAD])
        at = WORDS * slots[i]
        book[at] += count
        book[at + 1] += count * rank
        book[at + 2] += count * rank * rank


@kernel
def _held_by_one(book, slots, rank, alone):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, WORDS * slots[i + ROWS_AHEAD])
        alone[i] = _is_held_by_one(book, WORDS * slots[i], rank)


@kernel
def _has_count(book, slots, count, same):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, WORDS * slots[i + ROWS_AHEAD])
        same[i] = book[WORDS * slots[i]] == count


@helper
def _is_held_by_one(book, at, rank):
    apart = np.int64(book[at + 2]) - 2 * np.int64(rank) * book[at + 1] + np.int64(rank) * rank * book[at]
    return (apart & 0xFFFFFFFF) == 0


@kernel
def _select_moves(book, slots, rank, version, needed, moves, counts):
    mark = np.int32(version + 1)
    looked, known, repeated = 0, 0, 0
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, WORDS * slots[i + ROWS_AHEAD])
        at = WORDS * slots[i]
        moves[i] = False
        if not _is_held_by_one(book, at, rank):
            continue
        last = book[at + BEFORE] if book[at + LATEST] == mark else book[at + LATEST]
        run, by, length = book[at + _RUN], book[at + _BY] >> 8, book[at + _BY] & 255
        earlier = 0
        if run == mark and by == rank:  # asked before
            earlier = length - 1
        else:
            looked += 1
            known += run > 0
            if run > 0 and run == last and by == rank:
                repeated += 1
                earlier = length
        moves[i] = book[at] >= needed or earlier >= needed
        book[at + _RUN] = mark
        book[at + _BY] = (rank << 8) | min(earlier + 1, 255)
    counts[0], counts[1], counts[2] = looked, known, repeated
