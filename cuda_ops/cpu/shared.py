"""Records that several processes update in memory that they share, and words by which they tell each other how far they
are.

No update is lost: each record is locked while it is updated (`atomic.py`). Readers take no lock: they may see a record
of which an update is half done.
"""

import numpy as np

from cuda_ops.cpu.atomic import add_at_once, compare_and_swap, load_first, store_last
from cuda_ops.cpu.checks import writable
from cuda_ops.cpu.kernels import kernel
from cuda_ops.cpu.sparse_update import rowwise_adagrad_records
from cuda_ops.cpu.update import adagrad_records, check_update, sgd_records


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
