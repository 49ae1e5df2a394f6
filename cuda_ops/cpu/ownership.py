"""Records that change their owner: what a rank takes over, and what it gives up, with all that it notes of them.

A rank notes by slot of a record: its key, the number of uses that are announced here (live), how often it has moved
(counter), and two sets of ranks (uint64 `[words]`): its holders, and which of them are behind (`refreshes.py`). By
slot of a copy: its key, live, a state, whether it has changes to send (dirty), and the number of the parcel with
changes that are under way. A copy's words are what it holds, what it held when changes were last taken, and the changes
under way, `width` each.
"""

import numpy as np

from cuda_ops.cpu.checks import in_range, int_vector, record_count
from cuda_ops.cpu.kernels import ROWS_AHEAD, helper, kernel, touch


def take_over(keys, places, values, counters, holders, slots, records, notes, copies, copy_notes, here, acknowledged):
    """Make records of keys, and forget the copies that there were of them.

    A record is what was sent of it, and the changes of the copy here that its former owner lacks; or, where nothing was
    sent, what the copy holds. Reads and writes each record, note and copy once.

    Args:
        keys: [n] int64, distinct.
        places: [n] int64, where they are: -2 - slot of a copy, or -1 (see places.py).
        values: [n, width] in the records' dtype; None: what copies hold, of which there is one of each key.
        counters: [n] of any integer dtype.
        holders: [n, words] uint64, or [0, words] where all are empty.
        slots: [n] int64, free ones, distinct.
        records: (words [any], stride, width) of the store of records.
        notes: (keys int64, live int32, counters int32, holders uint64 [, words], behind uint64 [, words], shared until
            int32), by slot of a record.
        copies: (words [any], stride) of the store of copies.
        copy_notes: (keys int64, live int32, states int8, dirty bool, parcels int64), by slot of a copy.
        here: the states (int, int) in which a copy has a value.
        acknowledged: parcels up to this one the former owner has taken in.

    Returns:
        The slots of copies that are free now, int64 [m].

    Raises:
        IndexError: a slot or place is outside its store, or a key without values has no copy; nothing is changed.
        ValueError: the numbers of keys, places and values differ.
    """
    (words, stride, width), (copy_words, copy_stride) = records, copies
    keys, places, slots = int_vector(keys, "keys"), int_vector(places, "places"), int_vector(slots, "slots")
    if not keys.size == places.size == slots.size == len(counters) or (values is not None and len(values) != keys.size):
        raise ValueError(f"{keys.size} keys given with {places.size} places, {slots.size} slots and other values")
    in_range(slots, record_count(words, stride), "slots")
    if keys.size and (places.max() >= 0 or -2 - places.min() >= record_count(copy_words, copy_stride)):
        raise IndexError("a place is that of a record, or outside the copies that there are")
    if values is None and keys.size and places.max() == -1:
        raise IndexError("a key without a value has no copy")
    is_sent = values is not None
    sent = np.ascontiguousarray(values) if is_sent else np.empty((0, width), words.dtype)
    freed = np.empty(keys.size, np.int64)
    count = _take_over(
        keys,
        places,
        sent,
        is_sent,
        np.asarray(counters, np.int64),
        np.ascontiguousarray(holders),
        slots,
        words,
        stride,
        width,
        *notes,
        copy_words,
        copy_stride,
        *copy_notes,
        *here,
        acknowledged,
        freed,
    )
    return freed[:count]


def give_up(slots, receiver, records, notes, promotes):
    """Take records out, to be sent to one rank, and forget what is noted of them.

    Those of which the receiver holds a copy that is what the record is need not be sent: they come first.

    Args:
        slots: [n] int64, distinct.
        receiver: the set of the rank that gets them alone, uint64 [words].
        records, notes: as `take_over`.
        promotes: whether holders have copies.

    Returns:
        (number of records that need not be sent, keys int64 [n], counters int64 [n] raised by one, and of those that
        must be sent: values [m, width], the other holders uint64 [m, words], and whether any are).

    Raises:
        IndexError: a slot is outside the store; nothing is changed.
    """
    words, stride, width = records
    slots = int_vector(slots, "slots")
    in_range(slots, record_count(words, stride), "slots")
    keys, counters = np.empty(slots.size, np.int64), np.empty(slots.size, np.int64)
    promoted = _promoted(slots, receiver, notes[3], notes[4]) if promotes else 0
    values = np.empty((slots.size - promoted, width), words.dtype)
    holders = np.empty((slots.size - promoted, len(receiver)), np.uint64)
    any_holders = _give_up(slots, receiver, words, stride, *notes, promotes, promoted, keys, counters, values, holders)
    return promoted, keys, counters, values, holders, any_holders


