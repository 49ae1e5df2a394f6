"""Lookups that are made together: at a batch's first, all that its tables are known to be looked up for.

A lookup by itself costs several calls into PyTorch, the kernels and the manager, however few its rows. A model with
many tables therefore has their rows of one batch in one slab, expanded in one call to what each lookup gives, with one
node in autograd's graph, whose gradients are summed in one call and updated in one. What a lookup has to be for that is
learned from the batches before (`ManagedTable.usages`); one that turns out to be another is made by itself.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, int64, is_grad_enabled, is_inference_mode_enabled, strided
from torch.autograd.graph import get_gradient_edge

import cuda_ops
import pm
from adaloader.gradients.block_gradient import BlockGradient
from adaloader.gradients.parts import Part, spread
from adaloader.overrides.compiler import not_compiled
from pm.together import read_expanded, read_together

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel
    from adaloader.tables.managed_table import ManagedTable

Usage = tuple[int | None, bool, torch.Size]
"""Of one lookup of a table: its `padding_idx` and `sparse`, and the shape of its ids without the first dimension."""

# Asked at each lookup, some dozens in a step: a name of this module is found in less time than one of PyTorch's.
_own_operations = torch._C.DisableTorchFunctionSubclass
_running_backward = torch._C._current_graph_task_id
_function_transforms = torch._C._functorch.peek_interpreter_stack

_witness = torch.zeros((), device="cpu", requires_grad=True)
"""An input of all blocks, which the engine reaches exactly in a backward that is not for certain inputs alone."""
_witness_node = get_gradient_edge(_witness).node


class Block:
    """What one batch needs of several tables whose rows are alike, and what lookups of them will give.

    Row u of the block is of table t where starts[t] <= u < starts[t + 1]. `positions[ends[s - 1] : ends[s]]` are the
    rows that lookup s gives. Invariant: `outputs[s]` is what it gives at `version`, None once it was handed out: each
    is a tensor of its own, which the model may change in place.

    Args:
        tables: of the block.
        plans: the intents for their rows.
        rows: row ids int64 `[U]`, distinct within a table.
        starts: T + 1 of them.
        positions: int64 `[n]`.
        ends: int64 `[S]`.
        table_of: the place in `tables` of each lookup's.
        usages: of each lookup.
    """

    def __init__(
        self,
        tables: Sequence[ManagedTable],
        plans: Sequence[pm.RowPlan],
        rows: np.ndarray,
        starts: Sequence[int],
        positions: np.ndarray,
        ends: np.ndarray,
        table_of: Sequence[int],
        usages: Sequence[Usage],
    ):
        self.tables, self.plans, self.rows, self.starts = tables, plans, rows, starts
        self.positions, self.ends, self.table_of = positions, ends, table_of
        self.usages: list[Usage | None] = list(usages)
        self.outputs: list[torch.Tensor | None] = []
        self.version: tuple[int, int] | None = None

    def take(
        self, at: int, model: ManagedModel, shape: torch.Size, padding_idx: int | None, sparse: bool
    ) -> torch.Tensor | None:
        """Return what lookup `at` of ids of this shape gives; None if that has to be made by itself."""
        usage = self.usages[at]
        if usage is None or usage[0] != padding_idx or usage[1] != sparse:
            return None
        version = model.version
        if self.version != version:
            self.version = version
            self._make(model)
        output, self.outputs[at] = self.outputs[at], None
        if output is None or (output.ndim == 2 and len(shape) == 1) or output.shape[:-1] == shape:
            return output
        return output.view(*shape, output.shape[-1])

    def leave_out(self, table: ManagedTable) -> None:
        """Lookups of `table` are made by themselves from now on: its rows have changed within a version."""
        for at, place in enumerate(self.table_of):
            if self.tables[place] is table:
                self.usages[at] = None
                if self.outputs:
                    self.outputs[at] = None

    def _make(self, model: ManagedModel) -> None:
        self.outputs = [None] * len(self.ends)
        with torch._C.DisableTorchFunctionSubclass():
            trained = [table.parameter.requires_grad for table in self.tables]
        made = [at for at, place in enumerate(self.table_of) if trained[place] and self.usages[at]]
        if not made or any(table.is_dense for table in self.tables):
            return
        spec = self.tables[0].table.spec
        expanded = model.buffers.take(len(self.positions), spec.dim, spec.dtype)
        if not read_expanded(model.manager, self.plans, self.positions, expanded):
            slab = model.buffers.take(len(self.rows), spec.dim, spec.dtype)
            read_together(model.manager, self.plans, slab)
            cuda_ops.expand(slab, self.positions, expanded)
        ends = self.ends.tolist()
        begins = [0, *ends]
        arrays = [_shaped(expanded[begins[at] : ends[at]], self.usages[at][2]) for at in made]
        delivery = _Delivery(self, model, made, spec.dim)
        with torch._C.DisableTorchFunctionSubclass():
            outputs = _Together.apply(delivery, arrays, _witness, *delivery.parameters())
        # Not in the node's backward, which would seem to be checkpointing's.
        outputs[0].grad_fn.register_prehook(delivery)
        for at, output in zip(made, outputs, strict=True):
            self.outputs[at] = output


def _shaped(rows: np.ndarray, tail: torch.Size) -> np.ndarray:
    """Return rows `[n, dim]` in the shape that they probably will have, which spares a view."""
    if not tail:
        return rows
    step = tail.numel()
    return rows if step == 0 or len(rows) % step else rows.reshape(len(rows) // step, *tail, rows.shape[1])


class _Together(torch.autograd.Function):
    """Several lookups, as functions of the parameters that stand for their tables.

    These get no gradient (that is delivered by a hook) unless they have become dense since: see `slabs._RowsOf`.
    """

    @staticmethod
    @not_compiled
    def forward(ctx, delivery, arrays, witness, *parameters):
        ctx.delivery = delivery
        ctx.set_materialize_grads(False)
        return tuple(map(torch.from_numpy, arrays))

    @staticmethod
    @not_compiled
    def backward(ctx, *grads):
        return None, None, None, *ctx.delivery.dense_gradients(grads)


class _Delivery:
    """Makes, of the gradients of a block's lookups, parts of its tables' row gradients. Part of autograd's graph: it
    must not refer to that.

    Args:
        block: whose they are.
        model: its.
        made: which lookups the graph has.
        dim: of the rows.
    """

    def __init__(self, block: Block, model: ManagedModel, made: Sequence[int], dim: int):
        self._model = weakref.ref(model)
        self._dim = dim
        self._rows, self._starts = block.rows, block.starts
        self._positions, self._ends = block.positions, block.ends
        self._made, self._lookups = made, len(block.ends)
        self._place_of = [block.table_of[at] for at in made]
        self._tables = block.tables
        self._plans = [None if plan.released else plan for plan in block.plans]
        self._skips = np.full(self._lookups, -1, np.int64)
        for at, place in zip(made, self._place_of, strict=True):
            padding_idx = block.usages[at][0]
            if padding_idx is not None:
                self._skips[at] = self._position_of(place, padding_idx)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self._tables[place].parameter for place in dict.fromkeys(self._place_of)]

    def _position_of(self, place: int, row: int) -> int:
        """Return where in the block a table's padding row is, -1 if no lookup has it."""
        first, end = self._starts[place], self._starts[place + 1]
        row += self._tables[place].table.spec.rows if row < 0 else 0
        found = np.flatnonzero(self._rows[first:end] == row)
        return first + int(found[0]) if len(found) else -1

    @not_compiled
    def __call__(self, grads: tuple[torch.Tensor | None, ...]) -> None:
        """A backward has come to the lookups."""
        model = self._model()
        if model is None:  # a graph may outlive the model
            return
        wanted = self._wanted()
        reached: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for at, place, grad in zip(self._made, self._place_of, grads, strict=True):
            if grad is not None and place in wanted and not self._tables[place].is_dense:
                reached.setdefault(place, []).append((at, grad))
        if not reached:
            return
        if torch.is_grad_enabled():  # backward(create_graph=True): stay differentiable
            for place, given in reached.items():
                rows = self._rows[self._starts[place] : self._starts[place + 1]]
                self._tables[place].receive(Part(rows, self._differentiable(place, given), self._plans[place], None))
            return
        started = time.perf_counter()
        given = BlockGradient(self._tables, self._plans, self._rows, self._starts, self._summed(model, reached))
        model.manager.traffic.seconds["backward"] += time.perf_counter() - started
        others = reached if model.reducer is not None else given.give(reached)
        for place in others:
            self._tables[place].receive(given.part(place))
        if len(others) < len(reached):
            model.batches.backward_goes_on()

    def _wanted(self) -> Sequence[int]:
        """Return the places of the tables that the running backward is for."""
        if torch._C._will_engine_execute_node(_witness_node):
            return range(len(self._tables))
        wanted = []
        with torch._C.DisableTorchFunctionSubclass():
            for place in dict.fromkeys(self._place_of):
                parameter = self._tables[place].parameter
                if parameter.requires_grad and _is_input(get_gradient_edge(parameter).node):  # or was frozen since
                    wanted.append(place)
        return wanted

    def _summed(self, model: ManagedModel, reached: dict[int, list[tuple[int, torch.Tensor]]]) -> np.ndarray:
        """Return the gradients `[U, dim]` of the block's rows, the same bits as of lookups that are made by themselves:
        whether a batch has a block is a matter of when it was planned.
        """
        addresses, layouts = [0] * self._lookups, [(0, 0, 0)] * self._lookups
        kept = []
        for given in reached.values():
            for at, grad in given:
                strides = grad.stride()
                if len(strides) not in (2, 3) or strides[-1] != 1 or grad.is_neg():
                    grad = grad.resolve_neg().contiguous()
                    strides = self._dim, 1
                kept.append(grad)  # until the kernel has read it
                addresses[at] = grad.data_ptr()
                # A part of a wider tensor, as the backward of `cat` gives it, is summed where it is.
                layouts[at] = (strides[0], 0, 0) if len(strides) == 2 else (strides[1], grad.shape[1], strides[0])
        rows, dtype, seen = len(self._rows), self._tables[0].table.spec.dtype, None
        several = len(kept) > len(reached)  # lookups of one table, in which a row may be
        sums = model.buffers.take(2 * rows if several else rows, self._dim, dtype)
        if several:
            seen = model.buffers.take(2 * rows, 1, "int64").reshape(-1)
        lookups = np.array(addresses, np.int64), np.array(layouts, np.int64)
        cuda_ops.sum_segments(*lookups, self._ends, self._positions, self._skips, sums, seen)
        return sums[:rows]

    def _differentiable(self, place: int, given: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """Return the gradient `[rows, dim]` of one table, as a function of those that were given."""
        first, end = self._starts[place], self._starts[place + 1]
        total = None
        for at, grad in reversed(given):  # as in `_summed`
            positions = self._positions[self._ends[at - 1] if at else 0 : self._ends[at]]
            flat = grad.reshape(-1, self._dim)
            if self._skips[at] >= 0:
                flat = flat.masked_fill(torch.from_numpy(positions == self._skips[at])[:, None], 0)
            summed = flat.new_zeros(end - first, self._dim).index_add(0, torch.from_numpy(positions - first), flat)
            total = summed if total is None else total + summed
        return total

    def dense_gradients(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return the gradients of the parameters, but for those of managed tables."""
        found: dict[int, torch.Tensor | None] = dict.fromkeys(self._place_of)
        for place in found:
            table = self._tables[place]
            if table.is_dense:
                lookups = zip(self._made, self._place_of, grads, strict=True)
                given = [(at, grad) for at, of, grad in lookups if of == place and grad is not None]
                if given:
                    rows = self._rows[self._starts[place] : self._starts[place + 1]]
                    found[place] = spread(rows, self._differentiable(place, given), table.parameter.shape)
        return list(found.values())


def _is_input(node: torch.autograd.graph.Node) -> bool:
    """Whether a backward for certain inputs is for the leaf whose gradient `node` adds up."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it is, and its gradient is returned by autograd.grad
        return True


def look_up(
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
) -> torch.Tensor | None:
    """Return what `torch.nn.functional.embedding` gives if it was made with others; None if it has to be by itself."""
    table = getattr(weight, "_managed", None)
    if table is None or weight is not table.parameter or max_norm is not None or scale_grad_by_freq:
        return None
    model = table.model()
    if model is None or model.watch.recorder is not None or not _is_ordinary(input):
        return None
    with _own_operations():  # the question would come to the table's own __torch_function__
        if not weight.requires_grad:
            return None
    shape = input.shape
    flat = input.numpy() if len(shape) == 1 else input.numpy().reshape(-1)
    number, batches = table.table.number, model.batches
    for batch in batches.candidates(number):
        needed = batch.tables[number]
        block = needed.block
        if block is None:
            return None
        place = needed.place_of(flat)
        if place is not None:
            made = block.take(needed.first_site + place, model, shape, padding_idx, sparse)
            if made is not None:
                batches.used(batch)
                counts, rows = table.counts, len(needed.rows)
                counts.rows += rows
                counts.intended += rows
            return made
    return None


def _is_ordinary(ids) -> bool:
    """Whether ids are looked up in a forward pass that is to be differentiated, and are plain."""
    return (
        type(ids) is Tensor
        and ids.dtype is int64
        and ids.layout is strided
        and ids.is_cpu
        and is_grad_enabled()
        and not is_inference_mode_enabled()
        and _running_backward() == -1  # in backward, checkpointing makes lookups again
        and _function_transforms() is None
    )
