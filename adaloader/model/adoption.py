"""Taking over tables: which parameters are tables, and how their values and optimizer state become rows."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import pm
from adaloader.deferred.deferred_tensor import DeferredTensor, program_of, take_over
from adaloader.deferred.init_program import DeferredInitError
from adaloader.deferred.program_fill import ProgramFill
from adaloader.memory.device_memory import KINDS
from adaloader.model.managed_model import ManagedModel, log
from adaloader.optimizers.held_state import (
    HeldState,
    continue_from,
    free_state,
    held_anywhere,
    hyperparameters,
    starting_from,
)
from adaloader.optimizers.supported import group_of, rule_for
from adaloader.ranks.table_values import all_texts, broadcast_array, load_states
from adaloader.tables.managed_table import ManagedTable
from adaloader.tables.probation import Probation
from adaloader.tables.table_parameter import TableParameter, become_table

_TABLE_MODULES = (nn.Embedding, nn.EmbeddingBag)
_MASK64 = (1 << 64) - 1
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def find_tables(
    model: nn.Module, min_rows: int, strategy: Mapping[str, str], ranks: int = 1
) -> dict[str, nn.Parameter]:
    """Return the parameters to manage by name, in the model's order: deferred ones, and embeddings of `min_rows`.

    On several ranks those with `max_norm` too, however few rows they have: a lookup scales rows down, and of a dense
    parameter each rank would scale those alone that it looks up itself. `strategy` may say otherwise of a name.

    Raises:
        ValueError: for a table on a device that is neither the CPU nor CUDA's, one that shares its memory with another
            parameter or buffer, or one that a loader of another model manages, naming it.
        DeferredInitError: for deferred rows without an initial value, and deferred tensors that are no whole parameter.
    """
    owners = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    found = {}
    for name, parameter in model.named_parameters():
        modules = owners[id(parameter)]
        if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
            continue  # its operations run below the level at which lookups are caught
        is_table = isinstance(parameter, DeferredTensor) or (
            any(isinstance(module, _TABLE_MODULES) for module in modules)
            and parameter.ndim == 2
            and (parameter.shape[0] >= min_rows or (ranks > 1 and _limits_norms(modules)))
        )
        chosen = strategy.get(name)
        if chosen == "dense" and isinstance(parameter, DeferredTensor):
            raise ValueError(
                f'strategy says "dense" of table {name!r}, which was declared under deferred_init and has no values; '
                "build it outside of that context"
            )
        if not (chosen == "managed" or (is_table and chosen != "dense")):
            continue
        _check_table(name, parameter)
        if parameter.dtype not in _DTYPES:
            log.warning("table %r stays dense: its dtype is %s, not float32 or float64", name, parameter.dtype)
            continue
        found[name] = parameter
    _check_buffers(model)
    _check_sharing(model, found)
    return found


def _limits_norms(modules: list[nn.Module]) -> bool:
    return any(isinstance(module, _TABLE_MODULES) and module.max_norm is not None for module in modules)


def _check_table(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, TableParameter):
        raise ValueError(
            f"table {name!r} {list(parameter.shape)} is managed already, by a loader of another model that holds the "
            "same parameter; build one loader for the module that holds both models"
        )
    if parameter.device.type != "cpu" and parameter.device.type not in KINDS:
        raise ValueError(
            f"table {name!r} is on device {parameter.device}; models may be on the CPU or on CUDA devices: call "
            "model.cpu() before building the loader (or raise min_rows to keep the table where it is)"
        )
    if not isinstance(parameter, DeferredTensor):
        return
    program = program_of(parameter)
    if program is None:
        raise DeferredInitError(
            f"parameter {name!r} {list(parameter.shape)} is a view of some rows of a deferred table; make it a table "
            "of its own, or build it outside deferred_init"
        )
    if program.undefined_rows:
        start, stop = program.undefined_rows[0]
        raise DeferredInitError(
            f"rows {start} to {stop - 1} of table {name!r} {list(parameter.shape)} have no initial value: nothing set "
            f"them after the table was declared at {program.where}; call an nn.init function on it "
            "before a loader is made"
        )


def _check_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if isinstance(buffer, DeferredTensor):
            raise DeferredInitError(
                f"buffer {name!r} {list(buffer.shape)} is a deferred tensor, and only parameters become managed "
                f"tables; build it outside deferred_init, or set min_rows there above {buffer.shape[0]}"
            )


def _check_sharing(model: nn.Module, found: dict[str, nn.Parameter]) -> None:
    """Refuse different tensors over the memory of a table: managed, they would go separate ways."""
    tables = [(name, parameter, _extent(parameter)) for name, parameter in found.items()]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        start, stop = _extent(tensor)
        for table, parameter, (table_start, table_stop) in tables:
            if tensor is not parameter and max(start, table_start) < min(stop, table_stop):
                raise ValueError(
                    f"{name!r} and table {table!r} are two tensors over the same memory, which a managed table does "
                    "not have; share the Parameter itself (a.weight = b.weight), or keep both dense by raising min_rows"
                )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return (first address, address after the last) of a tensor's memory or of what declares it; (0, 0) for none."""
    if isinstance(tensor, DeferredTensor):
        declaration = id(tensor.__dict__["_declaration"])
        return declaration, declaration + 1
    if (
        isinstance(tensor, nn.parameter.UninitializedTensorMixin)
        or tensor.layout != torch.strided
        or not tensor.numel()
    ):
        return 0, 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (steps + 1) * tensor.element_size() if start else 0


