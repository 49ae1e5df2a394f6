"""An optimizer's state_dict with the state that records hold for it, as plain tensors, and back into the records."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import pm
from adaloader.model.gathering import (
    check_memory,
    exporting,
    have_all_steps,
    importing,
    managed_of,
    refuse_on_several_ranks,
    snapshots,
    table_for_state_dict,
)
from adaloader.model.managed_model import ManagedModel
from adaloader.optimizers.held_state import (
    HeldState,
    continue_from,
    entry_names,
    is_held_from_the_start,
    scalar,
    state_names,
    state_shape,
)
from adaloader.optimizers.optimizer_layout import broadcast_optimizer_state
from adaloader.optimizers.state_watch import StateWatch
from adaloader.overrides.constant import constant_tensor
from adaloader.ranks.table_values import load_states, numbers_of_rank_0, text_of_rank_0
from adaloader.tables.candidate import agree_on_candidates, state_was_loaded
from adaloader.tables.joint_writes import Write, refused_while_following
from adaloader.tables.managed_table import ManagedTable
from adaloader.tables.probation import confirm


def full_optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return `optimizer.state_dict()` with whole tables' state as plain tensors on rank 0, {} elsewhere (collective).

    Tensors are on the CPU, and do not change when training goes on. The result loads in plain PyTorch, and over any
    number of ranks.

    Raises:
        ValueError: if no AdaLoader manages the model, or none was given the optimizer.
        MemoryError: on every rank, if rank 0 lacks the memory.
    """
    managed = _managed_with(model, optimizer)
    managed.manager.settle()
    agree_on_candidates(managed)
    held = [table for _, table in _indexed_tables(managed, optimizer)]
    check_memory(managed, sum(t.table.spec.rows * _state_bytes(t) for t in held))
    with exporting(managed):
        state = optimizer.state_dict()
        if managed.manager.rank:
            return {}
        return {**state, "state": {index: snapshots(managed, entry) for index, entry in state["state"].items()}}


def load_full_optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer, state_dict: Mapping[str, Any] | None
) -> None:
    """Load rank 0's `state_dict` (from `full_optimizer_state_dict` or plain PyTorch) on all ranks (collective).

    State of dense parameters, of tables and hyperparameters all come from rank 0; other ranks' argument is not read.

    Raises:
        ValueError: if no AdaLoader manages the model or none was given the optimizer; on every rank and before
            anything is changed, if the dictionary does not fit the optimizer.
    """
    managed = _managed_with(model, optimizer)
    manager = managed.manager
    manager.settle()
    agree_on_candidates(managed)
    problem = text_of_rank_0(manager, _problem(managed, optimizer, state_dict) if manager.rank == 0 else "")
    if problem:
        raise ValueError(problem)
    whole = _entries(optimizer, managed, state_dict) if manager.rank == 0 else {}
    dense = _without(state_dict, whole) if manager.rank == 0 else None
    dense = broadcast_optimizer_state(manager, dense)
    with importing(managed):
        optimizer.load_state_dict(dense)
    for _, table in _indexed_tables(managed, optimizer):
        if state_names(table.table.spec.rule):
            _, entry = whole.get(table, (None, {}))
            (present,) = numbers_of_rank_0(manager, [int(_has_state(table, entry))])
            _load_table(managed, optimizer, table, entry if present else None)
    state_was_loaded(managed)


