"""Of which parameters ranks average the gradients: the model's but its tables, and others that its optimizers hold, as
those of a loss with weights of its own or of a second tower. Each rank would train its own of any that is left out.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adaloader.deferred.deferred_tensor import program_of
from adaloader.errors import ManagedTableError
from adaloader.model.managed_model import managed_models
from adaloader.ranks.agreement import broadcast

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel

_warned_of: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def held_beside(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters, with names, that `optimizers` hold, and neither `model` nor another managed one has."""
    known = {id(p) for p in model.parameters()}
    for other in managed_models.values():
        known.update(id(table.parameter) for table in other.tables)
        if other.model() is not model:
            known.update(map(id, [] if other.model() is None else other.model().parameters()))
    found = {}
    for number, optimizer in enumerate(optimizers):
        for group_number, group in enumerate(optimizer.param_groups):
            for at, parameter in enumerate(group["params"]):
                if id(parameter) not in known and id(parameter) not in found and program_of(parameter) is None:
                    name = f"{type(optimizer).__name__} {number}, group {group_number}, parameter {at}"
                    found[id(parameter)] = name, parameter
    return list(found.values())


def released_by_others(model: nn.Module) -> None:
    """Parameters of `model`, about to be managed, are not averaged for other models any more (on every rank)."""
    for other in managed_models.values():
        other.beside = [p for p in other.beside if not any(p is mine for mine in model.parameters())]
        if other.reducer is not None:
            for parameter in model.parameters():
                if other.reducer.holds(parameter):
                    other.reducer.drop(parameter)


def take_in(managed: ManagedModel, optimizers: list[Optimizer]) -> None:
    """Average what has come into the model, or into `optimizers`, since its last loader was built; all ranks go on from
    rank 0's values (collective where there is any).

    Raises:
        ValueError: on every rank, if ranks have other parameters than rank 0.
    """
    model, reducer = managed.model(), managed.reducer
    if reducer is None:
        return
    tables = {id(table.parameter) for table in managed.tables}
    fresh = [(name, p) for name, p in model.named_parameters() if id(p) not in tables and not reducer.holds(p)]
    beside = [(name, p) for name, p in held_beside(model, optimizers) if not reducer.holds(p)]
    if not fresh and not beside:
        return
    broadcast([p for _, p in fresh + beside], managed.process_group)
    managed.beside += [p for _, p in beside]
    managed.dense_because |= {name: "it came into the model after its first loader was built" for name, _ in fresh}
    order = [*model.parameters(), *managed.beside]
    for name, parameter in fresh + beside:
        reducer.add(parameter, name, order)


def check_averaged(managed: ManagedModel, optimizer: Optimizer) -> None:
    """Raise if a step would apply gradients that ranks have not averaged.

    Raises:
        ManagedTableError: `optimizer` has a gradient of a parameter that came after the last loader was built.
    """
    if managed.ranks == 1:
        return
    model, missing = managed.model(), _not_averaged(optimizer)
    if missing and model is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        what = ", ".join(names.get(id(p), f"one of shape {tuple(p.shape)} beside the model") for p in missing[:3])
        raise ManagedTableError(
            f"{type(optimizer).__name__} has gradients of parameters that ranks do not average ({what}"
            f"{', ...' if len(missing) > 3 else ''}): they came after the last loader of this model was built. Build "
            "another AdaLoader once layers are replaced and parameters added, with model= and optimizer= as before"
        )


def _not_averaged(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters with a gradient that are neither tables nor averaged for any model."""
    models = list(managed_models.values())
    tables = {id(table.parameter) for managed in models for table in managed.tables}
    reducers = [managed.reducer for managed in models if managed.reducer is not None]
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) not in tables
        and not any(reducer.holds(parameter) for reducer in reducers)
        and parameter.grad is not None
    ]


def _warn_of_unknown_optimizer(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """An optimizer is about to step: say so, once, if no loader was given it and ranks do not average its gradients."""
    if torch.compiler.is_compiling() or optimizer in _warned_of:
        return
    several = [managed for managed in managed_models.values() if managed.ranks > 1]
    if not several or any(known is optimizer for managed in several for known in managed.optimizers):
        return
    missing = _not_averaged(optimizer)
    if missing:
        _warned_of.add(optimizer)
        warnings.warn(
            f"{type(optimizer).__name__} trains {len(missing)} parameters (the first has shape "
            f"{tuple(missing[0].shape)}) whose gradients ranks do not average: each rank trains its own. If they are "
            "to be one, give AdaLoader all optimizers: optimizer=[...]",
            stacklevel=2,
        )


register_optimizer_step_pre_hook(_warn_of_unknown_optimizer)
