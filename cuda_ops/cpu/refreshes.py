"""Which holders of copies are sent what others have changed: sets of ranks by slot of a record, looked at once."""

import numpy as np

from cuda_ops.cpu.checks import in_range, int_vector
from cuda_ops.cpu.kernels import kernel

_BITS = 64


def select_refreshes(slots, holders, changed_by, behind, ranks, everyone):
    """Return who is to be sent which records, and note that it is.

    A holder of a copy is behind once another rank has changed the record. It is sent the record if it has changed its
    copy itself (who changes a copy uses it, and may use it again), or if `everyone` is who is behind.

    Args:
        slots: [n] int64, of records that have changed or of which a holder is behind; they may repeat.
        holders: [capacity, words] uint64: the ranks that have a copy.
        changed_by: the same: whose changes have not been looked at. Emptied.
        behind: the same: the holders that lack changes, not those of `changed_by`. Updated.
        ranks: how many there are. (Sets may have further members, as one that has all bits.)
        everyone: whether all holders are sent what they lack.

    Returns:
        (slots int64 [m], those for each rank together, ranks ascending; where each begins, and m, int64 [ranks + 1];
        and the slots of which a holder is behind since now, int64 [k]).

    Raises:
        IndexError: a slot is outside; nothing is changed.
    """
    slots = int_vector(slots, "slots")
    in_range(slots, len(holders), "slots")
    sent_to = np.empty((slots.size, holders.shape[1]), np.uint64)
    starts, late = np.zeros(ranks + 1, np.int64), np.empty(slots.size, np.int64)
    count = _select(slots, holders, changed_by, behind, everyone, sent_to, starts, late)
    starts = np.cumsum(starts)
    selected = np.empty(starts[-1], np.int64)
    _fill(slots, sent_to, starts[:-1].copy(), selected)
    return selected, starts, late[:count]


@kernel
def _select(slots, holders, changed_by, behind, everyone, sent_to, starts, late):
    words = holders.shape[1]
    ranks = starts.size - 1
    count = 0
    for i in range(slots.size):
        slot = slots[i]
        members = 0  # of those that have changed it; two stand for more
        for word in range(words):
            sent_to[i, word] = 0
            left = changed_by[slot, word]
            while left != 0 and members < 2:
                left &= left - np.uint64(1)
                members += 1
        is_behind = False
        if members > 0 or everyone:
            for rank in range(ranks):
                word, bit = rank // _BITS, np.uint64(1) << np.uint64(rank % _BITS)
                if holders[slot, word] & bit == 0:
                    continue
                has_changed = changed_by[slot, word] & bit != 0
                if members > has_changed:
                    behind[slot, word] |= bit
                if behind[slot, word] & bit == 0:
                    continue
                if everyone or has_changed:
                    behind[slot, word] &= ~bit
                    sent_to[i, word] |= bit
                    starts[rank + 1] += 1
                else:
                    is_behind = True
        for word in range(words):
            changed_by[slot, word] = 0
        if is_behind:
            late[count] = slot
            count += 1
    return count


@kernel
def _fill(slots, sent_to, ends, selected):
    for i in range(slots.size):
        for word in range(sent_to.shape[1]):
            left = sent_to[i, word]
            rank = word * _BITS
            while left != 0:
                if left & np.uint64(1) != 0:
                    selected[ends[rank]] = slots[i]
                    ends[rank] += 1
                left >>= np.uint64(1)
                rank += 1
