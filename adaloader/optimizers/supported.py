"""The user's optimizers: which are supported, what a step's hyperparameters are, and state that they already hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import optim
from torch.optim import Optimizer

import pm
from adaloader.errors import UnsupportedOptimizerError
from adaloader.optimizers.rowwise_adagrad import RowwiseAdagrad

_SUPPORTED = (
    "torch.optim.SGD, Adagrad, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adadelta, SparseAdam, and "
    "adaloader.RowwiseAdagrad"
)


def _sgd(optimizer: Optimizer, group: Mapping[str, object]) -> pm.Rule:
    if group["momentum"] or group["weight_decay"]:
        return pm.MomentumSGD(momentum=bool(group["momentum"]))
    return pm.SGD()


def _adagrad(optimizer: Optimizer, group: Mapping[str, object]) -> pm.Rule:
    return pm.DecayingAdagrad() if group["weight_decay"] else pm.Adagrad()


_RULES: dict[type[Optimizer], Callable[[Optimizer, Mapping[str, object]], pm.Rule]] = {
    optim.SGD: _sgd,
    optim.Adagrad: _adagrad,
    optim.Adam: lambda optimizer, group: pm.Adam(amsgrad=bool(group["amsgrad"])),  # AdamW has its step
    optim.NAdam: lambda optimizer, group: pm.NAdam(),
    optim.RAdam: lambda optimizer, group: pm.RAdam(),
    optim.Adamax: lambda optimizer, group: pm.Adamax(),
    optim.RMSprop: lambda optimizer, group: pm.RMSprop(bool(group["centered"]), group["momentum"] > 0),
    optim.Adadelta: lambda optimizer, group: pm.Adadelta(),
    optim.SparseAdam: lambda optimizer, group: pm.SparseAdam(),
    RowwiseAdagrad: lambda optimizer, group: pm.RowwiseAdagrad(),
}


def rule_for(optimizer: Optimizer, group: Mapping[str, object], table: str) -> pm.Rule:
    """Return the update rule that does to rows what `optimizer` does to a parameter of `group`.

    Raises:
        UnsupportedOptimizerError: naming table, optimizer or option, and what is supported.
    """
    kind = type(optimizer)
    make = _maker_of(kind.step)
    if make is not None:
        if group.get("differentiable"):
            raise UnsupportedOptimizerError(
                f"table {table!r}: {kind.__name__}(differentiable=True) is not supported on managed tables; leave "
                "it out, or keep the table dense (raise min_rows above its number of rows)"
            )
        try:
            return make(optimizer, group)
        except KeyError as error:
            raise UnsupportedOptimizerError(
                f"table {table!r}: its parameter group of {kind.__name__} lacks {error.args[0]!r}"
            ) from error
    raise UnsupportedOptimizerError(
        f"table {table!r} is trained by {kind.__module__}.{kind.__qualname__}, which is not supported on managed "
        f"tables; supported: {_SUPPORTED}. Train the tables with one of those and the rest of the model with yours "
        "(pass optimizer=[both]), or keep the table dense (raise min_rows above its number of rows)"
    )


@functools.lru_cache(32)
def _maker_of(step: Callable) -> Callable[[Optimizer, Mapping[str, object]], pm.Rule] | None:
    """Return what makes the rule of optimizers whose method `step` is; None if they are not supported."""
    own_step = inspect.unwrap(step)  # PyTorch wraps the step of each class whose first object is made
    return next((make for known, make in _RULES.items() if own_step is inspect.unwrap(known.step)), None)


OPTIONS_OF_KIND = ("momentum", "weight_decay", "amsgrad", "centered")


def check_options(spec: pm.TableSpec, optimizer: Optimizer, group: Mapping[str, object], rule: pm.Rule) -> None:
    """Check, before a step, that a table's records can go on under what the options of its group are by now, which make
    `rule` of it.

    Raises:
        UnsupportedOptimizerError: naming table and options, if they were changed to what needs other optimizer state.
    """
    if not spec.rule.covers(rule):
        changed = [f"{name}={group[name]!r}" for name in OPTIONS_OF_KIND if group.get(name) != spec.group.get(name)]
        raise UnsupportedOptimizerError(
            f"table {spec.name!r}: {type(optimizer).__name__}({', '.join(changed)}) was set after the loader was "
            "built, and needs other optimizer state than its rows have; give the optimizer that option (or any value "
            "of it but 0, False) before the loader is built"
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
    return {name: _as_numbers(value) for name, value in group.items() if name != "params"}


def _as_numbers(value):
    """Return tensors of one number as numbers of their dtype: PyTorch computes with them in it."""
    if isinstance(value, (tuple, list)):
        return type(value)(_as_numbers(part) for part in value)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        return value
    value = value.detach().reshape(()).cpu()
    return value.numpy()[()] if value.dtype in (torch.float32, torch.float64) else value.item()


_NUMBERS = (bool, int, float, np.floating)


def _numbers(optimizer: Optimizer) -> list[tuple[int, str, float]]:
    """Return (group, name, value) of all numeric hyperparameters, in an order that is the same on every rank."""
    found = []
    for at, group in enumerate(optimizer.param_groups):
        for name, value in sorted(snapshot(group).items()):
            values = value if isinstance(value, (tuple, list)) else (value,)
            for place, number in enumerate(values):
                if isinstance(number, _NUMBERS):
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
                    if isinstance(number, torch.Tensor) and number.numel() == 1:
                        number.fill_(float(vector[at]))
                        at += 1
                    elif isinstance(number, (bool, int, float)):
                        mine[place] = type(number)(vector[at])
                        at += 1
                group[name] = type(value)(mine)
            elif isinstance(value, (bool, int, float)):
                group[name] = type(value)(vector[at])
                at += 1