def hook_optimizer(managed: ManagedModel, optimizer: Optimizer) -> None:
    """Have the optimizer's `state_dict` and `load_state_dict` know the rows of managed tables."""
    to_managed = weakref.ref(managed)

    def saved(optimizer, state_dict):
        managed = to_managed()
        state = state_dict["state"]
        for index, table in _indexed_tables(managed, optimizer) if managed is not None else ():
            if managed.leaving_tables_out:
                state.pop(index, None)
            elif (index in state or table.table.begun) and state_names(table.table.spec.rule):
                if not managed.manager.gives_states(table.table):
                    refuse_on_several_ranks(
                        managed, "optimizer.state_dict()", "full_optimizer_state_dict(model, optimizer)"
                    )
                group = next(g for g in optimizer.param_groups if any(p is table.parameter for p in g["params"]))
                state[index] = saved_entry(managed, table, group, state.get(index, {}))
        state_dict["state"] = dict(sorted(state.items()))
        return state_dict

    def before_loading(optimizer, state_dict):
        managed = to_managed()
        if managed is None or managed.importing is not None or not _entries_needed(managed, optimizer):
            return
        have_all_steps(managed)
        problem = _problem(managed, optimizer, state_dict)
        if problem:
            raise ValueError(problem)

    def loaded(optimizer):
        managed = to_managed()
        if managed is None:
            return
        managed.state_watches[optimizer].is_as_it_should_be(optimizer)
        if managed.importing is not None:
            return
        tables = [table for _, table in _indexed_tables(managed, optimizer) if state_names(table.table.spec.rule)]
        if tables:
            _meet_to_load(managed, tables)
        for table in tables:
            entry = optimizer.state.get(table.parameter, {})
            (present,) = numbers_of_rank_0(managed.manager, [int(_has_state(table, entry))])
            _load_table(managed, optimizer, table, entry if present else None)
        state_was_loaded(managed)

    def reset(optimizer):
        managed = to_managed()
        tables = [table for _, table in _indexed_tables(managed, optimizer) if state_names(table.table.spec.rule)]
        if tables:
            refuse_on_several_ranks(
                managed,
                f"optimizer.state of {type(optimizer).__name__} was emptied",
                "load_full_optimizer_state_dict(model, optimizer, state_dict) with that of a new optimizer",
            )
        for table in tables:
            _load_table(managed, optimizer, table, None)

    managed.state_watches[optimizer] = StateWatch(reset)
    hooks = [
        optimizer.register_state_dict_post_hook(saved),
        optimizer.register_load_state_dict_pre_hook(before_loading),
        optimizer.register_load_state_dict_post_hook(loaded),
    ]
    managed.keep_hooks(optimizer, hooks)


def _meet_to_load(managed: ManagedModel, tables: list[ManagedTable]) -> None:
    """Wait until all ranks load the state of an optimizer of these tables (collective).

    Raises:
        ManagedTableError: if one of them does not run the line, as it has run out of batches before the others.
    """
    if managed.joint_writes is not None:
        loading = managed.joint_writes.meet(Write.OPTIMIZER_STATE, tables[0].name)
        if len(loading) < managed.ranks:
            raise refused_while_following(tables[0].name, loading)
    managed.manager.settle()
    agree_on_candidates(managed)


