"""The last-step words of records: the last 8 bytes of each, an int64.

Kernels get them through `steps`, an int64 view of the whole record store (the same bytes as `words`), in
which the step of record i is steps[(i + 1) * stride_bytes // 8 - 1].
"""

import numpy as np

from cuda_ops.cpu.checks import in_range, int_vector, writable
from cuda_ops.cpu.kernels import ROWS_AHEAD, kernel, prefetch


def last_steps(steps, stride_bytes, slots, out=None):
    """Read the last-step words of records: out[i] = step of record slots[i].

    Args:
        steps: [any] int64 view of the record store.
        stride_bytes: bytes per record, a multiple of 8.
        slots: [n] int64.
        out: [n] int64, allocated if not given.

    Returns:
        `out`.

    Raises:
        IndexError: a slot is outside the store.
    """
    record_longs = _record_longs(steps, stride_bytes)
    slots = int_vector(slots, "slots")
    out = np.empty(slots.size, np.int64) if out is None else writable(out, "out", np.int64, slots.shape)
    in_range(slots, steps.size // record_longs, "slots")
    _last_steps(steps, record_longs, slots, out)
    return out


def mark_steps(steps, stride_bytes, slots, version):
    """Set the last-step words of records to `version` (int).

    Args:
        steps, stride_bytes, slots: as in last_steps.

    Raises:
        IndexError: a slot is outside the store.
    """
    record_longs = _record_longs(steps, stride_bytes)
    slots = int_vector(slots, "slots")
    in_range(slots, steps.size // record_longs, "slots")
    _mark_steps(steps, record_longs, slots, int(version))


def _record_longs(steps, stride_bytes):
    writable(steps, "steps", np.int64, (steps.size,))
    if stride_bytes <= 0 or stride_bytes % 8:
        raise ValueError(f"stride_bytes is {stride_bytes}; a record must be a positive multiple of 8 bytes")
    return stride_bytes // 8


@kernel
def _last_steps(steps, record_longs, slots, out):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(steps, (slots[i + ROWS_AHEAD] + 1) * record_longs - 1)
        out[i] = steps[(slots[i] + 1) * record_longs - 1]


@kernel
def _mark_steps(steps, record_longs, slots, version):
    for i in range(slots.size):
        if i + ROWS_AHEAD < slots.size:
            prefetch(steps, (slots[i + ROWS_AHEAD] + 1) * record_longs - 1)
        steps[(slots[i] + 1) * record_longs - 1] = version
