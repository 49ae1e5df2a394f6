"""The user's optimizers: which are supported, what a step's hyperparameters are, and state that they already hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.optim import SGD, Adagrad, Optimizer

import pm
from adaloader.errors import UnsupportedOptimizerError

_SUPPORTED = "torch.optim.SGD (no momentum, no weight_decay) and torch.optim.Adagrad (no weight_decay)"


def rule_for(optimizer: Optimizer, group: Mapping[str, object], table: str) -> pm.SGD | pm.Adagrad:
    """Return the update rule that does to rows what `optimizer` does to a parameter of `group`.

    Raises:
        UnsupportedOptimizerError: naming table, optimizer or option, and what is supported.
    """
    kind = type(optimizer)
    if kind.step is SGD.step:
        _refuse_options(kind, group, table, ("momentum", "weight_decay", "nesterov", "differentiable"))
        return pm.SGD()
    if kind.step is Adagrad.step:
        _refuse_options(kind, group, table, ("weight_decay", "differentiable"))
        if "initial_accumulator_value" not in group:
            raise UnsupportedOptimizerError(f"the group of table {table!r} lacks initial_accumulator_value")
        return pm.Adagrad()
    raise UnsupportedOptimizerError(
        f"table {table!r} is trained by {kind.__module__}.{kind.__qualname__}, which is not supported on managed "
        f"tables; supported: {_SUPPORTED}. Train the tables with one of those and the rest of the model with yours "
        "(pass optimizer=[both]), or keep the table dense (raise min_rows above its number of rows)"
    )


def _refuse_options(kind, group, table, names) -> None:
    for name in names:
        if group.get(name):
            raise UnsupportedOptimizerError(
                f"table {table!r}: {kind.__name__}({name}={group[name]!r}) is not supported on managed tables; "
                f"supported: {_SUPPORTED}"
            )


def group_of(
    optimizers: list[Optimizer], parameter: torch.nn.Parameter, table: str | None = None
) -> tuple[int, int] | None:
    """Return (number of the optimizer, number of the group) that hold `parameter`, by identity; None if none does.

    Raises:
        ValueError: if several optimizers hold it, naming `table`.
    """
    places = [
        (number, at)
        for number, optimizer in enumerate(optimizers)
        for at, group in enumerate(optimizer.param_groups)
        if any(held is parameter for held in group["params"])
    ]
    if len(places) > 1:
        kinds = " and ".join(type(optimizers[number]).__name__ for number, _ in places)
        raise ValueError(
            f"table {table!r} {list(parameter.shape)} is held by {kinds}; a table has one optimizer: leave it out of "
            "the others' parameters"
        )
    return places[0] if places else None


def groups_by_parameter(optimizer: Optimizer) -> dict[int, dict[str, object]]:
    """Return the group that holds each parameter of `optimizer`, by the parameter's id()."""
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def snapshot(group: Mapping[str, object]) -> dict[str, object]:
    """Return the group's hyperparameters as they are now: schedules change them while a step may still be applied."""
    return {
        name: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        for name, value in group.items()
        if name != "params"
    }


def _numbers(optimizer: Optimizer) -> list[tuple[int, str, float]]:
    """Return (group, name, value) of all numeric hyperparameters, in an order that is the same on every rank."""
    found = []
    for at, group in enumerate(optimizer.param_groups):
        for name, value in sorted(snapshot(group).items()):
            values = value if isinstance(value, (tuple, list)) else (value,)
            for place, number in enumerate(values):
                if isinstance(number, (bool, int, float)):
                    label = name if len(values) == 1 else f"{name}[{place}]"
                    found.append((at, label, float(number)))
    return found


def hyperparameter_vector(optimizer: Optimizer) -> np.ndarray:
    """Return all numeric hyperparameters of `optimizer` as float64 `[n]`, for ranks to compare."""
    return np.array([value for _, _, value in _numbers(optimizer)], np.float64)


def hyperparameter_name(optimizer: Optimizer, at: int) -> str:
    """Return the name of entry `at` of `hyperparameter_vector`."""
    group, name, _ = _numbers(optimizer)[at]
    return f"{name} of parameter group {group} ({type(optimizer).__name__})"


def adopt_hyperparameters(optimizer: Optimizer, vector: np.ndarray) -> None:
    """Set the numeric hyperparameters of `optimizer` to another rank's `vector` (by a rank that steps after it)."""
    at = 0
    for group in optimizer.param_groups:
        for name in sorted(n for n in group if n != "params"):
            value = group[name]
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value.fill_(float(vector[at]))
                at += 1
            elif isinstance(value, (tuple, list)):
                mine = list(value)
                for place, number in enumerate(mine):
                    if isinstance(number, (bool, int, float)):
                        mine[place] = type(number)(vector[at])
                        at += 1
                group[name] = type(value)(mine)
            elif isinstance(value, (bool, int, float)):
                group[name] = type(value)(vector[at])
                at += 1
