"""Slabs: the rows that a batch works on, as one compact tensor, and the gradients that arrive for them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

import cuda_ops
import pm
from adaloader.memory.device_memory import memory_of, on_device
from adaloader.overrides.compiler import not_compiled

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable

# Fresh memory costs a page fault per 4 KiB; sizes are rounded so that a buffer fits the next batch's slab as well.
_BUFFER_ROWS = 1024
_MOST_BUFFERS = 16


def _references(arrays: list[np.ndarray]) -> list[int]:
    """Return how often each array of the list is referred to, the list and this count itself included."""
    counts = []
    for array in arrays:
        counts.append(sys.getrefcount(array))  # a loop's variable: versions of Python count these differently
    return counts


_REFERENCES_OF_UNUSED = _references([np.empty(1)])[0]


class Buffers:
    """Memory for slabs, used again once nothing refers to it any more (a graph may keep a slab beyond its batch)."""

    def __init__(self):
        self._kept: list[np.ndarray] = []

    def take(self, rows: int, dim: int, dtype: str) -> np.ndarray:
        """Return an array `[rows, dim]` with unspecified contents."""
        wanted = max(1, -(-rows // _BUFFER_ROWS)) * _BUFFER_ROWS * dim
        unused = [count == _REFERENCES_OF_UNUSED for count in _references(self._kept)]
        for kept, free in zip(self._kept, unused, strict=True):
            if free and kept.dtype == dtype and wanted <= kept.size <= 2 * wanted:
                return kept[: rows * dim].reshape(rows, dim)
        made = np.empty(wanted, dtype)
        still = zip(self._kept, unused, strict=True)
        self._kept = [k for k, free in still if not free or k.dtype != dtype or k.size >= wanted][-_MOST_BUFFERS:]
        self._kept.append(made)
        return made[: rows * dim].reshape(rows, dim)


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


@dataclass(frozen=True)
class Slab:
    """Rows of one table at one version.

    Args:
        rows: distinct row ids, int64 `[U]`.
        array: their values `[U, dim]`, on the host; None where they have come from the cache on the table's device.
        tensor: the same memory, or a copy on the table's device, as a function of the table's parameter; its gradient
            goes to the table.
        plan: the intent that brought the rows, if any.
        seconds: where the time of its backward is added.
        reached: for tables whose optimizer moves the rows that were looked up and no others (SparseAdam): which rows a
            backward has reached so far (bool `[U]`); a batch may have brought more. None where that does not matter.
    """

    rows: np.ndarray
    array: np.ndarray | None
    tensor: torch.Tensor
    plan: pm.RowPlan | None
    seconds: dict[str, float]
    reached: np.ndarray | None = None

    def mark_reached(self, positions: np.ndarray, padding: int = -1) -> None:
        """Note that a backward has come to the rows at `positions` (int64 `[n]`), but for the one at `padding`."""
        if self.reached is not None:
            self.reached[positions if padding < 0 else positions[positions != padding]] = True


def make_slab(
    table: ManagedTable,
    rows: np.ndarray,
    values: np.ndarray | torch.Tensor,
    plan: pm.RowPlan | None,
    counts: np.ndarray | None = None,
    ordinal: int = 0,
) -> Slab:
    """Return a slab over `values` whose gradient, when one arrives, becomes a part of the table's row gradient.

    The values `[U, dim]` are on the host, or a tensor on the table's device.
    """
    array, there = (None, values) if isinstance(values, torch.Tensor) else (values, None)
    parameter = table.parameter
    reached = None
    rule = table.table.spec.rule
    if parameter.requires_grad and (rule.moves_looked_up_rows or isinstance(rule, pm.Frozen)):  # as it may be later
        reached = np.zeros(len(rows), bool)

    def deliver(grad: torch.Tensor) -> None:
        if table.model() is not None and not table.is_dense:  # a graph may outlive the model, and the table's being one
            part = Part(rows, grad.contiguous(), plan, None, counts, ordinal)
            table.receive(part if reached is None else _only(part, reached))

    with table.owner.paused(), torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        there = on_device(array, table.memory) if there is None else there
        if not parameter.requires_grad:
            tensor = there
        else:
            with torch.enable_grad():
                tensor = _RowsOf.apply(parameter, (there,), rows, table)
            tensor.register_hook(deliver)  # not in the backward below, which would seem to be checkpointing's
    return Slab(rows, array, tensor, plan, table.owner.manager.traffic.seconds, reached)


def _only(part: Part, reached: np.ndarray) -> Part:
    """Return `part` without the rows that its backward has not reached; the next backward begins anew."""
    keep = np.flatnonzero(reached)
    reached[:] = False
    if len(keep) == len(reached):
        return part
    counts = None if part.counts is None else part.counts[keep]
    values = part.values[on_device(keep, memory_of(part.values.device))]
    return replace(part, rows=part.rows[keep], values=values, plan=None, counts=counts)


class _RowsOf(torch.autograd.Function):
    """Rows, as a function of the parameter that stands for their table.

    The parameter itself gets no gradient (the rows' is delivered by a hook) unless it has become dense since, but the
    engine sees that they belong to it: it leaves them out of a backward for other inputs, and reaches them in one for
    this.
    """

    @staticmethod
    @not_compiled
    def forward(ctx, parameter, values, rows, table):
        ctx.rows, ctx.table = rows, table
        ctx.set_materialize_grads(False)
        return values[0]  # in a tuple, for autograd would take it for an input

    @staticmethod
    @not_compiled
    def backward(ctx, grad):
        is_dense = grad is not None and ctx.table.is_dense
        return spread(ctx.rows, grad, ctx.table.parameter.shape) if is_dense else None, None, None, None


def spread(rows: np.ndarray, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a tensor of `shape` with `values` `[U, dim]` at distinct `rows` (int64 `[U]`), and zeros elsewhere."""
    return values.new_zeros(shape).index_add(0, on_device(rows, memory_of(values.device)), values)


class _Expand(torch.autograd.Function):
    """out[i] = slab[positions[i]]; the gradient is summed per slab row, leaving out the padding row."""

    @staticmethod
    @not_compiled
    def forward(ctx, tensor, slab, positions, shape, padding):
        ctx.positions, ctx.padding, ctx.slab_shape, ctx.slab = positions, padding, tensor.shape, slab
        memory = memory_of(tensor.device)
        if memory is not None:
            ctx.positions_there = memory.send(positions)
            return tensor.detach().index_select(0, ctx.positions_there).view(*shape, tensor.shape[1])
        out = torch.empty(*shape, tensor.shape[1], dtype=tensor.dtype, device="cpu")
        cuda_ops.expand(slab.array, positions, out.numpy().reshape(-1, tensor.shape[1]))
        return out

    @staticmethod
    @not_compiled
    def backward(ctx, grad):
        started = time.perf_counter()
        rows, dim = ctx.slab_shape
        is_far = grad.device.type != "cpu"
        if torch.is_grad_enabled():  # backward(create_graph=True): stay differentiable
            positions = ctx.positions_there if is_far else torch.from_numpy(ctx.positions)
            flat = grad.reshape(-1, dim)
            if ctx.padding >= 0:
                flat = flat.masked_fill((positions == ctx.padding)[:, None], 0)
            summed = grad.new_zeros(rows, dim).index_add(0, positions, flat)
        elif is_far:
            summed = torch.empty(rows, dim, dtype=grad.dtype, device=grad.device)
            with cuda_ops.trusted():  # the host need not wait for a check of positions that it made
                cuda_ops.segment_sum(grad.reshape(-1, dim), ctx.positions_there, summed, skip=ctx.padding)
        else:
            summed = torch.empty(rows, dim, dtype=grad.dtype, device="cpu")
            flat = grad.contiguous().numpy().reshape(-1, dim)
            cuda_ops.segment_sum(flat, ctx.positions, summed.numpy(), skip=ctx.padding)
        ctx.slab.mark_reached(ctx.positions, ctx.padding)
        ctx.slab.seconds["backward"] += time.perf_counter() - started
        return summed, None, None, None, None


def expand(slab: Slab, positions: np.ndarray, shape: torch.Size, padding: int = -1) -> torch.Tensor:
    """Return `slab.tensor[positions]` as a tensor `[*shape, dim]`.

    Args:
        slab: `[U, dim]`.
        positions: int64 `[n]`, n the number of elements of `shape`.
        shape: shape of the ids.
        padding: position whose row gets no gradient, -1 for none.
    """
    return _Expand.apply(slab.tensor, slab, positions, shape, padding)


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
