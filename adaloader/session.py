"""One loader's part in managing a model: its settings, its feed, and the state that it shares with the model's other
loaders."""

from __future__ import annotations

import atexit
import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

import pm
from adaloader import adoption
from adaloader.agreement import broadcast
from adaloader.auto_lookahead import AutoLookahead
from adaloader.candidate import decide_now, find_candidates, watch_candidates
from adaloader.combining import Combiner
from adaloader.deferred_tensor import program_of
from adaloader.dense import DenseReducer
from adaloader.explain import Explanation, explain
from adaloader.feed import Feed
from adaloader.following import Follower
from adaloader.gradient_layout import check_modules
from adaloader.iteration import Iteration
from adaloader.managed_model import ManagedModel, managed_models
from adaloader.managed_table import ManagedTable
from adaloader.optimizer_state import hook_optimizer
from adaloader.optimizers import group_of, rule_for
from adaloader.process_group import process_group
from adaloader.random_ids import Passes
from adaloader.ranks import (
    end_job_if_failed,
    end_job_on_failure,
    end_job_unless,
    same_comm,
)
from adaloader.registry import ends, register, this_process
from adaloader.row_cache import cache_rows, lone_manager
from adaloader.sampling import random_state, set_random_state
from adaloader.settings import Settings
from adaloader.state import hook_modules, hook_state_dicts
from adaloader.strategy import resolve_strategy
from adaloader.table_values import all_numbers, all_texts
from adaloader.trainers import bare_optimizer
from adaloader.whereabouts import Whereabouts
from pm.launch import default_comm, launched_ranks

if TYPE_CHECKING:
    from adaloader.checkpoint.periodic import Periodic
    from adaloader.checkpoint.roll_call import RollCall

_ONE_DATASET = (
    "give all ranks the whole dataset, which is shared out here, or all ranks batches of their own: "
    "AdaLoader.wrap(DataLoader(...), ...)"
)

_open_managers: weakref.WeakSet[pm.Manager] = weakref.WeakSet()