def saved_entry(
    managed: ManagedModel, table: ManagedTable, group: Mapping[str, Any], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a parameter's entry of the optimizer's state_dict with what the records hold.

    Args:
        managed: the model.
        table: its table.
        group: the parameter's group.
        entry: what the optimizer itself holds; nothing where it makes its state at the first step.
    """
    whole, rule = table_for_state_dict(managed, table, states=True), table.table.spec.rule
    names, words = state_names(rule), table.table.store.record_class.state_words
    width, shape = words // len(names), state_shape(rule, table.parameter.shape)
    saved = dict(entry)
    for name in entry_names(rule):
        if name == "step":
            saved[name] = _step_as_held(table, group, entry)
        elif name == "mu_product":
            saved[name] = torch.from_numpy(np.array(table.table.history.mu_product))
        else:
            at = names.index(name) * width
            saved[name] = None if whole is None else whole[:, at : at + width].view(shape)
    return saved


def _step_as_held(table: ManagedTable, group: Mapping[str, Any], entry: Mapping[str, Any]) -> torch.Tensor | int:
    """Return the count of steps in the form in which the optimizer holds it."""
    steps = table.table.gradient_steps
    if "step" in entry:
        held = entry["step"]
        return torch.full_like(held, steps) if torch.is_tensor(held) else type(held)(steps)
    if isinstance(table.table.spec.rule, pm.SparseAdam):
        return steps
    double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    return torch.tensor(float(steps), dtype=torch.float64 if double else torch.float32)


def _has_state(table: ManagedTable, entry: Mapping[str, Any]) -> bool:
    return any(entry.get(name) is not None for name in state_names(table.table.spec.rule))


def _load_table(
    managed: ManagedModel, optimizer: Optimizer, table: ManagedTable, entry: Mapping[str, Any] | None
) -> None:
    """Move a table's entry of a loaded state_dict (None: it has none) into the records; collective where that is.

    Only rank 0's entry has the parts; where the optimizer keeps its state it is left placeholders.
    """
    manager, rule, names = managed.manager, table.table.spec.rule, state_names(table.table.spec.rule)
    shape = state_shape(rule, table.parameter.shape)
    state = optimizer.state.get(table.parameter, {})
    held = HeldState(steps=int(state.get("step", 0)), begun=True, mu_product=scalar(state.get("mu_product", 1.0)))
    if table.probation is not None:
        entry = None if entry is None else dict(entry)
        confirm(table)  # and with that what the optimizer holds is freed
    if entry is None:
        if table.table.begun:
            with manager.still():
                manager.reset_states(table.table)
        continue_from(table.table, HeldState())
        return
    is_source = all(name in entry for name in names)
    load_states(manager, table.table, [_dense(entry[name]) for name in names] if is_source else None)
    for name in names:
        optimizer.state[table.parameter][name] = constant_tensor(
            shape, float("nan"), dtype=table.parameter.dtype, device="cpu"
        )
    continue_from(table.table, held)


def _dense(value: torch.Tensor) -> torch.Tensor:
    return value if value.layout == torch.strided else value.to_dense()


def _managed_with(model: nn.Module, optimizer: Optimizer) -> ManagedModel:
    managed = managed_of(model, "the optimizer's own state_dict() and load_state_dict()")
    if not any(known is optimizer for known in managed.optimizers):
        raise ValueError(
            f"this {type(optimizer).__name__} was given to no AdaLoader of the model: pass it as optimizer=, or use "
            "its own state_dict() and load_state_dict()"
        )
    return managed


def _indexed_tables(managed: ManagedModel, optimizer: Optimizer) -> Iterator[tuple[int, ManagedTable]]:
    """Yield (index in the optimizer's state_dict, table) of the managed tables that `optimizer` holds."""
    by_parameter = {id(table.parameter): table for table in managed.tables}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if id(parameter) in by_parameter:
            yield index, by_parameter[id(parameter)]


def _state_bytes(table: ManagedTable) -> int:
    return table.table.store.record_class.state_words * table.parameter.element_size()


def _entries_needed(managed: ManagedModel, optimizer: Optimizer) -> bool:
    return any(state_names(table.table.spec.rule) for _, table in _indexed_tables(managed, optimizer))


def _entries(optimizer: Optimizer, managed: ManagedModel, state_dict) -> dict[ManagedTable, tuple[Any, dict]]:
    """Return (the parameter's id in `state_dict`, its entry) of each table with state per value."""
    ids = [id_ for group in state_dict["param_groups"] for id_ in group["params"]]
    return {
        table: (ids[index], state_dict["state"].get(ids[index], {}))
        for index, table in _indexed_tables(managed, optimizer)
        if state_names(table.table.spec.rule)
    }


def _without(state_dict, whole: dict[ManagedTable, tuple[Any, dict]]) -> dict[str, Any]:
    """Return `state_dict` without the tensors of the tables' size."""
    state = dict(state_dict["state"])
    for table, (id_, entry) in whole.items():
        per_value = state_names(table.table.spec.rule)
        state[id_] = {name: value for name, value in entry.items() if name not in per_value}
    return {"state": state, "param_groups": state_dict["param_groups"]}


def _problem(managed: ManagedModel, optimizer: Optimizer, state_dict) -> str:
    """Return why `state_dict` does not fit the optimizer, an empty text if it does."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        return f"expected an optimizer's state_dict with state and param_groups, got {type(state_dict).__name__}"
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != expected:
        return (
            f"the state_dict's parameter groups have {sizes} parameters, the {type(optimizer).__name__}'s have "
            f"{expected}; build the optimizer over the same parameters in the same order"
        )
    for table, (_, entry) in _entries(optimizer, managed, state_dict).items():
        rule = table.table.spec.rule
        if not (_has_state(table, entry) or is_held_from_the_start(rule)):
            continue  # the optimizer had not come to a step with this table
        expected = state_shape(rule, table.parameter.shape)
        for name in state_names(rule):
            shape = tuple(getattr(entry.get(name), "shape", ()))
            if shape != expected:
                has = f"has shape {shape}" if name in entry else "is missing"
                return (
                    f"the state_dict's {name!r} of table {table.name!r} {has}; the table's state has shape {expected}"
                )
    return ""
