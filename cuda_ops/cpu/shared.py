"""Records that several processes update in memory that they share, rows of which one of them makes the record, and
words by which they tell each other how far they are.

No update is lost: each record is locked while it is updated (`atomic.py`). Readers take no lock: they may see a record
of which an update is half done.
"""

import numpy as np

from cuda_ops.cpu.atomic import compare_and_swap, load_first, store_last
from cuda_ops.cpu.checks import in_range, int_vector, writable
from cuda_ops.cpu.kernels import kernel
from cuda_ops.cpu.sparse_update import rowwise_adagrad_records
from cuda_ops.cpu.update import adagrad_records, check_update, sgd_records

ABSENT, BEING_MADE, MADE = range(3)
"""States of a row."""


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


def claim_rows(states, rows):
    """Say that this caller makes the records of those `rows` that nobody has made or claimed.

    Args:
        states: [any] uint8 by row, `ABSENT`, `BEING_MADE` or `MADE`; others may be changing it.
        rows: [n] int64.

    Returns:
        [n] uint8: what each was before. `ABSENT` rows are this caller's now, which are `BEING_MADE` until
        `publish_rows`; those that were `BEING_MADE` are so by another.

    Raises:
        IndexError: a row is outside of `states`.
    """
    writable(states, "states", np.uint8, (states.size,))
    rows = int_vector(rows, "rows")
    in_range(rows, states.size, "rows")
    before = np.empty(rows.size, np.uint8)
    _claim(states, rows, before)
    return before


def publish_rows(states, rows, state):
    """Set the states of `rows` (int64 [n]), which this caller has claimed: what it has written before is seen by all
    that see them.

    Raises:
        IndexError: a row is outside of `states`.
    """
    writable(states, "states", np.uint8, (states.size,))
    rows = int_vector(rows, "rows")
    in_range(rows, states.size, "rows")
    _publish(states, rows, np.uint8(state))


@kernel
def _claim(states, rows, before):
    for i in range(rows.size):
        before[i] = compare_and_swap(states, np.uint64(rows[i]), np.uint8(ABSENT), np.uint8(BEING_MADE))


@kernel
def _publish(states, rows, state):
    for i in range(rows.size):
        store_last(states, np.uint64(rows[i]), state)


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
def _exchange_word(words, at, expected, word):
    return compare_and_swap(words, np.uint64(at), expected, word) == expected
