"""Beginning to manage a model: its tables move into a manager, its dense parameters get their sums over ranks."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

import pm
from adaloader.deferred.deferred_tensor import program_of
from adaloader.dense.parameters import DenseReducer
from adaloader.dense.process_group import process_group
from adaloader.gradients.combining import Combiner
from adaloader.model import adoption, averaged
from adaloader.model.later_optimizers import attach_later, train_from_now_on
from adaloader.model.managed_model import ManagedModel, managed_models
from adaloader.model.row_cache import cache_rows, lone_manager
from adaloader.model.state import hook_modules, hook_state_dicts
from adaloader.model.strategy import resolve_strategy
from adaloader.model.trainers import bare_optimizer
from adaloader.optimizers.gradient_layout import check_modules
from adaloader.ranks.agreement import broadcast
from adaloader.ranks.communicator import end_job, end_job_if_failed, end_job_on_failure, end_job_unless, same_comm
from adaloader.ranks.registry import ends, register, this_process
from adaloader.ranks.table_values import all_texts
from adaloader.ranks.whereabouts import Whereabouts
from adaloader.reading.following import Follower
from adaloader.recording import begin_record, check_same_record, open_record
from adaloader.settings import Settings
from adaloader.tables.candidate import find_candidates, watch_candidates
from adaloader.tables.joint_writes import JointWrites
from pm.launch import await_all, default_comm, launched_ranks

if TYPE_CHECKING:
    from adaloader.checkpoint.roll_call import RollCall

_ONE_DATASET = (
    "give all ranks the whole dataset, which is shared out here, or all ranks batches of their own: "
    "AdaLoader.wrap(DataLoader(...), ...)"
)

_open_managers: weakref.WeakSet[pm.Manager] = weakref.WeakSet()


def manage(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None, settings: Settings, order: str
) -> ManagedModel:
    """Return what manages `model`: made with its first loader, and given a later one's optimizers (collective).

    Args:
        model: the user's.
        optimizer: as the loader was given it.
        settings: of the loader.
        order: how its batches are shared among ranks; all ranks must say the same.

    Raises:
        TypeError: for a model or an optimizer that is none.
        ValueError: for what cannot be managed, settings other than an earlier loader's, and ranks that differ.
        RuntimeError: on several ranks, once the model's last loader was closed here.
    """
    optimizers = _as_list(optimizer)
    _check_model(model)
    managed = managed_models.get(model)
    if managed is None:
        return _manage(model, optimizers, settings, order)
    if managed.parted:
        raise RuntimeError(
            f"the last loader of this {type(model).__name__} was closed, so that the {managed.ranks} ranks over which "
            "its tables are spread have parted: build the next loader before closing the last one"
        )
    _check_same_settings(managed, settings)
    attach_later(managed, optimizers)
    averaged.take_in(managed, managed.optimizers)
    return managed


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
            "AdaLoader averages its gradients over ranks"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} has no shape yet, for its module is lazy: call the model once on a batch (under "
                "torch.no_grad(), before its optimizer is made), then build AdaLoader"
            )
        if parameter.device.type == "meta":
            raise ValueError(
                f"parameter {name!r} is on device meta and has no values: build the model on the CPU, or within "
                "adaloader.deferred_init() where its tables are too large for that"
            )


def _manage(model: nn.Module, optimizers: list[Optimizer], settings: Settings, order: str) -> ManagedModel:
    """Take over the tables of `model` (collective)."""
    comm = settings.comm if settings.comm is not None else default_comm()
    strategy = resolve_strategy(model, settings.strategy)
    found = adoption.find_tables(model, settings.min_rows, strategy, 1 if comm is None else comm.size)
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
        managed.joint_writes = JointWrites(managed)
        managed.roll_call = _roll_call(manager)
    manager.describe_hyperparameter = weakref.WeakMethod(managed.describe_hyperparameter)
    weighted = "no batch_weight" if settings.batch_weight is None else "batch_weight"
    recorder = None
    try:
        recorder = open_record(manager, settings.record)
        adoption.agree(manager, "tables or settings", _describe(model, found, optimizers, settings, strategy))
        adoption.agree(manager, "dataset, batches or weights", f"{order}, {weighted}", _ONE_DATASET)
    except (ValueError, OSError):  # on all ranks
        if recorder is not None:
            recorder.close()
        manager.close()
        raise
    if recorder is not None:
        begin_record(managed, recorder, settings)
    managed.attach(optimizers)
    if manager.ranks > 1:
        averaged.released_by_others(model)
    adoption.adopt(managed, found, adoption.specs_for(found, optimizers, adoption.seeds_of_rank_0(manager, found)))
    cache_rows(managed, settings.device_cache_bytes)
    if manager.ranks > 1:
        _reduce_dense_parameters(managed, model, comm, settings.timeout_seconds)
        end_job_on_failure()  # torch.distributed has set a hook of its own
    watch_candidates(managed, find_candidates(model, {*found, *strategy}, settings.min_rows))
    hook_state_dicts(managed, model)
    managed.on_table_held = train_from_now_on
    managed.on_table_added = lambda managed, table: hook_modules(managed, managed.model(), [table])
    managed_models[model] = managed
    return managed


def _roll_call(manager: pm.SynchronousManager) -> RollCall:
    from adaloader.checkpoint.roll_call import RollCall  # of a room that imports loaders

    return RollCall(manager)


def _manager_of_ranks(comm, settings: Settings) -> pm.SynchronousManager:
    await_all(comm)
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
        shared_memory=settings.shared_memory,
    )


def _describe(model, found, optimizers, settings, strategy) -> str:
    named = [*model.named_parameters(), *averaged.held_beside(model, optimizers)]
    parameters = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in named]
    programs = [program.describe() for p in found.values() if (program := program_of(p)) is not None]
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    shared = {name: value for name, value in settings.shared().items() if name != "comm"}
    return repr((shared, strategy, list(found), kinds, parameters, programs))


def _reduce_dense_parameters(managed: ManagedModel, model: nn.Module, comm, timeout_seconds: float) -> None:
    tables = {id(table.parameter) for table in managed.tables}
    beside = averaged.held_beside(model, managed.optimizers)
    managed.beside = [p for _, p in beside]
    dense = [(name, p) for name, p in model.named_parameters() if id(p) not in tables] + beside
    group = managed.process_group = process_group(comm, timeout_seconds=timeout_seconds)
    broadcast([p for _, p in dense] + list(model.buffers()), group)
    whereabouts = Whereabouts(managed.manager, lambda: managed.reducer.begun)
    managed.manager.describe_peers = whereabouts.describe
    managed.check_averaged = partial(averaged.check_averaged, weakref.proxy(managed))
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
    check_same_record(managed, settings)
    if settings.strategy is not None and resolve_strategy(managed.model(), settings.strategy) != managed.strategy:
        raise ValueError(
            f"this model's first loader had strategy={managed.strategy!r}, and this one asks for "
            f"{dict(settings.strategy)!r}; leave it out, for loaders of one model share it"
        )


# A worker that is forked inherits garbage that is not its own to free: communicators, and process groups whose threads
# it has not got, so that freeing them crashes it.
os.register_at_fork(after_in_child=gc.freeze)
# Nor are the managers: their threads are its parent's, and a child that ends would wait for them.
os.register_at_fork(after_in_child=_open_managers.clear)

if launched_ranks() > 1:
    end_job_on_failure()  # from now on: what fails before the first loader is built would leave the others waiting


@atexit.register
def _serve_until_all_are_done() -> None:
    """A rank that ends keeps serving its rows until the others have ended too."""
    end_job_if_failed()
    try:
        _close_managers()
    except BaseException as error:
        if launched_ranks() == 1:
            raise
        traceback.print_exception(error)
        end_job(type(error))  # others wait for this rank, and an exit function that fails ends nothing by itself


def _close_managers() -> None:
    if "adaloader.checkpoint.writing" in sys.modules:
        sys.modules["adaloader.checkpoint.writing"].finish_at_exit()
    managers = list(_open_managers)
    for linger in (False, True):  # say so of all of them before waiting for any: ranks may not have the same order
        for manager in managers:
            manager.close(linger=linger)
    error = getattr(sys, "last_value", None)
    signals = sys.modules.get("adaloader.checkpoint.signals")
    if error is not None or signals is None:
        ends("" if error is None else type(error).__name__)
        return
    ends(signals.name_of_waiting())
    signals.end_by_waiting()
