"""Slabs: the rows that a batch works on, as one compact tensor."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

import cuda_ops
import pm
from adaloader.gradients.parts import Part, spread
from adaloader.memory.device_memory import memory_of, on_device
from adaloader.overrides.compiler import not_compiled

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable


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
