"""Records that several processes update in memory that they share, rows of which one of them makes the record, and
words by which they tell each other how far they are.

No update is lost: each record is locked while it is updated (`atomic.py`). Readers take no lock: they may see a record
of which an update is half done.
"""

import numpy as np

from cuda_ops.cpu.atomic import add_at_once, compare_and_swap, load_first, store_last
from cuda_ops.cpu.checks import in_range, int_vector, writable
from cuda_ops.cpu.kernels import kernel
from cuda_ops.cpu.sparse_update import rowwise_adagrad_records
from cuda_ops.cpu.update import adagrad_records, check_update, sgd_records

ABSENT, BEING_MADE = 0, -1
"""What a table of slots has for rows without a record; for others it has the slot of the record + 1."""


def sgd_update_shared(words, stride, dim, steps, slots, grad, lr, scale, version, first=0):
    """As `sgd_update`, from `slots[first]` on, in memory that others update so too; returns how many are done.

    These are all, unless another process has had a record for longer than an update takes: call it again from there.
    """
    slots, grad = check_update(words, stride, dim, 0, steps, slots, grad)
    return sgd_records(words, stride, steps, slots, grad, float(lr), float(scale), int(version), int(first), True)


def adagrad_update_shared(words, stride, dim, steps, slots, grad, clr, eps, scale, version, first=0):
    """As `adagrad_update`, in memory that others update too: see `sgd_update_shared`."""
    slots, grad = check_update(words, stride, dim, dim, steps, slots, grad)
    numbers = float(clr), float(eps), float(scale), int(version)
    return adagrad_records(words, stride, steps, slots, grad, *numbers, int(first), True)


def rowwise_adagrad_update_shared(words, stride, dim, steps, slots, grad, lr, eps, scale, version, first=0):
    """As `rowwise_adagrad_update`, in memory that others update too: see `sgd_update_shared`."""
    slots, grad = check_update(words, stride, dim, 1, steps, slots, grad)
    numbers = float(lr), float(eps), float(scale), int(version)
    return rowwise_adagrad_records(words, stride, steps, slots, grad, *numbers, int(first), True)


def claim_rows(table, rows):
    """Say that this caller makes the records of those `rows` that nobody has made or claimed.

    Args:
        table: [any] int32 by row, the slot of its record + 1, `ABSENT` or `BEING_MADE`; others may be changing it.
        rows: [n] int64.

    Returns:
        [n] int32: what each was before. `ABSENT` rows are this caller's now, which are `BEING_MADE` until
        `publish_rows`; those that were `BEING_MADE` are so by another.

    Raises:
        IndexError: a row is outside of `table`.
    """
    writable(table, "table", np.int32, (table.size,))
    rows = int_vector(rows, "rows")
    in_range(rows, table.size, "rows")
    before = np.empty(rows.size, np.int32)
    _claim(table, rows, before)
    return before


def publish_rows(table, rows, entries):
    """Set the entries (int32 [n]) of `rows` (int64 [n]), which this caller has claimed: what it has written before is
    seen by all that see them.

    Raises:
        IndexError: a row is outside of `table`.
        ValueError: there is not an entry for each.
    """
    writable(table, "table", np.int32, (table.size,))
    rows = int_vector(rows, "rows")
    in_range(rows, table.size, "rows")
    if entries.shape != rows.shape:
        raise ValueError(f"{entries.size} entries given for {rows.size} rows")
    _publish(table, rows, entries.astype(np.int32))


def store_word(words, at, word):
    """Set `words.reshape(-1)[at]` (int64) to `word`: what this caller has written before is seen by all that see it."""
    writable(words, "words", np.int64, words.shape)
    if not 0 <= at < words.size:
        raise IndexError(f"at is {at}; there are {words.size} words")
    _store_word(words.reshape(-1), at, word)


def all_reached(words, column, least):
    """Return whether words[:, column] (int64 [n, m]) are all at least `least`: what their writers have written before
    is seen from now on.
    """
    return bool(_all_reached(words, int(column), int(least)))


def add_to_word(words, at, number):
    """Add `number` to `words[at]` (int64 [n]), at once; return what it was."""
    return int(_add_to_word(words, int(at), int(number)))


def exchange_word(words, at, expected, word):
    """Set `words[at]` (int64 [n]) to `word` if it is `expected`, at once; return whether it was."""
    return bool(_exchange_word(words, int(at), int(expected), int(word)))


@kernel
def _store_word(words, at, word):
    store_last(words, np.uint64(at), np.int64(word))


@kernel
def _all_reached(words, column, least):
    flat = words.reshape(-1)
    width = words.shape[1]
    for i in range(len(words)):
        if load_first(flat, np.uint64(i * width + column)) < least:
            return False
    return True


@kernel
def _add_to_word(words, at, number):
    return add_at_once(words, np.uint64(at), number)


@kernel
def _exchange_word(words, at, expected, word):
    return compare_and_swap(words, np.uint64(at), expected, word) == expected


@kernel
def _claim(table, rows, before):
    for i in range(rows.size):
        before[i] = compare_and_swap(table, np.uint64(rows[i]), np.int32(ABSENT), np.int32(BEING_MADE))


@kernel
def _publish(table, rows, entries):
    for i in range(rows.size):
        store_last(table, np.uint64(rows[i]), entries[i])
