"""Parts of a table's gradient: what one backward gives for some rows, and sums of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

import cuda_ops
import pm
from adaloader.memory.device_memory import memory_of, on_device

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable


@dataclass(frozen=True)
class Sums:
    """The gradients `[U, dim]` of all rows of a block (see `blocks.py`), and the address of the first."""

    array: np.ndarray
    address: int


@dataclass
class Part:
    """One backward's gradient for the rows of one slab.

    Args:
        rows: distinct row ids, int64 `[U]`.
        values: gradient `[U, dim]`, where the table's parameter is.
        plan: the plan that the rows belong to, if any.
        scale: factor still to be applied; None until the backward that made it is over.
        counts: times each row was looked up (int64 `[U]`), where the frequency divides the gradient.
        ordinal: number of the lookup within the step, for gradients divided by frequency.
        sums: of the block that `plan` was made with, if `values` was a part of them when it came.
    """

    rows: np.ndarray
    values: torch.Tensor
    plan: pm.RowPlan | None
    scale: float | None
    counts: np.ndarray | None = None
    ordinal: int = 0
    sums: Sums | None = None

    def sums_of_block(self) -> np.ndarray | None:
        """Return the array of `sums` if `values` are still the memory of this part's rows there."""
        if self.sums is None or self.plan is None or self.plan.stretch is None:
            return None
        address = self.sums.address + self.plan.first * self.sums.array.strides[0]
        is_there = self.values.data_ptr() == address and len(self.values) == len(self.plan.rows)
        return self.sums.array if is_there and self.values.is_contiguous() else None


def no_rows(table: ManagedTable) -> Part:
    """Return a gradient of `table` that is zero everywhere."""
    empty = torch.empty(0, table.table.spec.dim, dtype=table.parameter.dtype, device=table.parameter.device)
    return Part(np.empty(0, np.int64), empty, None, 1.0)


def coalesce(parts: list[Part]) -> Part:
    """Sum parts without counts into one over their distinct rows, with its scale applied."""
    rows, inverse = cuda_ops.dedup(np.concatenate([part.rows for part in parts]))
    stacked = torch.cat([_scaled(part) for part in parts])
    values = torch.empty(len(rows), stacked.shape[1], dtype=stacked.dtype, device=stacked.device)
    memory = memory_of(stacked.device)
    if memory is None:
        cuda_ops.segment_sum(stacked.numpy(), inverse, values.numpy())
    else:
        with cuda_ops.trusted():
            cuda_ops.segment_sum(stacked, memory.send(inverse), values)
    return Part(rows, values, None, 1.0)


def add_up(parts: list[Part]) -> Part:
    """Sum parts that several backward passes gave for the same lookup, whose rows, plan and counts they share."""
    values = torch.stack([_scaled(part) for part in parts]).sum(0)
    return replace(parts[0], values=values, scale=1.0)


def _scaled(part: Part) -> torch.Tensor:
    values = part.values.detach()  # that of backward(create_graph=True) has a graph
    return values if part.scale in (None, 1.0) else values * part.scale


def sum_per_lookup(parts: list[Part]) -> list[Part]:
    """Sum those of `parts` (with counts) that several backward passes gave for one lookup."""
    by_lookup: dict[int, list[Part]] = {}
    for part in parts:
        by_lookup.setdefault(part.ordinal, []).append(part)
    return [same[0] if len(same) == 1 else add_up(same) for same in by_lookup.values()]


def coalesce_or_only(parts: list[Part], table: ManagedTable) -> Part:
    """Return the sum of `parts` (without counts) as one part, an empty one if there are none."""
    if len(parts) == 1:
        return parts[0]
    return coalesce(parts) if parts else no_rows(table)


def spread(rows: np.ndarray, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a tensor of `shape` with `values` `[U, dim]` at distinct `rows` (int64 `[U]`), and zeros elsewhere."""
    return values.new_zeros(shape).index_add(0, on_device(rows, memory_of(values.device)), values)