class Session:
    """Connects one loader to its managed model, which is made with the model's first loader (collective)."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        settings: Settings,
        order: str,
    ):
        optimizers = _as_list(optimizer)
        _check_model(model)
        self.settings = settings
        managed = managed_models.get(model)
        if managed is None:
            managed = _manage(model, optimizers, settings, order)
        else:
            _check_same_settings(managed, settings)
            _attach_later(managed, optimizers)
        self.managed = managed
        traffic = managed.manager.traffic
        is_auto = settings.lookahead == "auto"
        self.lookahead = AutoLookahead(lambda: traffic.wait_seconds) if is_auto else settings.lookahead
        self.feed = Feed(managed, _keys_by_table(managed, settings.keys), bool(optimizers))
        managed.sessions += 1
        managed.sessions_made += 1
        self._number = managed.sessions_made
        self.draws = Passes(self.rank, self._number)
        self._uneven_iterations = 0
        self.periodic: Periodic | None = None
        self._resumption: Callable[[], None] | None = None
        self._iterations: weakref.WeakSet[Iteration] = weakref.WeakSet()
        # A loader, or an iterator of its, that nobody holds any more leaves no thread behind.
        self._close_feed = weakref.finalize(self, self.feed.close)

    @property
    def rank(self) -> int:
        return self.managed.manager.rank

    @property
    def ranks(self) -> int:
        return self.managed.manager.ranks

    def begin_iteration(self) -> None:
        """A new iteration of the loader begins: what the loop still held of earlier ones is finished.

        Raises:
            RuntimeError: if the loader was closed.
        """
        if not self._close_feed.alive:
            raise RuntimeError("this loader was closed; build another one to go on")
        for iteration in list(self._iterations):
            iteration.end_if_over()
            if iteration.ended:
                iteration.leave()
        if self.managed.follower is not None:
            self.managed.follower.finish()
        self.managed.pass_begins()

    def when_resumed(self, call: Callable[[], None] | None) -> None:
        """Have `call` called when the next iteration has handed out its first batch: what making it drew from random
        generators, the run that goes on from there drew before it was saved."""
        self._resumption = call

    def begin_checkpoints(self, loader, folder, **options) -> None:
        """See `AdaLoader.checkpoint`."""
        from adaloader.checkpoint.periodic import Periodic, default_folder  # which imports loaders

        if self.managed.periodic is not None:
            raise ValueError("a loader of this model makes checkpoints already: close it, or ask for them once")
        where = default_folder() if folder is None else Path(folder)
        made = Periodic(loader, where, **options)
        self.periodic = self.managed.periodic = made

    def take_resumption(self) -> Callable[[], None] | None:
        call, self._resumption = self._resumption, None
        return call

    def leave_iterations(self) -> None:
        """What loops still hold of this loader's iterations is forgotten: the next one begins elsewhere."""
        for iteration in list(self._iterations):
            iteration.end_if_over()
            if not iteration.ended:
                iteration.leave()

    def iteration(
        self,
        weight_of: Callable[[int, Any], tuple[float, float | None]],
        *,
        start: int,
        uneven: bool,
        last_weight: float | None = None,
        end: int | None = None,
    ) -> Iteration:
        """Return what goes with one pass over the loader, whose first batch is number `start`.

        Args:
            weight_of: called with (number, batch): this rank's weight and the sum of all (None: unknown).
            uneven: whether ranks may have different numbers of batches.
            last_weight: what the batches count together that some ranks have no share of, if known.
            end: the number after the last batch, if no rank has more; None if it is not known now.
        """
        following = None
        if uneven and self.feed.steps_expected and self.managed.follower is not None:
            self._uneven_iterations += 1
            following = self.managed.follower.begin(self._number, self._uneven_iterations, last_weight)
        made = Iteration(self.feed, weight_of, start, following, self.draws.next_pass(), end)
        self._iterations.add(made)
        return made

    def lengths_of_ranks(self, batches: int | None) -> list[int] | None:
        """Return how many batches each rank has in the iteration that begins, None if a rank does not know
        (collective).

        Asked only where it saves messages: a model of tables alone has no dense gradients, whose sum would tell the
        sum of weights. Loaders that evaluate need none, and one rank may iterate them alone.
        """
        managed = self.managed
        if managed.reducer is None or managed.reducer.has_trained or not self.feed.steps_expected:
            return None
        known = batches is not None and self.settings.batch_weight is None
        lengths = all_numbers(managed.manager, batches if known else -1)
        return lengths if min(lengths) >= 0 else None

    def watched(self, inner: Iterator) -> Iterator:
        """Return `inner` with the recorder looking away while it reads."""
        return _Unwatched(inner, self.feed)

    def share_random_state(self, generator: torch.Generator | None) -> None:
        """Continue, on every rank, from rank 0's random state (collective)."""
        manager = self.managed.manager
        if manager.ranks > 1:
            state = random_state(generator)
            manager.transport.collective(lambda comm: comm.Ibcast(state, 0), manager.timeout_seconds)
            set_random_state(generator, state)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return what the loaders' `no_sync` returns."""
        reducer = self.managed.reducer
        return contextlib.nullcontext() if reducer is None else reducer.no_sync()

    def stats(self) -> dict[str, Any]:
        """Return counts since the model's first loader was built, on this rank.

        steps: optimizer steps. lookups: unique rows looked up, over all lookups. intent_coverage: share that was
        intended, of those for batches (1.0 before the first; inference between steps does not count). on_demand: all
        that were not intended. wait_seconds: time that the trainer's thread waited for rows, in `next`, lookups and
        `step`. bytes_sent, bytes_received: of rows, gradients, intents. bytes_by_kind: those sent, by kind of message.
        replica_steps: copies of rows that were sent again because they had changed. hops: rows asked of a rank that did
        not have them, which passed that on. late_intents: rows asked for when they might already have been needed.
        machine_ranks: ranks that share memory, this one included. neighbour_rows: rows read from the others' memory.
        memory_bytes: of rows held, with state and index. saves: checkpoints begun, and the bytes (over all ranks) and
        seconds of those that have been waited for, and for how long of that training stood still. tables: the same
        counts of lookups by table, and relocations, rows that this rank gave to another, and replications, rows that it
        copied to another for a batch. device_cache: of each table whose rows are kept on a device, how many there is
        room for (rows, bytes), were looked_up, fetched, late (not there when looked up: miss_rate), evicted,
        written_back. seconds: where time went, on whatever thread.
        """
        managed, manager = self.managed, self.managed.manager
        traffic = manager.counted()
        counts = {table.name: table.counts for table in managed.tables}
        numbers = {table.name: table.table.number for table in managed.tables}
        of_batches = sum(c.of_batches for c in counts.values())
        intended = sum(c.intended for c in counts.values())
        return {
            "steps": managed.optimizer_steps,
            "lookups": sum(c.rows for c in counts.values()),
            "intent_coverage": intended / of_batches if of_batches else 1.0,
            "on_demand": sum(c.on_demand for c in counts.values()),
            "wait_seconds": traffic.wait_seconds,
            "bytes_sent": manager.bytes_sent,
            "bytes_received": manager.bytes_received,
            "bytes_by_kind": manager.bytes_by_kind,
            "relocations": sum(traffic.relocations.values()),
            "replications": sum(traffic.replications.values()),
            "replica_steps": sum(traffic.replica_steps.values()),
            "hops": traffic.hops,
            "late_intents": traffic.late_intents,
            "machine_ranks": manager.machine_ranks,
            "neighbour_rows": traffic.neighbour_rows,
            "memory_bytes": manager.memory_bytes,
            "saves": {"begun": 0} if managed.saves is None else asdict(managed.saves),
            "tables": {
                name: {
                    "lookups": c.rows,
                    "intended": c.intended,
                    "on_demand": c.on_demand,
                    "relocations": traffic.relocations[numbers[name]],
                    "replications": traffic.replications[numbers[name]],
                }
                for name, c in counts.items()
            },
            "device_cache": manager.cache_stats(),
            "seconds": dict(traffic.seconds),
        }

    def explain(self) -> Explanation:
        """Return, per table, how its keys are known, and why it is managed or dense."""
        return explain(self.managed, self.feed, self.managed.watch.recordings)

    def close(self) -> None:
        if not self._close_feed.alive:
            return
        try:
            if self.periodic is not None:
                self.periodic.close()
                self.periodic = self.managed.periodic = None
            if self.managed.saving is not None:
                self._finish_saving()
        finally:
            self._close()

    def _finish_saving(self) -> None:
        from adaloader.checkpoint.saving import finish_saving  # which imports loaders

        finish_saving(self.managed)

    def _close(self) -> None:
        managed = self.managed
        if managed.follower is not None:
            managed.follower.finish()
        for iteration in list(self._iterations):
            iteration.end_if_over()
            iteration.leave()
        self._close_feed()
        managed.sessions -= 1
        if managed.sessions == 0:
            managed.manager.close()


