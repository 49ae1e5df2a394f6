"""A managed table: which slab each of its lookups runs on, and the row gradient that it has gathered."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

import cuda_ops
import pm
from adaloader.errors import ManagedTableError
from adaloader.gradients.parts import Part, coalesce_or_only, sum_per_lookup
from adaloader.gradients.row_operations import replace
from adaloader.gradients.row_sum import RowSum
from adaloader.lookups.batch_rows import BatchRows
from adaloader.lookups.slabs import Slab, make_slab
from adaloader.memory.device_memory import DeviceMemory, all_on_host, memory_of, on_device, on_host
from adaloader.planning.coverage import LookupCounts
from adaloader.ranks.table_values import read_whole
from adaloader.tables.function_transforms import refuse_inside
from adaloader.tables.probation import Probation, confirm

if TYPE_CHECKING:
    from adaloader.lookups.blocks import Usage
    from adaloader.model.managed_model import ManagedModel

_ID_DTYPES = (torch.int64, torch.int32)


@dataclass
class ManagedTable:
    """One table of a model, between the model's lookups and the manager's rows.

    Invariant: `parts` are all gradients that arrived since the gradient was last cleared; `has_gradient` says whether
    `.grad` is a gradient (perhaps of no rows) or None, as plain PyTorch would have it. On several ranks that is known
    of this rank alone, but where it was cleared, or agreed on, after `settled_at` sums of gradients over ranks.
    `captured`, where it is a list, takes what a backward gives: that is then for `autograd.grad`.
    `cleared_to_zero` says whether the last clearing left zeros, not None.
    `is_stepped` says whether a step of this rank has applied the gradient, and none has arrived since.
    `memory` copies rows to the device that the parameter is on; it is None on the CPU.
    With `is_dense` the parameter is an ordinary one again, and nothing of it is here any more.
    `usages` says, by place among a batch's lookups of the table, how the last one there was used, where it can be made
    with those of other tables; `matched` is the place of the last lookup, None if none was expected there.
    `gradient_form` has the form of row gradients and no values, once there was one; `seen_gradient` is the gradient as
    user code sees it, once it was asked for: a view, whatever the gradient is.
    """

    name: str
    parameter: torch.nn.Parameter
    table: pm.Table
    model: weakref.ref[ManagedModel]
    gradient: RowSum = field(init=False)
    memory: DeviceMemory | None = field(init=False)
    has_gradient: bool = False
    hidden: bool = False
    counts: LookupCounts = field(default_factory=LookupCounts)
    frequency_lookups: tuple[int, int] = (0, 0)
    all_rows_held: bool = False
    is_read_whole: bool = False
    clears: int = 0
    last_mismatch: str | None = None
    probation: Probation | None = None
    is_dense: bool = False
    is_deferred: bool = False
    is_stepped: bool = False
    steps_before: int = 0
    whole: tuple[tuple[int, int], torch.Tensor] | None = None
    cleared_after: int = 0
    settled_at: int = 0
    cleared_to_zero: bool = False
    is_renormed: bool = False
    captured: list[Part] | None = None
    usages: dict[int, Usage] = field(default_factory=dict)
    matched: int | None = None
    gradient_form: torch.Tensor | None = None
    seen_gradient: torch.Tensor | None = None
    hooks: OrderedDict = field(default_factory=OrderedDict)
    post_hooks: OrderedDict = field(default_factory=OrderedDict)

    def __post_init__(self):
        self.gradient = RowSum(self, [], belongs_to_table=True)
        self.memory = memory_of(self.parameter.device)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @property
    def owner(self) -> ManagedModel:
        model = self.model()
        if model is None:
            raise ManagedTableError(f"table {self.name!r} outlived the model that it belongs to")
        return model

    @property
    def parts(self) -> list[Part]:
        return self.gradient.parts

    @parts.setter
    def parts(self, parts: list[Part]) -> None:
        self.gradient.parts = parts

    # Lookups

    def look_up(
        self, ids: torch.Tensor, operation: str, *, by_frequency: bool = False, bags: int | None = None
    ) -> tuple[Slab, np.ndarray]:
        """Return the slab for a lookup of `ids` (any shape) and the ids' positions in it (int64 `[n]`).

        `bags` is how many bags they are of, where these have not all as many.

        Raises:
            TypeError: if ids are not integers.
            IndexError: if an id is out of range; both before any other rank is left waiting.
        """
        refuse_inside(operation, self.name)
        flat = self._flat_ids(ids, operation)
        model = self.owner
        # Activation checkpointing looks up again in backward: the same lookup, not another one.
        is_repeated = torch._C._current_graph_task_id() != -1
        self.matched = None
        if not is_repeated:
            model.observe(self, ids, operation, flat)
        for batch in model.candidates(self):
            expected = batch.tables[self.table.number]
            positions = expected.positions_of(flat)
            if positions is not None and model.batches.may_be_of(batch, self.table.number, flat):
                if not is_repeated:
                    self.matched = expected.next_site - 1
                    if torch.is_grad_enabled():
                        self.usages.pop(self.matched, None)
                    model.used(batch)
                    self.counts.rows += len(expected.rows)
                    self.counts.intended += len(expected.rows)
                if by_frequency:
                    return self._frequency_slab(expected.rows, expected.plan, positions), positions
                return self._slab_of(expected), positions
        counts = copy(self.counts)
        found = self._unexpected(flat, by_frequency, len(flat) if bags is None else bags)
        if is_repeated:
            self.counts = counts
        return found

    def _flat_ids(self, ids: torch.Tensor, operation: str) -> np.ndarray:
        if ids.dtype not in _ID_DTYPES:
            raise TypeError(
                f"{operation} of table {self.name!r} got ids of dtype {ids.dtype}; ids must be torch.int64 or "
                "torch.int32 (call .long() on them)"
            )
        if ids.device.type != "cpu" and self.memory is None:
            raise RuntimeError(
                f"{operation} of table {self.name!r}, which is on the CPU, got ids on {ids.device}; move the model to "
                "that device before the loader is built, or the ids to the CPU"
            )
        with self.owner.paused():
            flat = on_host(ids.reshape(-1))
        return flat if flat.dtype == np.int64 else flat.astype(np.int64)

    def check_range(self, rows: np.ndarray) -> None:
        """Raise IndexError naming table, id and bounds if a row is out of range."""
        if len(rows):
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= self.table.spec.rows:
                bad = low if low < 0 else high
                raise IndexError(
                    f"id {bad} is out of range for table {self.name!r} with {self.table.spec.rows} rows "
                    f"(valid ids: 0 to {self.table.spec.rows - 1})"
                )

    def _slab_of(self, expected: BatchRows) -> Slab:
        model = self.owner
        version = model.version
        slab = expected.slab
        if (
            slab is None
            or expected.slab_version != version
            or slab.tensor.requires_grad != self.parameter.requires_grad
        ):
            plan = None if expected.plan.released else expected.plan
            slab = make_slab(self, expected.rows, self._values_of(expected.rows, expected.plan), plan)
            expected.slab, expected.slab_version = slab, version
        return slab

    def room(self, rows: int) -> np.ndarray:
        """Return memory `[rows, dim]` for a slab, with unspecified contents."""
        spec = self.table.spec
        if self.memory is not None:
            return self.memory.room((rows, spec.dim), spec.dtype)
        return self.owner.buffers.take(rows, spec.dim, spec.dtype)

    def here(self, array: np.ndarray) -> torch.Tensor:
        """Return an array as a tensor where the parameter is: of the same memory on the CPU, else a copy."""
        return on_device(array, self.memory)

    def _frequency_slab(self, rows: np.ndarray, plan: pm.RowPlan | None, positions: np.ndarray) -> Slab:
        """A slab of its own: its gradient is divided by this lookup's frequencies alone."""
        counts = cuda_ops.segment_count(positions, len(rows))
        return make_slab(self, rows, self._values_of(rows, plan), plan, counts, self._next_ordinal())

    def _values_of(self, rows: np.ndarray, plan: pm.RowPlan | None) -> np.ndarray | torch.Tensor:
        """Return the values `[U, dim]` of `rows`, those of `plan` if given: on the host, or from the device's cache."""
        manager = self.owner.manager
        if manager.is_cached(self.table):
            with self.owner.paused(), torch.inference_mode(False), torch.no_grad():
                return manager.device_rows(self.table, rows, plan)
        out = self.room(len(rows))
        return manager.pull(self.table, rows, out) if plan is None else manager.read(plan, out)

    def _next_ordinal(self) -> int:
        """Number the lookups whose gradients are divided by frequency: from 1 at each step, so that ranks agree.

        The step is part of the number, for gradients may outlive it (a loop that never clears them).
        """
        steps = self.owner.manager.steps
        step, count = self.frequency_lookups
        self.frequency_lookups = (steps, count + 1 if step == steps else 1)
        return steps << 20 | self.frequency_lookups[1]

    def _unexpected(self, flat: np.ndarray, by_frequency: bool, samples: int) -> tuple[Slab, np.ndarray]:
        """Serve ids that no batch's expected lookup equals: from what batches intended, and the rest on demand."""
        rows, positions = cuda_ops.dedup(flat)
        self.check_range(rows)
        self.counts.rows += len(rows)
        model = self.owner
        if model.batches.expects_no_lookup:
            self.counts.on_demand += len(rows)
            self.counts.aside += len(rows)
            return self._on_demand(rows), positions
        best, found = None, None
        for batch in model.candidates(self):
            at = batch.tables[self.table.number].find(rows)
            if found is None or (at >= 0).sum() > (found >= 0).sum():
                best, found = batch, at
        is_intended = found is not None and bool((found >= 0).all())
        batch = model.relooked(self, flat, samples, all_intended=is_intended)
        if batch is not best and torch.is_grad_enabled():
            best = None  # its rows are the same, but a gradient with its plan would count as its own
        if best is not None and len(rows) and (found >= 0).all():
            self.counts.intended += len(rows)
            expected = best.tables[self.table.number]
            if not by_frequency:
                return self._slab_of(expected), found[positions]
        elif best is not None and (found >= 0).any():
            return self._partly_intended(best, rows, found, positions, by_frequency)
        else:
            self.counts.on_demand += len(rows)
        if by_frequency:
            return self._frequency_slab(rows, None, positions), positions
        return self._on_demand(rows), positions

    def _on_demand(self, rows: np.ndarray) -> Slab:
        return make_slab(self, rows, self._values_of(rows, None), None)

    def _partly_intended(self, batch, rows, found, positions, by_frequency) -> tuple[Slab, np.ndarray]:
        model = self.owner
        here = np.flatnonzero(found >= 0)
        absent = np.flatnonzero(found < 0)
        self.counts.intended += len(here)
        self.counts.on_demand += len(absent)
        model.watch.missed(self.name, rows[absent])
        if model.manager.is_cached(self.table):
            if by_frequency:
                return self._frequency_slab(rows, None, positions), positions
            return self._on_demand(rows), positions
        slab = self._slab_of(batch.tables[self.table.number])
        out = self.room(len(rows))
        out[here] = slab.array[found[here]]
        out[absent] = model.manager.pull(self.table, rows[absent], np.empty((len(absent), out.shape[1]), out.dtype))
        if by_frequency:
            counts = cuda_ops.segment_count(positions, len(rows))
            return make_slab(self, rows, out, None, counts, self._next_ordinal()), positions
        return make_slab(self, rows, out, None), positions

    def whole_values(self) -> torch.Tensor:
        """Return all rows `[num_rows, dim]` as they are now; not to be written. Kept until they change,
        where they change in steps and writes alone: lookups with `max_norm`, of any rank, change them too.

        Any rank may ask alone.

        Raises:
            MemoryError: if there is not enough.
        """
        if self.probation is not None:
            return self.probation.values.to(self.parameter.device)
        model = self.owner
        version = model.version
        if self.whole is None or self.whole[0] != version or self.is_renormed:
            self.whole = None
            with model.paused(), torch.inference_mode(False):
                self.whole = (version, self.here(read_whole(model.manager, self.table).numpy()))
        return self.whole[1]

    def renormed(self, slab: Slab, positions: np.ndarray, max_norm: float, norm_type: float) -> None:
        """Scale looked-up rows whose norm is above `max_norm` down to it, here and in main copies, before the
        lookup."""
        self.is_renormed = True
        if self.probation is not None:
            confirm(self)  # its memory no longer says what rows are
        for batch in self.owner.candidates(self):
            block = batch.tables[self.table.number].block
            if block is not None:
                block.leave_out(self)
        touched, _ = cuda_ops.dedup(positions)
        values = slab.array[touched] if slab.array is not None else on_host(slab.tensor)[touched]
        changed = cuda_ops.renorm(values, max_norm, norm_type)
        if changed.any():
            if slab.array is not None:
                slab.array[touched[changed]] = values[changed]
            if self.memory is not None:
                with self.owner.paused(), torch.no_grad():
                    slab.tensor.detach()[self.here(touched[changed])] = self.here(values[changed])
            self.owner.manager.renorm(self.table, slab.rows[touched[changed]], max_norm, norm_type)

    # Gradients

    def receive(self, part: Part) -> None:
        """Take in one backward's gradient of one slab (called by autograd, once per slab and backward)."""
        if part.counts is not None and self.owner.ranks == 1:  # nobody else looked these rows up
            part.values = part.values / self.here(part.counts).clamp(min=1).to(part.values.dtype)[:, None]
            part.counts = None
        if self.captured is not None:
            part.scale = 1.0
            self.captured.append(part)
            return
        self.parts.append(part)
        self.gradient.changed()
        self.has_gradient, self.is_stepped = True, False
        self.owner.backward_reached(self, part)

    @property
    def has_hooks(self) -> bool:
        """Whether somebody wants to be called with its gradients."""
        return bool(self.hooks or self.post_hooks)

    @property
    def may_have_gradient(self) -> bool:
        """Whether this rank, or perhaps another, has a gradient."""
        if self.has_gradient:
            return True
        reducer = self.owner.reducer
        return reducer is not None and reducer.reductions > self.settled_at and self.parameter.requires_grad

    def settle_gradient(self, has_gradient: bool) -> None:
        """The ranks know of each other whether there is a gradient."""
        self.has_gradient = has_gradient
        reducer = self.owner.reducer
        self.settled_at = 0 if reducer is None else reducer.reductions

    def replace_gradient(self, other: RowSum) -> None:
        """Make `other`, which was computed from a gradient of this table on all ranks, what the next step applies."""
        if other is not self.gradient:
            replace(self.gradient, other)
            self.has_gradient = True

    def clear_gradient(self, *, keep_zero: bool = False) -> None:
        """Forget the gradient; with `keep_zero` it becomes one of zeros, where there is one (on some rank)."""
        gradient, owner = self.gradient, self.owner
        if not gradient.is_empty:
            owner.gradient_goes()
            gradient.parts = []
        gradient.changed()
        reducer = owner.reducer
        self.cleared_to_zero = keep_zero and self.may_have_gradient
        if not keep_zero:
            self.settle_gradient(False)
        self.clears += 1
        self.cleared_after = 0 if reducer is None else reducer.deferred

    def step_parts(self) -> list[Part]:
        """Return what a step must apply: nothing if there is no gradient, else one, or one per frequency lookup."""
        if not self.has_gradient:
            return []
        plain = [part for part in self.parts if part.counts is None]
        counted = sum_per_lookup([part for part in self.parts if part.counts is not None])
        merged = [coalesce_or_only(plain, self)] if plain or not counted else []
        self.parts = merged + counted  # a loop that never clears its gradients must not pile up their parts
        return self.parts


def table_gradients(parts: list[tuple[ManagedTable, Part]]) -> list[pm.TableGradient]:
    """Return parts of gradients as the manager takes them: on the host, but for tables that it has cached."""
    values = [part.values.detach() for _, part in parts]
    to_host = [at for at, (table, _) in enumerate(parts) if not table.owner.manager.is_cached(table.table)]
    for at, array in zip(to_host, all_on_host([values[at] for at in to_host]), strict=True):
        values[at] = array
    return [
        pm.TableGradient(
            table.table,
            part.rows,
            array,
            1.0 if part.scale is None else part.scale,
            part.plan,
            part.ordinal,
            part.counts,
            part.sums_of_block(),
        )
        for (table, part), array in zip(parts, values, strict=True)
    ]
