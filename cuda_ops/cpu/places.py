"""Keys by their places: a place p >= 0 is the slot of a record, p <= -2 that of a copy, -2 - p; -1 is neither.

Keys that are still where they were found before need not be searched for again (`moved_places`). Where an array has
the place of each key there may be, it has 1 more than the place: fresh memory, all zeros, then says that nothing is
anywhere.
"""

import numpy as np

from cuda_ops.cpu.checks import int_vector, record_count, word_range, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, kernel, prefetch, touch


def find_places(by_key, keys):
    """Return the places of keys, -1 for those below 0 or beyond the array: int64 [n]. Keys may repeat.

    Reads 12 n bytes, of which 4 n anywhere in the array, and writes 8 n.

    Args:
        by_key: [any] int32, by key its place + 1.
        keys: [n] int64.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit.
    """
    keys = int_vector(keys, "keys")
    out = np.empty(keys.size, np.int64)
    _find_places(_by_key(by_key), keys, out)
    return out


def put_places(by_key, keys, places, *, fresh):
    """Set the places of keys.

    Args:
        by_key: [any] int32, by key its place + 1; updated in place.
        keys: [n] int64, distinct.
        places: [n] int64, from -(2 ** 31 - 1) to 2 ** 31 - 2, none of them -1.
        fresh: whether the keys must not have a place yet.

    Raises:
        IndexError: a key is outside the array.
        KeyError: with `fresh`, a key has a place already, or is given twice.
        TypeError, ValueError: a dtype or shape does not fit, or a place. Whatever is raised, nothing is set.
    """
    keys, places = int_vector(keys, "keys"), int_vector(places, "places")
    by_key = _by_key(by_key)
    if keys.size != places.size:
        raise ValueError(f"{keys.size} keys given with {places.size} places")
    if not keys.size:
        return
    if keys.min() < 0 or keys.max() >= by_key.size:
        raise IndexError(f"keys from {keys.min()} to {keys.max()} are not all among the {by_key.size} that there are")
    if places.min() < -_MOST_PLACES or places.max() >= _MOST_PLACES:
        raise ValueError(f"places from {places.min()} to {places.max()} do not fit into 32 bits")
    done = _put_places(by_key, keys, places, fresh)
    if done < keys.size:
        by_key[keys[:done]] = 0
        raise KeyError(f"key {keys[done]} (position {done}) has a place already; find it before adding it")


def take_places(by_key, keys):
    """Return the places of keys, as `find_places`, and forget them.

    Args:
        by_key: [any] int32, by key its place + 1; updated in place.
        keys: [n] int64, all within the array; of one that repeats, all but the first have place -1.

    Raises:
        IndexError: a key is outside the array; nothing is forgotten.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    keys = int_vector(keys, "keys")
    by_key = _by_key(by_key)
    if keys.size and (keys.min() < 0 or keys.max() >= by_key.size):
        raise IndexError(f"keys from {keys.min()} to {keys.max()} are not all among the {by_key.size} that there are")
    out = np.empty(keys.size, np.int64)
    _take_places(by_key, keys, out)
    return out


_MOST_PLACES = 2**31 - 1


def _by_key(by_key):
    if by_key.dtype != np.int32 or by_key.ndim != 1 or not by_key.flags.c_contiguous:
        raise TypeError(f"by_key must be a contiguous vector of int32, got {by_key.dtype} of shape {by_key.shape}")
    return by_key


@kernel
def _find_places(by_key, keys, out):
    bound = np.uint64(by_key.size)
    for i in range(keys.size):
        if i + ROWS_AHEAD < keys.size and np.uint64(keys[i + ROWS_AHEAD]) < bound:
            prefetch(by_key, keys[i + ROWS_AHEAD])
        key = np.uint64(keys[i])
        out[i] = np.int64(by_key[key]) - 1 if key < bound else -1


@kernel
def _put_places(by_key, keys, places, fresh):
    """Return how many were set before one that has a place already; all, unless `fresh`."""
    for i in range(keys.size):
        if i + ROWS_AHEAD < keys.size:
            prefetch(by_key, keys[i + ROWS_AHEAD])
        key = np.uint64(keys[i])
        if fresh and by_key[key] != 0:
            return i
        by_key[key] = places[i] + 1
    return keys.size


@kernel
def _take_places(by_key, keys, out):
    for i in range(keys.size):
        if i + ROWS_AHEAD < keys.size:
            prefetch(by_key, keys[i + ROWS_AHEAD])
        key = np.uint64(keys[i])
        out[i] = np.int64(by_key[key]) - 1
        by_key[key] = 0


def moved_places(keys, places, owned_keys, copy_keys):
    """Return the positions (int64 [m]) of keys that are not where they were.

    Args:
        keys: [n] int64.
        places: [n] int64; p >= 0 says that owned_keys[p] was the key, p <= -2 that copy_keys[-2 - p] was, -1 nothing.
        owned_keys, copy_keys: [any] int64, the keys of slots; need not be contiguous.

    Raises:
        IndexError: a place is outside its slots.
        ValueError: the numbers of keys and places differ.
    """
    keys, places = int_vector(keys, "keys"), int_vector(places, "places")
    if keys.size != places.size:
        raise ValueError(f"{keys.size} keys given with {places.size} places")
    _check_places(places, owned_keys.size, copy_keys.size)
    out = np.empty(keys.size, np.int64)
    return out[: _moved_places(keys, places, owned_keys, copy_keys, out)]


@kernel
def _moved_places(keys, places, owned_keys, copy_keys, out):
    count = 0
    for i in range(keys.size):
        place = places[i]
        if place >= 0:
            same = owned_keys[place] == keys[i]
        else:
            same = place <= -2 and copy_keys[-2 - place] == keys[i]
        if not same:
            out[count] = i
            count += 1
    return count


def add_uses(places, of_records, of_copies, count):
    """Add `count` to the uses of what is at places; return the places (int64 [m]) that have none then.

    Args:
        places: [n] int64, distinct, none of them -1.
        of_records, of_copies: [any] int32, uses by slot, updated in place; need not be contiguous.

    Raises:
        IndexError: a place is outside its slots, or -1; nothing is changed.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    places = int_vector(places, "places")
    for uses, name in ((of_records, "of_records"), (of_copies, "of_copies")):
        if uses.dtype != np.int32 or uses.ndim != 1:
            raise TypeError(f"{name} must be a vector of int32, got {uses.dtype} of shape {uses.shape}")
    _check_places(places, of_records.size, of_copies.size)
    out = np.empty(places.size, np.int64)
    idle = _add_uses(places, of_records, of_copies, count, out)
    if idle < 0:
        raise IndexError("a place is -1: what is used must be somewhere")
    return out[:idle]