@kernel
def _take_over(
    keys,
    places,
    values,
    is_sent,
    counters,
    holders,
    slots,
    words,
    stride,
    width,
    of_keys,
    of_live,
    of_counters,
    of_holders,
    of_behind,
    of_shared_until,
    copy_words,
    copy_stride,
    copy_keys,
    copy_live,
    copy_states,
    copy_dirty,
    copy_parcels,
    state_here,
    other_state_here,
    acknowledged,
    freed,
):
    count = 0
    sets = of_holders.shape[1]
    flat = values.reshape(-1)
    for i in range(keys.size):
        if i + ROWS_AHEAD < keys.size:
            touch(words, slots[i + ROWS_AHEAD] * stride, width)
        slot = slots[i]
        target = np.uint64(slot * stride)
        live = np.int32(0)
        is_copied = False
        under_way = False
        source = np.uint64(0)
        if places[i] <= -2:
            copy = -2 - places[i]
            live = copy_live[copy]
            is_copied = copy_states[copy] == state_here or copy_states[copy] == other_state_here
            under_way = copy_parcels[copy] > acknowledged
            source = np.uint64(copy * copy_stride)
            copy_keys[copy] = -1
            copy_live[copy] = 0
            copy_states[copy] = 0
            copy_dirty[copy] = False
            freed[count] = copy
            count += 1
        if not is_sent:
            for j in range(width):
                words[target + np.uint64(j)] = copy_words[source + np.uint64(j)]
        else:
            first = np.uint64(i * width)
            for j in range(width):
                words[target + np.uint64(j)] = flat[first + np.uint64(j)]
            if is_copied:
                base, sent = source + np.uint64(width), source + np.uint64(2 * width)
                for j in range(width):
                    change = copy_words[source + np.uint64(j)] - copy_words[base + np.uint64(j)]
                    if under_way:
                        change += copy_words[sent + np.uint64(j)]
                    words[target + np.uint64(j)] += change
        of_keys[slot] = keys[i]
        of_live[slot] = live
        of_counters[slot] = counters[i]
        of_shared_until[slot] = 0
        for word in range(sets):
            of_holders[slot, word] = holders[i, word] if holders.shape[0] else np.uint64(0)
            of_behind[slot, word] = 0
    return count


@kernel
def _promoted(slots, receiver, of_holders, of_behind):
    count = 0
    for i in range(slots.size):
        count += _is_promoted(slots[i], receiver, of_holders, of_behind)
    return count


@helper
def _is_promoted(slot, receiver, of_holders, of_behind):
    """Whether the receiver is a holder that is not behind."""
    holds, known = False, True
    for word in range(receiver.size):
        holds |= (of_holders[slot, word] & receiver[word]) != 0
        known &= (of_behind[slot, word] & receiver[word]) == 0
    return holds and known


@kernel
def _give_up(
    slots,
    receiver,
    words,
    stride,
    of_keys,
    of_live,
    of_counters,
    of_holders,
    of_behind,
    of_shared_until,
    promotes,
    promoted,
    keys,
    counters,
    values,
    holders,
):
    first, last = 0, promoted
    any_holders = False
    width = values.shape[1]
    flat = values.reshape(-1)
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            touch(words, slots[i + ROWS_AHEAD] * stride, width)
        slot = slots[i]
        if promotes and _is_promoted(slot, receiver, of_holders, of_behind):
            at = first
            first += 1
        else:
            at = last
            last += 1
            row = at - promoted
            source, target = np.uint64(slot * stride), np.uint64(row * width)
            for j in range(width):
                flat[target + np.uint64(j)] = words[source + np.uint64(j)]
            for word in range(receiver.size):
                others = of_holders[slot, word] & ~receiver[word]
                holders[row, word] = others
                any_holders |= others != 0
        keys[at] = of_keys[slot]
        counters[at] = of_counters[slot] + 1
        of_keys[slot] = -1
        of_live[slot] = 0
        for word in range(receiver.size):
            of_holders[slot, word] = 0
            of_behind[slot, word] = 0
    return any_holders
