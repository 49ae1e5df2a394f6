"""An optimizer's state_dict with the state that records hold for it, as plain tensors, and back into the records."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from adaloader.candidate import agree_on_candidates, state_was_loaded
from adaloader.deferred_tensor import constant_tensor
from adaloader.gathering import (
    check_memory,
    exporting,
    gather_table,
    importing,
    managed_of,
    refuse_on_several_ranks,
    snapshots,
)
from adaloader.held_state import state_names
from adaloader.managed_model import ManagedModel
from adaloader.managed_table import ManagedTable
from adaloader.optimizer_layout import broadcast_optimizer_state
from adaloader.probation import confirm
from adaloader.table_values import load_states, text_of_rank_0


def full_optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return `optimizer.state_dict()` with whole tables' state as plain tensors on rank 0, {} elsewhere (collective).

    Tensors are on the CPU, and do not change when training goes on. The result loads in plain PyTorch, and over any
    number of ranks.

    Raises:
        ValueError: if no AdaLoader manages the model, or none was given the optimizer.
        MemoryError: on every rank, if rank 0 lacks the memory.
    """
    managed = _managed_with(model, optimizer)
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
        _, entry = whole.get(table, (None, {}))
        _load_table(managed, optimizer, table, entry, collective=True)
    state_was_loaded(managed)


def hook_optimizer(managed: ManagedModel, optimizer: Optimizer) -> None:
    """Have the optimizer's `state_dict` and `load_state_dict` know the rows of managed tables."""
    to_managed = weakref.ref(managed)

    def saved(optimizer, state_dict):
        managed = to_managed()
        for index, table in _indexed_tables(managed, optimizer) if managed is not None else ():
            if index in state_dict["state"] and state_names(table.table.spec.rule):
                refuse_on_several_ranks(
                    managed, "optimizer.state_dict()", "full_optimizer_state_dict(model, optimizer)"
                )
                state_dict["state"][index] = saved_entry(managed, table, state_dict["state"][index])
        return state_dict

    def before_loading(optimizer, state_dict):
        managed = to_managed()
        if managed is None or managed.importing is not None or not _entries_needed(managed, optimizer):
            return
        refuse_on_several_ranks(
            managed, "optimizer.load_state_dict()", "load_full_optimizer_state_dict(model, optimizer, state_dict)"
        )
        problem = _problem(managed, optimizer, state_dict)
        if problem:
            raise ValueError(problem)

    def loaded(optimizer):
        managed = to_managed()
        if managed is None or managed.importing is not None:
            return
        for _, table in _indexed_tables(managed, optimizer):
            _load_table(managed, optimizer, table, optimizer.state.get(table.parameter, {}), collective=False)
        state_was_loaded(managed)

    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_post_hook(loaded)


def saved_entry(managed: ManagedModel, table: ManagedTable, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's entry of the optimizer's state_dict with what the records hold."""
    whole = gather_table(managed, table, states=True)
    names, dim = state_names(table.table.spec.rule), table.table.spec.dim
    saved = dict(entry)
    if "step" in entry:
        saved["step"] = torch.full_like(torch.as_tensor(entry["step"]), table.table.gradient_steps)
    for at, name in enumerate(names):
        saved[name] = None if whole is None else whole[:, at * dim : (at + 1) * dim]
    return saved


def _load_table(
    managed: ManagedModel, optimizer: Optimizer, table: ManagedTable, entry: Mapping[str, Any], *, collective: bool
) -> None:
    """Move a table's entry of a loaded state_dict into the records, and leave placeholders in the optimizer."""
    names = state_names(table.table.spec.rule)
    if table.probation is not None:
        entry = dict(entry)
        confirm(table)  # and with that what the optimizer holds is freed
    if names:
        here = managed.manager.rank == 0 or not collective
        whole = torch.cat([entry[name] for name in names], dim=1) if here and len(names) > 1 else None
        load_states(managed.manager, table.table, entry[names[0]] if here and whole is None else whole)
        state = optimizer.state[table.parameter]
        for name in names:
            state[name] = constant_tensor(
                table.parameter.shape, float("nan"), dtype=table.parameter.dtype, device="cpu"
            )
    table.table.gradient_steps = int(optimizer.state.get(table.parameter, {}).get("step", 0))


def _managed_with(model: nn.Module, optimizer: Optimizer) -> ManagedModel:
    managed = managed_of(model, "the optimizer's own state_dict() and load_state_dict()")
    if not any(known is optimizer for known in managed.optimizers):
        raise ValueError(
            f"this {type(optimizer).__name__} was given to no AdaLoader of the model: pass it as optimizer=, or use "
            f"its "
            "own state_dict() and load_state_dict()"
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
        for name in state_names(table.table.spec.rule):
            shape = tuple(getattr(entry.get(name), "shape", ()))
            if shape != tuple(table.parameter.shape):
                has = f"has shape {shape}" if name in entry else "is missing"
                return (
                    f"the state_dict's {name!r} of table {table.name!r} {has}; the table's state has shape "
                    f"{tuple(table.parameter.shape)}"
                )
    return ""