def gather_places(places, words, stride, copy_words, copy_stride, out):
    """Copy the first words of records and copies to the rows of a slab: row i is what is at places[i].

    Args:
        places: [n] int64, none of them -1.
        words, stride: the store of the records (see rows.py).
        copy_words, copy_stride: the store of the copies.
        out: [n, width], dtype of both stores.

    Raises:
        IndexError: a place is outside its store, or -1.
        TypeError, ValueError: a dtype or shape does not fit.
    """
    places = int_vector(places, "places")
    _check_places(places, record_count(words, stride), record_count(copy_words, copy_stride))
    writable(out, "out", words.dtype, (places.size, out.shape[-1]))
    if copy_words.dtype != words.dtype:
        raise TypeError(f"records are {words.dtype} and copies {copy_words.dtype}")
    word_range(min(stride, copy_stride), 0, out.shape[1])
    if not _gather_places(places, words, stride, copy_words, copy_stride, out):
        raise IndexError("a place is -1: nothing is there to copy")
    return out


def _check_places(places, records, copies):
    if places.size and (places.max() >= records or -2 - places.min() >= copies):
        raise IndexError("a place is outside the slots that there are")


@kernel
def _add_uses(places, of_records, of_copies, count, out):
    for i in range(places.size):
        if places[i] == -1:
            return -1
    idle = 0
    for i in range(places.size):
        place = places[i]
        if place >= 0:
            of_records[place] += count
            uses = of_records[place]
        else:
            of_copies[-2 - place] += count
            uses = of_copies[-2 - place]
        if uses == 0:
            out[idle] = place
            idle += 1
    return idle


@kernel
def _gather_places(places, words, stride, copy_words, copy_stride, out):
    count = places.size
    width = out.shape[1]
    flat = out.reshape(-1)
    for i in range(count):
        if i + ROWS_AHEAD < count:
            ahead = places[i + ROWS_AHEAD]
            if ahead >= 0:
                touch(words, ahead * stride, width)
            elif ahead <= -2:
                touch(copy_words, (-2 - ahead) * copy_stride, width)
        place = places[i]
        target = np.uint64(i * width)
        if place >= 0:
            source = np.uint64(place * stride)
            for j in range(width):
                flat[target + np.uint64(j)] = words[source + np.uint64(j)]
        elif place <= -2:
            source = np.uint64((-2 - place) * copy_stride)
            for j in range(width):
                flat[target + np.uint64(j)] = copy_words[source + np.uint64(j)]
        else:
            return False
    return True
