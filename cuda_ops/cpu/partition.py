"""Which rank is home to a key, and how keys are grouped by rank."""

import numpy as np

from cuda_ops.cpu.checks import in_range, int_vector, writable
from cuda_ops.cpu.kernels import kernel, mix


def owners(keys, ranks, out=None):
    """Return the rank that each key hashes to, a function of key and number of ranks alone.

    It is splitmix64's finaliser (Steele, Lea, Flood 2014) of the key, modulo `ranks`.

    Args:
        keys: [n] int64.
        ranks: int >= 1.
        out: [n] int64, allocated if not given.
    """
    keys = int_vector(keys, "keys")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    out = np.empty(keys.size, np.int64) if out is None else writable(out, "out", np.int64, keys.shape)
    _owners(keys, ranks, out)
    return out


def partition(owner, ranks):
    """Group positions by owner with a stable counting sort.

    Args:
        owner: [n] int64 in [0, ranks).
        ranks: number of groups.

    Returns:
        order: [n] int64; owner[order] ascends, and positions of one owner keep their order.
        counts: [ranks] int64.

    Raises:
        IndexError: an owner is not in [0, ranks).
    """
    owner = int_vector(owner, "owner")
    in_range(owner, ranks, "owner")
    order = np.empty(owner.size, np.int64)
    counts = np.empty(ranks, np.int64)
    _partition(owner, order, counts)
    return order, counts


@kernel
def _owners(keys, ranks, out):
    divisor = np.uint64(ranks)
    for i in range(keys.size):
        out[i] = np.int64(mix(keys[i]) % divisor)


@kernel
def _partition(owner, order, counts):
    counts[:] = 0
    for i in range(owner.size):
        counts[owner[i]] += 1
    begin = np.empty(counts.size, np.int64)
    total = 0
    for rank in range(counts.size):
        begin[rank] = total
        total += counts[rank]
    for i in range(owner.size):
        rank = owner[i]
        order[begin[rank]] = i
        begin[rank] += 1
