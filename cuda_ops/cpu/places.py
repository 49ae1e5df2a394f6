"""Whether keys are still in the slots where they were found before: cheaper than to search for them again."""

import numpy as np

from cuda_ops.cpu.checks import int_vector
from cuda_ops.cpu.kernels import kernel


def moved_places(keys, places, owned_keys, copy_keys):
    """Return the positions (int64 [m]) of keys that are not where they were.

    Args:
        keys: [n] int64.
        places: [n] int64; p >= 0 says that owned_keys[p] was the key, p <= -2 that copy_keys[-2 - p] was, -1 nothing.
        owned_keys, copy_keys: [any] int64, the keys of slots.

    Raises:
        IndexError: a place is outside its slots.
        ValueError: the numbers of keys and places differ.
    """
    keys, places = int_vector(keys, "keys"), int_vector(places, "places")
    if keys.size != places.size:
        raise ValueError(f"{keys.size} keys given with {places.size} places")
    if places.size and (places.max() >= owned_keys.size or -2 - places.min() >= copy_keys.size):
        raise IndexError("a place is outside the slots that there are")
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