def specs_for(found: dict[str, nn.Parameter], optimizers: list[Optimizer], seeds: dict[str, int]) -> list[pm.TableSpec]:
    """Return what the manager must know of each table.

    Raises:
        ValueError: if optimizers are given and none holds a table that is trained.
        UnsupportedOptimizerError: if one holds a table that it cannot train.
    """
    specs = []
    for name, parameter in found.items():
        place = group_of(optimizers, parameter, name)
        if place is None and optimizers and parameter.requires_grad:
            raise ValueError(
                f"no optimizer holds table {name!r} {list(parameter.shape)}: build the optimizer over "
                "model.parameters() of this very model, or pass all optimizers as optimizer=[...]; set "
                "requires_grad_(False) on a table that shall not be trained"
            )
        rule, group = pm.Frozen(), {}
        if place is not None:
            optimizer = optimizers[place[0]]
            rule = rule_for(optimizer, optimizer.param_groups[place[1]], name)
            group = hyperparameters(optimizer, optimizer.param_groups[place[1]], parameter, rule)
        rows, dim = parameter.shape
        fill = _filler(name, parameter, seeds.get(name))
        specs.append(pm.TableSpec(name, rows, dim, _DTYPES[parameter.dtype], rule, group, fill))
    return specs


def _filler(name: str, parameter: nn.Parameter, seed: int | None) -> Callable[[np.ndarray, np.ndarray], None]:
    program = program_of(parameter)
    if program is None:
        return lambda rows, out: out.fill(0)  # replaced by the values that the table has, see `adopt`
    chosen = program.seed if seed is None else seed
    return ProgramFill(program, chosen, name)