class _Unwatched(Iterator):
    def __init__(self, inner: Iterator, feed: Feed):
        self._inner, self._feed = inner, feed

    def __next__(self):
        with self._feed.reading():
            return next(self._inner)


def _as_list(optimizer) -> list[Optimizer]:
    optimizers = [] if optimizer is None else list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [bare_optimizer(given) for given in optimizers]
    for given in optimizers:
        if not isinstance(given, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {type(given).__name__}")
    return optimizers


def _check_model(model) -> None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"model is wrapped in {type(model).__name__}: pass the model itself (model.module) and call that; "
            f"AdaLoader "
            "averages its gradients over ranks"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"parameter {name!r} is on device meta and has no values: build the model on the CPU, or within "
                "adaloader.deferred_init() where its tables are too large for that"
            )


def _manage(model: nn.Module, optimizers: list[Optimizer], settings: Settings, order: str) -> ManagedModel:
    """Take over the tables of `model` (collective)."""
    comm = settings.comm if settings.comm is not None else default_comm()
    strategy = resolve_strategy(model, settings.strategy)
    found = adoption.find_tables(model, settings.min_rows, strategy)
    specs = adoption.specs_for(found, optimizers, {})  # refuse bad input before anything is changed
    check_modules(model, {spec.name: (spec.rule, spec.group) for spec in specs})
    if comm is None or comm.size == 1:
        manager = lone_manager(found.values(), settings.device_cache_bytes)
    else:
        end_job_on_failure()
        manager = _manager_of_ranks(comm, settings)
        manager.on_failure = partial(end_job_unless, partial(getattr, manager, "failure_is_known"))
        _open_managers.add(manager)
    register(manager.rank, manager.ranks)
    if manager.ranks > 1:
        manager.name_ranks(all_texts(manager, this_process()))
    managed = ManagedModel(model, manager, settings.shared(), strategy)
    if manager.ranks > 1:
        managed.follower = Follower(managed)  # now, as messages for it may come once the others have a loader
        managed.combiner = Combiner(managed)
        managed.roll_call = _roll_call(manager)
    manager.describe_hyperparameter = weakref.WeakMethod(managed.describe_hyperparameter)
    weighted = "no batch_weight" if settings.batch_weight is None else "batch_weight"
    try:
        adoption.agree(manager, "tables or settings", _describe(model, found, optimizers, settings, strategy))
        adoption.agree(manager, "dataset, batches or weights", f"{order}, {weighted}", _ONE_DATASET)
    except ValueError:  # on all ranks
        manager.close()
        raise
    managed.attach(optimizers)
    adoption.adopt(managed, found, adoption.specs_for(found, optimizers, adoption.seeds_of_rank_0(manager, found)))
    cache_rows(managed, settings.device_cache_bytes)
    if manager.ranks > 1:
        _reduce_dense_parameters(managed, model, comm, settings.timeout_seconds)
        end_job_on_failure()  # torch.distributed has set a hook of its own
    watch_candidates(managed, find_candidates(model, {*found, *strategy}, settings.min_rows))
    hook_state_dicts(managed, model)
    managed.on_table_held = _train_from_now_on
    managed.on_table_added = lambda managed, table: hook_modules(managed, managed.model(), [table])
    managed_models[model] = managed
    return managed


