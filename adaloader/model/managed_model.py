"""A model whose tables are managed: its tables, its batches in flight, its optimizers, and the manager behind them."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import pm
from adaloader.dense.parameters import DenseReducer
from adaloader.errors import ManagedTableError
from adaloader.gradients.block_gradient import shares_for_step
from adaloader.gradients.gradient_hooks import GradientHooks
from adaloader.gradients.parts import Part
from adaloader.lookups.batches import Batch, Batches
from adaloader.memory.buffers import Buffers
from adaloader.optimizers.scalers import Scalers
from adaloader.optimizers.state_watch import StateWatch
from adaloader.optimizers.step_hooks import call_first_after_steps, call_last_before_steps
from adaloader.optimizers.supported import (
    check_options,
    group_of,
    groups_by_parameter,
    hyperparameter_name,
    hyperparameter_vector,
    rule_for,
    snapshot,
)
from adaloader.overrides.compiler import not_compiled
from adaloader.planning.coverage import CoverageCheck
from adaloader.planning.mismatch import describe_mismatch
from adaloader.planning.watch import Watch
from adaloader.tables.managed_table import ManagedTable, table_gradients
from adaloader.tables.probation import confirm
from pm.same_step import ANY_BATCH, Stepped

if TYPE_CHECKING:
    from adaloader.checkpoint.exchange import Exchange
    from adaloader.checkpoint.periodic import Periodic
    from adaloader.checkpoint.roll_call import RollCall
    from adaloader.checkpoint.writing import SaveCounts, Saving
    from adaloader.gradients.combining import Combiner
    from adaloader.reading.following import Follower
    from adaloader.tables.joint_writes import JointWrites

log = logging.getLogger("adaloader")

managed_models: weakref.WeakKeyDictionary[nn.Module, ManagedModel] = weakref.WeakKeyDictionary()


class ManagedModel:
    """Everything that the loaders of one model share.

    Invariant: a lookup is matched to one of the open `batches` by comparing ids. Rows change version with
    `optimizer.step()`, not with batches.
    """

    def __init__(self, model: nn.Module, manager: pm.Manager, settings: dict[str, object], strategy: dict[str, str]):
        self.model = weakref.ref(model)
        self.manager = manager
        self.settings = settings
        self.strategy = strategy
        self.tables: list[ManagedTable] = []
        self.optimizers: list[Optimizer] = []
        self.beside: list[nn.Parameter] = []  # not the model's, but held by its optimizers, and averaged with its own
        self.buffers = Buffers()
        self.batches = Batches(manager)
        self.watch = Watch()
        self.coverage = CoverageCheck()
        self.batches.on_finished = self.watch.finished
        self.reducer: DenseReducer | None = None
        self.joining = False
        self.follower: Follower | None = None
        self.combiner: Combiner | None = None
        self.joint_writes: JointWrites | None = None
        self.periodic: Periodic | None = None
        self.roll_call: RollCall | None = None
        self.exchange: Exchange | None = None
        self.saving: Saving | None = None
        self.saves: SaveCounts | None = None
        self.gradient_hooks = GradientHooks(self)
        self.scalers = Scalers()
        self.optimizer_steps = 0
        self._stepping: int | None = None
        self.writes = 0
        self.sessions = 0
        self.sessions_made = 0
        self.process_group = None
        self.recorded_in: Path | None = None
        self.on_table_added: Callable[[ManagedModel, ManagedTable], None] = lambda model, table: None
        self.on_table_held: Callable[[ManagedModel, ManagedTable, Optimizer], None] = lambda *held: None
        self.check_averaged: Callable[[Optimizer], None] = lambda optimizer: None
        self.watched: dict[str, weakref.ref[nn.Parameter]] = {}
        self.dense_because: dict[str, str] = {}
        self.exporting = False
        self.leaving_tables_out = False
        self.exported: dict[tuple[str, bool], torch.Tensor | None] = {}
        self.importing: dict[ManagedTable, torch.Tensor] | None = None
        self._share_of_backward: float | None = None
        self._epoch_end_is_due = self._has_warned = False
        self.state_watches: dict[Optimizer, StateWatch] = {}
        self._pre_hooks: dict[Optimizer, RemovableHandle] = {}
        self._hooks: dict[Optimizer, list[RemovableHandle]] = {}
        self._replaced: list[weakref.ref[Optimizer]] = []
        self._has_stepped_rows: set[Optimizer] = set()  # in the step that is under way

    @property
    def ranks(self) -> int:
        return self.manager.ranks

    @property
    def parted(self) -> bool:
        """Whether the model's last loader was closed here: of several ranks the others may have gone."""
        return self.ranks > 1 and self.sessions == 0 and self.sessions_made > 0

    @property
    def version(self) -> tuple[int, int]:
        """What changes when rows may have changed: steps taken, and writes from outside the optimizer."""
        return self.manager.steps, self.writes

    def table_added(self, table: ManagedTable) -> None:
        """A parameter turned out to be a table when it was first used."""
        self.tables.append(table)
        self.on_table_added(self, table)

    def table_became_dense(self, table: ManagedTable, why: str) -> None:
        """A table is an ordinary parameter from now on, whose gradient is averaged like that of any other."""
        self.tables = [other for other in self.tables if other is not table]  # anew: the planner may be reading it
        self.dense_because[table.name] = why
        model = self.model()
        if self.reducer is not None and model is not None:
            self.reducer.add(table.parameter, table.name, [*model.parameters(), *self.beside])

    def tables_in_order(self) -> list[ManagedTable]:
        """Return the tables in an order that is the same on every rank, whatever each used first."""
        return sorted(self.tables, key=lambda table: table.table.number)

    # Lookups

    def observe(self, table: ManagedTable, ids: torch.Tensor, operation: str, on_host: np.ndarray) -> None:
        """Tell the recorder, if one is watching this step, of a lookup of `ids`, which are `on_host` too (`[n]`)."""
        self.watch.lookup(table.name, ids, operation, on_host)

    def paused(self) -> contextlib.AbstractContextManager:
        """What runs inside is ours: the recorder, if there is one, does not see it."""
        return self.watch.paused()

    def candidates(self, table: ManagedTable) -> list[Batch]:
        """Return the open batches that intend rows of `table`, the one in use first."""
        return self.batches.candidates(table.table.number)

    def used(self, batch: Batch) -> None:
        """A lookup was matched to `batch`."""
        self.batches.used(batch)

    def relooked(self, table: ManagedTable, ids: np.ndarray, samples: int, *, all_intended: bool) -> Batch | None:
        """A lookup of `ids` (int64 `[n]`) was not foreseen: its batch was finished too early, or is not understood yet.
        Return that batch, as far as it can be told; `samples`: see `Batches.unmatched`."""
        if self.batches.looked_up_late(table.table.number, ids):
            return self.batches.current
        with self.paused():
            batch = self.batches.unmatched(ids, samples)
        if not all_intended:
            table.last_mismatch = describe_mismatch(table, batch, ids)
        if batch is not None and not all_intended:
            self.watch.not_foreseen(batch, table.name, ids)
        return batch

    def epoch_ended(self, *, later: bool) -> None:
        """A pass over a loader is over; `later`: the loop still works on a batch of it, and it is when another
        begins."""
        self._epoch_end_is_due = later
        if not later:
            self.manager.epoch_ended()

    def pass_begins(self) -> None:
        """A loader is iterated again."""
        if self._epoch_end_is_due:
            self.epoch_ended(later=False)

    # Gradients

    def weight_of_backward(self) -> tuple[float, float | None]:
        """Return (weight of this rank's present gradient, all ranks' together or None)."""
        if self.joining:
            return self.follower.weight
        weight = self.batches.weight() if self._stepping is None else self.batches.weight_in_step(self._stepping)
        return weight or (1.0, None if self.ranks > 1 else 1.0)

    def sum_begins(self, carries: bool) -> None:
        """A sum of dense gradients begins; `carries` says that gradients gathered inside `no_sync` are in it."""
        self._share_of_backward = None
        if not self.optimizers and not self._has_warned and self.reducer.has_trained:
            self._has_warned = True
            warnings.warn(
                "backward() on several ranks, and no loader was given an optimizer: a rank that has no sample in the "
                "last batch cannot take the others' step along. Pass optimizer= to AdaLoader; if gradients are applied "
                "by hand, or only looked at, drop_last=True keeps ranks together",
                stacklevel=2,
            )
        if self.follower is not None and not self.joining:
            self.follower.announce(carries)

    def backward_reached(self, table: ManagedTable, part: Part) -> None:
        table.hidden = False
        if isinstance(table.table.spec.rule, pm.Frozen) and group_of(self.optimizers, table.parameter) is None:
            raise RuntimeError(
                f"table {table.name!r} received a gradient, but no loader was given an optimizer that holds it: pass "
                "optimizer= to AdaLoader, add the table to one that it was given (optimizer.add_param_group), or set "
                "requires_grad_(False) on it"
            )
        if self.reducer is None:
            part.scale = 1.0
            self.batches.backward_goes_on()
        else:
            self.reducer.touch()
            self._check_share(table, part)
        self.gradient_hooks.reached(table, part)

    def _check_share(self, table: ManagedTable, part: Part) -> None:
        """Raise if one backward is over batches of which this rank has different shares: no one factor is right then
        for its gradient in the average over ranks.
        """
        batch = self.batches.of_plan(table.table.number, part.plan)
        if batch is None:
            return
        weight, total = batch.weight
        share = weight / (total or 1.0)
        other, self._share_of_backward = self._share_of_backward, share
        if other is not None and not math.isclose(other, share, rel_tol=1e-9):
            raise ManagedTableError(
                f"one backward() over several batches, of which this rank has different shares ({other:.4g} and "
                f"{share:.4g} of all ranks'): call backward() once for each batch, whose gradients add up, or leave "
                "the uneven one out (drop_last=True)"
            )

    def reduced(self, factor: float) -> None:
        """The backward that just ended counts `factor` in the average over ranks."""
        self._share_of_backward = None
        for table in self.tables:
            for part in table.parts:
                if part.scale is None:
                    part.scale = factor

    def gradient_goes(self) -> None:
        """The loop clears what tables have gathered."""
        if self.follower is not None:
            self.follower.gradient_goes()

    # Optimizer steps

    def dense_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are not managed tables, those beside the model too."""
        tables = {id(table.parameter) for table in self.tables}
        model = self.model()
        return [] if model is None else [p for p in (*model.parameters(), *self.beside) if id(p) not in tables]

    def attach(self, optimizers: list[Optimizer]) -> None:
        """Have steps of `optimizers` update the managed rows that they hold."""
        for optimizer in optimizers:
            if any(known is optimizer for known in self.optimizers):
                continue
            self.optimizers.append(optimizer)
            this = weakref.ref(self)

            @not_compiled
            def before(optimizer, args, kwargs, this=this):
                return None if this() is None else this()._before_step(optimizer, args, kwargs)

            @not_compiled
            def after(optimizer, args, kwargs, this=this):
                if this() is not None:
                    this()._after_step(optimizer)

            self._pre_hooks[optimizer] = call_last_before_steps(optimizer, before)
            hooks = [self._pre_hooks[optimizer], call_first_after_steps(optimizer, after)]
            self._hooks.setdefault(optimizer, []).extend(hooks)

    def keep_hooks(self, optimizer: Optimizer, hooks: list[RemovableHandle]) -> None:
        """Keep the handles of hooks on `optimizer`, for the time when it is let go."""
        self._hooks.setdefault(optimizer, []).extend(hooks)

    def let_go(self, optimizer: Optimizer) -> None:
        """Another optimizer trains the tables of `optimizer` from now on: it is none of the model's any more, and holds
        nothing for them.
        """
        for hook in self._hooks.pop(optimizer):
            hook.remove()
        del self._pre_hooks[optimizer]
        self.state_watches.pop(optimizer, None)
        for table, _ in self._held_by(optimizer):
            optimizer.state.pop(table.parameter, None)
        self.optimizers = [known for known in self.optimizers if known is not optimizer]
        self._replaced = [known for known in self._replaced if known() is not None] + [weakref.ref(optimizer)]

    def was_let_go(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` was one of the model's until another took its place."""
        return any(known() is optimizer for known in self._replaced)

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Prepare a step; one with a closure, which makes its gradients itself, is prepared after each call of that."""
        if not self.joining:
            self.check_averaged(optimizer)
            self.watch.step_begins()
            if self.follower is not None:
                self.follower.step_begins()
            if optimizer in self.state_watches:
                self.state_watches[optimizer].step_begins(optimizer)
        rules: dict[int, pm.Rule] = {}
        for table, group in self._held_by(optimizer):
            if isinstance(table.table.spec.rule, pm.Frozen):
                self.on_table_held(self, table, optimizer)
                continue
            if id(group) not in rules:
                rules[id(group)] = rule_for(optimizer, group, table.name)
            check_options(table.table.spec, optimizer, group, rules[id(group)])
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        self._has_stepped_rows.discard(optimizer)  # if the one before raised
        if closure is None:
            self._gradients_are_made(optimizer)
            if self._may_step_rows_now(optimizer):
                self._step_rows(optimizer, is_skipped=False)
                self._has_stepped_rows.add(optimizer)
            return None

        def evaluated():
            self._hide_gradients(False)
            loss = closure()
            self._gradients_are_made(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": evaluated}

    def _gradients_are_made(self, optimizer: Optimizer) -> None:
        if self.reducer is not None and not self.joining:
            self._stepping = self._number_of(optimizer)
            try:
                self.reducer.finish_step()
            finally:
                self._stepping = None
        self._hide_gradients(True)

    def _held_by(self, optimizer: Optimizer) -> list[tuple[ManagedTable, dict[str, object]]]:
        """Return the tables that `optimizer` holds, each with its parameter group."""
        groups = groups_by_parameter(optimizer)
        return [(t, groups[id(t.parameter)]) for t in self.tables if id(t.parameter) in groups]

    def _hide_gradients(self, hidden: bool) -> None:
        """Hide them from the optimizer's own step, which rows have no part in."""
        for table in self.tables:
            table.hidden = hidden

    def _may_step_rows_now(self, optimizer: Optimizer) -> bool:
        """Whether to step rows before the optimizer's own step, so that the other ranks, which wait for this rank's
        gradients, have them while that goes on.

        It must make no difference: no other hook comes after ours, which might change hyperparameters yet (see
        `step_hooks.py`), and no scaler says within the step whether it is skipped. If that step then raises, rows have
        been stepped.
        """
        hooks = self._pre_hooks[optimizer].hooks_dict_ref() or {}
        return (
            self.ranks > 1
            and self.manager.in_lockstep
            and not self.joining
            and next(reversed(hooks), None) == self._pre_hooks[optimizer].id
            and getattr(optimizer, "grad_scale", None) is None
            and getattr(optimizer, "found_inf", None) is None
        )

    def _after_step(self, optimizer: Optimizer) -> None:
        self._hide_gradients(False)
        if self.reducer is not None and self.joining:
            self.reducer.finish_step()
        if optimizer in self._has_stepped_rows:
            self._has_stepped_rows.remove(optimizer)
            self.manager.go_on()
        else:
            self._step_rows(optimizer, is_skipped=self._unscale_fused(optimizer))
        for table in self.tables:
            table.whole = None
        if any(table.probation is not None for table in self.tables):
            for table, _ in self._held_by(optimizer):
                if table.probation is not None and table.counts.rows:
                    confirm(table)
        if optimizer in self.state_watches:
            self.state_watches[optimizer].is_as_it_should_be(optimizer)
        if self.follower is not None and not self.joining:
            self.follower.step_taken()

    def _number_of(self, optimizer: Optimizer) -> int:
        return next(at for at, known in enumerate(self.optimizers) if known is optimizer)

    def _step_rows(self, optimizer: Optimizer, *, is_skipped: bool) -> None:
        """Hand the gradients of the rows that `optimizer` holds to the manager; `is_skipped`: there are none."""
        number = self._number_of(optimizer)
        parts, shares, groups, snapshots = [], [], {}, {}
        for table, group in self._held_by(optimizer):
            if id(group) not in snapshots:
                snapshots[id(group)] = snapshot(group)
            groups[table.table.number] = snapshots[id(group)]
            # Without lockstep a rank that follows may not have heard yet that the others cleared what they had stepped.
            is_old = self.joining and table.is_stepped and not self.manager.in_lockstep
            if not is_skipped and not is_old:
                share = table.gradient.share
                if share is None:
                    parts += [(table, part) for part in table.step_parts()]
                else:
                    shares.append(share)
            table.is_stepped = True
        gradients, joint = shares_for_step(shares)
        gradients += table_gradients(parts)
        more: dict[str, Any] = {"joint": joint} if joint else {}  # which only a rank that is alone has
        if self.ranks > 1:
            batches = ANY_BATCH if self.joining else self.batches.of_step()
            more = {"stepped": Stepped(number, hyperparameter_vector(optimizer), batches)}
        finished = self.batches.finish_used(None if self.joining else number)
        self.manager.submit(gradients, groups, finished=finished, **more)
        self.optimizer_steps += 1

    def _unscale_fused(self, optimizer: Optimizer) -> bool:
        """Do to rows what a fused optimizer does itself where a `GradScaler` steps it: unscale gradients. Return
        whether a gradient was not finite, so that the step changes nothing.
        """
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            for table, _ in self._held_by(optimizer):
                table.gradient.scale(1.0 / float(scale))
        found_inf = getattr(optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def describe_hyperparameter(self, optimizer: int, at: int) -> str:
        return hyperparameter_name(self.optimizers[optimizer], at)
