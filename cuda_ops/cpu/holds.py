"""Which ranks need a record, when it is used, and by whom it was: what an owner notes of it, in one line of memory.

A book is `[slots, 8]` int32. For the holds of a slot it has their number n, the sum of their ranks s, the sum of the
squares q: the sum of (rank - r)^2 over the holds is q - 2 r s + r^2 n, and zero exactly where all of them are rank r's.
Three numbers a slot tell it, whatever the number of ranks. Sums may wrap around: they are compared modulo 2^32, which
is more than they can be with fewer than a million holds of 64 ranks. The fourth word is not used here; then come the
two latest touches (see schedule.py), and the run of uses by one rank that goes on: those with none by another between,
in the order in which they are announced. Of a run the rank is kept, and the stage: 0 is the first use of all, 1 the
first after another rank's, 2 the second of a run, 3 a later one.
"""

import numpy as np

from cuda_ops.cpu.checks import in_range, int_vector, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, helper, kernel, prefetch

WORDS = 8
LATEST, BEFORE, RUN = 4, 5, 6
STAGES = 4


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


def begin_holds(book, slots, rank, here, uses):
    """Add one hold of `rank` to each slot, which it is going to use, and note how runs go on.

    Args:
        book, slots, rank: as in `add_holds`; rank < 2^28.
        here: int, the rank whose book this is.
        uses: [ranks, 4, 3] int64, updated in place: of the runs by a rank at a stage, the number that were followed by
            a use of that rank, of `here`, and of others.

    Raises:
        IndexError: a slot is outside the book.
    """
    slots = _checked(book, slots)
    writable(uses, "uses", np.int64, (len(uses), STAGES, 3))
    _begin_holds(book.reshape(-1), slots, np.int32(rank), here, uses)


def select_moves(book, slots, rank, needed, stages):
    """Return for each slot whether its record should move to `rank`, which is about to use it.

    A record should where `rank` alone holds it, and has `needed` holds, which are uses ahead, or where its run is at
    one of `stages`.

    Args:
        book, slots, rank: as in `held_by_one`.
        needed: int >= 1.
        stages: [4] bool.

    Returns:
        moves: bool [n].

    Raises:
        IndexError: a slot is outside the book.
    """
    slots = _checked(book, slots)
    moves = np.empty(slots.size, np.bool_)
    _select_moves(book.reshape(-1), slots, np.int32(rank), needed, stages, moves)
    return moves


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
def _begin_holds(book, slots, rank, here, uses):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, WORDS * slots[i + ROWS_AHEAD])
        at = WORDS * slots[i]
        book[at] += 1
        book[at + 1] += rank
        book[at + 2] += rank * rank
        run, stage = book[at + RUN], 0
        if run > 0:
            of, before = (run - 1) // STAGES, (run - 1) % STAGES
            uses[of, before, 0 if of == rank else 1 if rank == here else 2] += 1
            stage = min(max(before, 1) + 1, STAGES - 1) if of == rank else 1
        book[at + RUN] = STAGES * rank + stage + 1


@kernel
def _select_moves(book, slots, rank, needed, stages, moves):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, WORDS * slots[i + ROWS_AHEAD])
        at = WORDS * slots[i]
        run = book[at + RUN] - 1
        is_wanted = book[at] >= needed or stages[run % STAGES if run // STAGES == rank else 1]
        moves[i] = is_wanted and _is_held_by_one(book, at, rank)