def _roll_call(manager: pm.SynchronousManager) -> RollCall:
    from adaloader.checkpoint.roll_call import RollCall  # of a room that imports loaders

    return RollCall(manager)


def _manager_of_ranks(comm, settings: Settings) -> pm.SynchronousManager:
    if settings.staleness == 0:
        return pm.SynchronousManager(
            comm, settings.timeout_seconds, settings.techniques, shared_memory=settings.shared_memory
        )
    return pm.EventualManager(
        comm,
        settings.timeout_seconds,
        staleness=settings.staleness,
        techniques=settings.techniques,
        update_threshold=settings.update_threshold or 0.0,
        max_rounds_per_second=settings.max_rounds_per_second,
    )


def _describe(model, found, optimizers, settings, strategy) -> str:
    parameters = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    programs = [program.describe() for p in found.values() if (program := program_of(p)) is not None]
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    shared = {name: value for name, value in settings.shared().items() if name != "comm"}
    return repr((shared, strategy, list(found), kinds, parameters, programs))


def _reduce_dense_parameters(managed: ManagedModel, model: nn.Module, comm, timeout_seconds: float) -> None:
    tables = {id(table.parameter) for table in managed.tables}
    dense = [(name, p) for name, p in model.named_parameters() if id(p) not in tables]
    group = managed.process_group = process_group(comm, timeout_seconds=timeout_seconds)
    broadcast([p for _, p in dense] + list(model.buffers()), group)
    whereabouts = Whereabouts(managed.manager, lambda: managed.reducer.begun)
    managed.manager.describe_peers = whereabouts.describe
    managed.reducer = DenseReducer(
        dense,
        group,
        weights=managed.weight_of_backward,
        on_reduced=managed.reduced,
        on_begun=managed.sum_begins,
        on_ended=managed.gradient_hooks.backward_ended,
        timeout_seconds=timeout_seconds,
        describe_peers=whereabouts.describe,
        in_vain=whereabouts.why_in_vain,
    )