def adopt(model: ManagedModel, found: dict[str, nn.Parameter], specs: list[pm.TableSpec]) -> None:
    """Make the parameters in `found` managed tables (collective): values and optimizer state move into the manager."""
    held = [held_anywhere(model.optimizers, found[spec.name], spec.rule) for spec in specs]
    probations = [
        Probation(found[spec.name], of_spec) if program_of(found[spec.name]) is None else None
        for spec, of_spec in zip(specs, held, strict=True)
    ]
    specs = [
        spec if probation is None else replace(spec, fill=probation.fill, fill_states=probation.fill_states)
        for spec, probation in zip(specs, probations, strict=True)
    ]
    tables = model.manager.add_tables(specs)
    for table, of_table, probation in zip(tables, held, probations, strict=True):
        parameter = found[table.spec.name]
        differs_by_row, form = form_on_rank_0(model.manager, of_table)
        table.spec = replace(table.spec, group=starting_from(table.spec.group, table.spec.rule, form.constant))
        continue_from(table, form)
        if probation is None:
            take_over(parameter)
            if differs_by_row:
                load_states(model.manager, table, of_table.parts)
        else:
            probation.take_from_rank_0(model.manager, table.spec.rule, differs_by_row)
        managed = ManagedTable(table.spec.name, parameter, table, weakref.ref(model), probation=probation)
        managed.is_deferred, managed.steps_before = probation is None, form.steps
        become_table(parameter, managed)
        if probation is not None:
            model.watched[table.spec.name] = weakref.ref(parameter)
        else:
            free_state(model.optimizers, parameter)
        model.tables.append(managed)
    model.manager.rewrite_ended()  # nobody asks for rows before all ranks have rank 0's values


def form_on_rank_0(manager: pm.Manager, held: HeldState) -> tuple[bool, HeldState]:
    """Return whether rank 0's state differs by row, and all else that it holds (collective)."""
    constant = np.nan if held.constant is None else held.constant
    numbers = [held.parts is not None, held.constant is not None, constant, held.steps, held.begun]
    numbers += [held.mu_product, held.mu_product.itemsize]
    form = np.array(numbers, np.float64)
    if manager.ranks > 1:
        broadcast_array(manager, form)
    differs_by_row, is_constant, constant, steps, begun, mu_product, itemsize = form.tolist()
    constant = constant if is_constant else None
    mu_product = (np.float64 if itemsize == 8 else np.float32)(mu_product)
    return bool(differs_by_row), HeldState(None, constant, int(steps), bool(begun), mu_product)


_SAME_EVERYWHERE = "all ranks must build the same model, optimizer and loader"


def agree(manager: pm.Manager, what: str, description: str, remedy: str = _SAME_EVERYWHERE) -> None:
    """Raise ValueError on every rank unless all ranks' `description` is the same text (collective).

    It shows two ranks' texts where they begin to differ.
    """
    if manager.ranks == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(description.encode(), digest_size=8).digest(), np.uint8)
    digests = np.empty((manager.ranks, len(digest)), np.uint8)
    manager.transport.collective(lambda comm: comm.Iallgather(digest, digests), manager.timeout_seconds)
    differing = [rank for rank in range(manager.ranks) if not np.array_equal(digests[rank], digests[0])]
    if differing:
        texts = all_texts(manager, description)
        other = manager.rank if manager.rank in differing else differing[0]
        ours, theirs = _around_difference(texts[0], texts[other])
        raise ValueError(
            f"ranks {differing} have other {what} than rank 0 (this is rank {manager.rank}): rank 0 has {ours}, and "
            f"rank {other} has {theirs}; {remedy}"
        )


_SHOWN_CHARACTERS = 100
"""Of two long texts that differ: how many are shown on each side of the place from which they do."""


def _around_difference(*texts: str) -> list[str]:
    """Return the part of each text in which they begin to differ."""
    at = len(os.path.commonprefix(texts))
    start, stop = max(0, at - _SHOWN_CHARACTERS), at + _SHOWN_CHARACTERS
    return [f"{'...' if start else ''}{text[start:stop]}{'...' if len(text) > stop else ''}" for text in texts]


def seeds_of_rank_0(manager: pm.Manager, found: dict[str, nn.Parameter]) -> dict[str, int]:
    """Return the seeds of deferred tables, rank 0's on every rank (collective)."""
    names = [name for name, parameter in found.items() if program_of(parameter) is not None]
    seeds = np.array([program_of(found[name]).seed & _MASK64 for name in names], np.uint64)
    if manager.ranks > 1:
        broadcast_array(manager, seeds)
    return dict(zip(names, seeds.tolist(), strict=True))
