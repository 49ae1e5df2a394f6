"""Which holders of copies lack what others have changed: sets of ranks by slot of a record."""

import numpy as np

from cuda_ops.cpu.checks import in_range, int_vector
from cuda_ops.cpu.kernels import kernel

_BITS = 64


def mark_behind(slots, holders, behind, by):
    """Note that a rank has changed records: all other holders are behind.

    Args:
        slots: [n] int64; they may repeat.
        holders: [capacity, words] uint64: by slot the ranks that have a copy.
        behind: the same: the holders that lack changes. Updated.
        by: the rank; below 0: one that is no holder.

    Returns:
        The slots of which no holder was behind before, and one is now: int64 [k].

    Raises:
        IndexError: a slot is outside; nothing is changed.
    """
    slots = int_vector(slots, "slots")
    in_range(slots, len(holders), "slots")
    late = np.empty(slots.size, np.int64)
    return late[: _mark(slots, holders, behind, by, late)]


def take_behind(slots, behind, rank):
    """Return those of `slots` of which `rank` is behind, int64 [k], each once, and note that it is not any more.

    Args:
        slots: [n] int64; they may repeat.
        behind: see `mark_behind`. Updated.
        rank: a rank.

    Raises:
        IndexError: a slot is outside; nothing is changed.
    """
    slots = int_vector(slots, "slots")
    in_range(slots, len(behind), "slots")
    taken = np.empty(slots.size, np.int64)
    return taken[: _take(slots, behind, rank // _BITS, np.uint64(1 << rank % _BITS), taken)]


@kernel
def _mark(slots, holders, behind, by, late):
    count = 0
    for i in range(slots.size):
        slot = slots[i]
        was_empty, is_empty = True, True
        for word in range(holders.shape[1]):
            others = holders[slot, word]
            if by >= 0 and by // _BITS == word:
                others &= ~(np.uint64(1) << np.uint64(by % _BITS))
            was_empty &= behind[slot, word] == 0
            behind[slot, word] |= others
            is_empty &= behind[slot, word] == 0
        if was_empty and not is_empty:
            late[count] = slot
            count += 1
    return count


@kernel
def _take(slots, behind, word, bit, taken):
    count = 0
    for i in range(slots.size):
        if behind[slots[i], word] & bit != 0:
            behind[slots[i], word] &= ~bit
            taken[count] = slots[i]
            count += 1
    return count