def _check_same_settings(managed: ManagedModel, settings: Settings) -> None:
    for name, value in settings.shared().items():
        first = managed.settings[name]
        if not (same_comm(value, first) if name == "comm" else value == first):
            raise ValueError(
                f"this model already has a loader with {name}={first!r}, and this one asks for {name}={value!r}; "
                "loaders of one model must agree on that"
            )
    if settings.strategy is not None and resolve_strategy(managed.model(), settings.strategy) != managed.strategy:
        raise ValueError(
            f"this model's first loader had strategy={managed.strategy!r}, and this one asks for "
            f"{dict(settings.strategy)!r}; leave it out, for loaders of one model share it"
        )


def _attach_later(managed: ManagedModel, optimizers: list[Optimizer]) -> None:
    """A later loader brings optimizers that the first one did not have."""
    fresh = [o for o in optimizers if not any(o is known for known in managed.optimizers)]
    for table in managed.tables:
        place = group_of(fresh, table.parameter, table.name)
        if place is None:
            continue
        if not isinstance(table.table.spec.rule, pm.Frozen):
            raise ValueError(
                f"table {table.name!r} is already trained by the optimizer of an earlier loader of this model; a "
                f"table has "
                "one optimizer"
            )
        _train_from_now_on(managed, table, fresh[place[0]])
    managed.attach(fresh)
    for optimizer in fresh:
        hook_optimizer(managed, optimizer)


def _train_from_now_on(managed: ManagedModel, table: ManagedTable, optimizer: Optimizer) -> None:
    """A table that no optimizer held is held by `optimizer` now (collective): a later loader has brought it, or
    `add_param_group` has added the table.
    """
    _, at = group_of([optimizer], table.parameter, table.name)
    group = optimizer.param_groups[at]
    check_modules(managed.model(), {table.name: (rule_for(optimizer, group, table.name), group)})
    adoption.adopt_later(managed, table, optimizer, at)


def _keys_by_table(managed: ManagedModel, keys) -> str | None | dict[ManagedTable, Callable[[Any], Any]]:
    if not isinstance(keys, Mapping):
        return keys
    model = managed.model()
    by_table = {}
    for given, function in keys.items():
        decide_now(given if isinstance(given, nn.Parameter) else dict(model.named_parameters()).get(given))
        table = _find_table(managed, model, given)
        if not callable(function):
            raise TypeError(f"keys= for table {table.name!r} must be a function of a batch, got {function!r}")
        by_table[table] = function
    return by_table


def _find_table(managed: ManagedModel, model: nn.Module, given) -> ManagedTable:
    for table in managed.tables:
        if given is table.parameter or (isinstance(given, str) and given == table.name):
            return table
    if isinstance(given, nn.Module):
        for parameter in given.parameters(recurse=False):
            for table in managed.tables:
                if table.parameter is parameter:
                    return table
    if isinstance(given, str):
        names = dict(model.named_parameters(remove_duplicate=False))
        names.update({name: getattr(m, "weight", None) for name, m in model.named_modules()})
        for table in managed.tables:
            if names.get(given) is table.parameter:
                return table
    names = [table.name for table in managed.tables]
    shown = given if isinstance(given, str) else type(given).__name__
    raise ValueError(f"keys= names {shown!r}, which is no managed table; managed are {names}")


if launched_ranks() > 1:
    end_job_on_failure()  # from now on: what fails before the first loader is built would leave the others waiting


@atexit.register
def _serve_until_all_are_done() -> None:
    """A rank that ends keeps serving its rows until the others have ended too."""
    end_job_if_failed()
    if "adaloader.checkpoint.writing" in sys.modules:
        sys.modules["adaloader.checkpoint.writing"].finish_at_exit()
    managers = list(_open_managers)
    for linger in (False, True):  # say so of all of them before waiting for any: ranks may not have the same order
        for manager in managers:
            manager.close(linger=linger)
    error = getattr(sys, "last_value", None)
    ends("" if error is None else type(error).__name__)
