"""When an owner should send rows to the ranks that asked for them: bookkeeping of known touches, and what is due."""

import numpy as np

from cuda_ops.cpu.holds import BEFORE, LATEST, WORDS
from cuda_ops.cpu.kernels import ROWS_AHEAD, kernel, prefetch

_NEVER = np.iinfo(np.int64).max


def note_touches(book, slots, version):
    """Note that `slots` will be touched at `version` and return from which version each is left alone until then.

    For every slot the two latest distinct versions at which somebody is known to touch it are kept, plus one,
    so that zeroed memory means "never". Versions may come in any order.

    Args:
        book: [slots of the store, 8] int32 (see holds.py), updated in place.
        slots: [n] int64, distinct.
        version: int, the version at which the rows are used (and then touched).

    Returns:
        due: [n] int64, the version after the last known touch before `version`; 0 where there is none, and
            `version` itself where it is no longer known.
    """
    due = np.empty(slots.size, np.int64)
    _note_touches(book.reshape(-1), slots, version, due)
    return due


def select_due(steps, stride_bytes, slots, sent_at, due, version, always):
    """Return the positions of rows to send at `version`, and note in `sent_at` that they were.

    A row is up to date where it was sent at or after its last update. Of the others, all are selected if
    `always`. If not, those are selected that are `due` by now, and are not due again: a row that somebody
    touches after all is sent once in vain, not after every touch, and records need not be read.

    Args:
        steps, stride_bytes: the last-step words, as in `last_steps`.
        slots: [n] int64.
        sent_at: [n] int64, version at which each row was last sent, -1 for never; updated in place.
        due: [n] int64, from `note_touches`; updated in place.
        version: int, the version that the store is at.
        always: bool.

    Returns:
        positions: int64, ascending.
    """
    positions = np.empty(slots.size, np.int64)
    count = _select_due(steps, stride_bytes // 8, slots, sent_at, due, version, always, positions)
    return positions[:count]


@kernel
def _note_touches(book, slots, version, due):
    mark = np.int32(version + 1)
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(book, WORDS * slots[i + ROWS_AHEAD])
        at = WORDS * slots[i]
        latest, before = book[at + LATEST], book[at + BEFORE]
        if latest < mark:
            due[i] = latest
            book[at + BEFORE] = latest
            book[at + LATEST] = mark
        elif before < mark:
            due[i] = before
            if mark < latest:
                book[at + BEFORE] = mark
        else:  # touched more than once between: wait until the rows are needed
            due[i] = version


@kernel
def _select_due(steps, record_longs, slots, sent_at, due, version, always, positions):
    count = 0
    for i in range(slots.size):
        if always:
            if i + ROWS_AHEAD < slots.size and sent_at[i + ROWS_AHEAD] >= 0:
                prefetch(steps, (slots[i + ROWS_AHEAD] + 1) * record_longs - 1)
            if sent_at[i] >= 0 and sent_at[i] >= steps[(slots[i] + 1) * record_longs - 1]:
                continue
        elif due[i] > version:
            continue
        else:
            due[i] = _NEVER
        sent_at[i] = version
        positions[count] = i
        count += 1
    return count
