"""The last-step words of records, by torch's indexing. See cuda_ops/cpu/steps.py."""

from __future__ import annotations

import torch

from cuda_ops.cuda.checks import in_range, int_vector, writable


def last_steps(steps, stride_bytes, slots, out=None):
    """Read the last-step words of records: out[i] = step of record slots[i]; as cuda_ops.cpu.steps.last_steps."""
    places, slots = _places(steps, stride_bytes, slots)
    if out is not None:
        writable(out, "out", torch.int64, tuple(slots.shape))
    return torch.index_select(steps, 0, places, out=out)


def mark_steps(steps, stride_bytes, slots, version):
    """Set the last-step words of records to `version` (int); as cuda_ops.cpu.steps.mark_steps."""
    places, _ = _places(steps, stride_bytes, slots)
    steps.index_fill_(0, places, int(version))


def _places(steps, stride_bytes, slots):
    writable(steps, "steps", torch.int64, (steps.numel(),))
    if stride_bytes <= 0 or stride_bytes % 8:
        raise ValueError(f"stride_bytes is {stride_bytes}; a record must be a positive multiple of 8 bytes")
    slots = int_vector(slots, "slots")
    in_range(slots, steps.numel() // (stride_bytes // 8), "slots")
    return (slots + 1) * (stride_bytes // 8) - 1, slots
