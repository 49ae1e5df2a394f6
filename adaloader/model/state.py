"""Leaving and coming back: a model's state as plain tensors under its own names, from rows on all ranks and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adaloader.model.gathering import (
    check_memory,
    exporting,
    importing,
    managed_of,
    snapshots,
    table_for_state_dict,
)
from adaloader.model.managed_model import ManagedModel
from adaloader.optimizers.optimizer_state import hook_optimizer
from adaloader.ranks.agreement import broadcast
from adaloader.ranks.table_values import numbers_of_rank_0, text_of_rank_0
from adaloader.tables.candidate import agree_on_candidates
from adaloader.tables.managed_table import ManagedTable
from adaloader.tables.table_parameter import TableParameter
from adaloader.tables.writes import set_whole

_INSTEAD = "its own state_dict() and load_state_dict()"


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole state of `model` as plain CPU tensors under its own names on rank 0, {} elsewhere (collective).

    The result loads in plain PyTorch, and does not change when training goes on. A deferred table is built whole here,
    rows that were never touched included.

    Raises:
        ValueError: if no AdaLoader manages the model.
        RuntimeError: on several ranks, if the model's last loader was closed.
        MemoryError: on every rank, if rank 0 lacks the memory; says how many bytes are needed and free.
    """
    managed = managed_of(model, _INSTEAD)
    agree_on_candidates(managed)
    check_memory(managed, sum(t.parameter.numel() * t.parameter.element_size() for t in managed.tables))
    with exporting(managed):
        state = model.state_dict()
        return {} if managed.manager.rank else snapshots(managed, state)


def load_full_state_dict(model: nn.Module, state_dict: Mapping[str, Any] | None, *, strict: bool = True) -> None:
    """Load rank 0's `state_dict` (from `full_state_dict` or plain PyTorch) into the model on all ranks (collective).

    Other ranks' argument is not read. Optimizer state stays as it is. What a module's own `set_extra_state` takes is
    given to rank 0's alone.

    Raises:
        ValueError: if no AdaLoader manages the model.
        RuntimeError: as `Module.load_state_dict`, on every rank and before anything is changed, if entries are missing
            or unexpected (with `strict`) or of another shape; on several ranks, if the model's last loader was closed.
    """
    managed = managed_of(model, _INSTEAD)
    manager = managed.manager
    manager.settle()
    agree_on_candidates(managed)
    dense = list({id(t): t for t in (*managed.dense_parameters(), *model.buffers())}.values())
    problem, loaded, tables = "", [], {}
    if manager.rank == 0:
        problem, loaded, tables = _load_here(managed, model, dense, state_dict, strict)
    problem = text_of_rank_0(manager, problem)
    if problem:
        raise RuntimeError(problem)
    in_order = managed.tables_in_order()
    flags = [int(table in tables) for table in in_order] + (loaded or [0] * len(dense))
    flags = numbers_of_rank_0(manager, flags)
    for table in in_order:
        if flags.pop(0):
            set_whole(managed, table, tables.get(table))
    broadcast([t for t, is_loaded in zip(dense, flags, strict=True) if is_loaded], managed.process_group)
    managed.writes += 1


def _load_here(managed: ManagedModel, model, dense: list[torch.Tensor], state_dict, strict: bool):
    """Load dense tensors on this rank; return (problem, for each of them whether it was loaded, the tables' values).

    PyTorch itself reads the dictionary, so that hooks and messages are its own; should it find a problem, what it has
    loaded by then is put back.
    """
    before = [tensor.detach().clone() for tensor in dense]
    versions = [_version(tensor) for tensor in dense]
    problem = ""
    with importing(managed) as tables:
        try:
            model.load_state_dict(state_dict, strict=strict)
        except (RuntimeError, TypeError) as error:
            problem = str(error)
    if problem:
        with torch.no_grad():
            for tensor, old in zip(dense, before, strict=True):
                tensor.copy_(old)
    return problem, [int(_version(t) != v or v < 0) for t, v in zip(dense, versions, strict=True)], tables


def _version(tensor: torch.Tensor) -> int:
    """Return a number that every write changes, -1 for tensors that count none."""
    return -1 if tensor.is_inference() else tensor._version


def hook_state_dicts(managed: ManagedModel, model: nn.Module) -> None:
    """Have `state_dict()` of the model and its optimizers give plain tensors."""
    hook_modules(managed, model, managed.tables)
    for optimizer in managed.optimizers:
        hook_optimizer(managed, optimizer)


def hook_modules(managed: ManagedModel, model: nn.Module, tables: list[ManagedTable]) -> None:
    """Have `state_dict()` of the modules that hold `tables` know their rows."""
    held = {id(table.parameter) for table in tables}
    for module in model.modules():
        if any(id(parameter) in held for parameter in module._parameters.values()):
            module.register_state_dict_post_hook(_WithRows(managed))


class _WithRows:
    """Puts rows in place of the managed tables that a module holds at the time; a copy of the module holds none."""

    def __init__(self, managed: ManagedModel | None):
        self._managed = managed

    def __call__(self, module, state_dict, prefix, local_metadata):
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, TableParameter) or prefix + name not in state_dict:
                continue
            if self._managed.leaving_tables_out:
                del state_dict[prefix + name]
                continue
            gathered = table_for_state_dict(self._managed, parameter._managed)
            if gathered is None:
                del state_dict[prefix + name]
            else:
                state_dict[prefix + name] = gathered

    def __deepcopy__(self, memo):
        return _WithRows(None)

    def __reduce__(self):
        return _WithRows, (None,)
