"""What optimizers hold for a table's parameter before the table is managed, and the names that they give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

import pm
from adaloader.deferred_tensor import constant_tensor, program_of
from adaloader.errors import UnsupportedOptimizerError
from adaloader.optimizers import group_of, snapshot

# The entries of `optimizer.state[parameter]` that have a number per value, in the order in which records hold them.
_STATE_NAMES = {"adagrad": ("sum",)}
# The hyperparameter that such entries start from.
_INITIAL_NAMES = {"adagrad": "initial_accumulator_value"}


@dataclass(frozen=True)
class HeldState:
    """What an optimizer holds for one parameter.

    Args:
        values: `[num_rows, state_words]`, where rows may differ; else None.
        constant: the one number that all have; None where there are none, or `values`.
        steps: steps that it has taken with a gradient of the parameter.
    """

    values: torch.Tensor | None
    constant: float | None
    steps: int


def held_state(optimizer: Optimizer, parameter: nn.Parameter, rule: pm.Rule) -> HeldState:
    """Return what `optimizer` holds for `parameter`, whose rows `rule` will update.

    Raises:
        UnsupportedOptimizerError: if the state is a deferred tensor that is no constant.
    """
    state = optimizer.state.get(parameter, {})
    steps = int(state.get("step", 0))
    names = [name for name in state_names(rule) if name in state]
    if not names:
        return HeldState(None, None, steps)
    (name,) = names
    value = state[name]
    program = program_of(value)
    if program is not None:
        if program.constant is None:
            raise UnsupportedOptimizerError(
                f"the optimizer's state {name!r} {list(value.shape)} is a deferred tensor that is no constant; build "
                "the optimizer after the deferred_init context"
            )
        return HeldState(None, program.constant, steps)
    if value.numel() > 1 and not any(value.stride()):
        return HeldState(None, value[0, 0].item(), steps)
    return HeldState(value, None, steps)


def state_names(rule: pm.Rule) -> tuple[str, ...]:
    """Return the names of the entries with a number per value that `rule` keeps in records."""
    return _STATE_NAMES.get(rule.name, ())


def hyperparameters(optimizer: Optimizer, group: Mapping[str, object], parameter: nn.Parameter, rule: pm.Rule):
    """Return the group's hyperparameters as a table's spec keeps them: new rows start from the state that is held."""
    return starting_from(snapshot(group), rule, held_state(optimizer, parameter, rule).constant)


def starting_from(group: Mapping[str, object], rule: pm.Rule, constant: float | None) -> dict[str, object]:
    """Return `group` with the state of rows that are made later starting from `constant`, if that is a number."""
    name = _INITIAL_NAMES.get(rule.name)
    return dict(group) if constant is None or name is None else {**group, name: constant}


def free_state(optimizers: list[Optimizer], parameter: nn.Parameter) -> None:
    """Leave one number in place of each tensor of the table's size that an optimizer holds for `parameter`."""
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = constant_tensor(value.shape, float("nan"), dtype=value.dtype, device="cpu")


def held_anywhere(optimizers: list[Optimizer], parameter: nn.Parameter, rule: pm.Rule) -> HeldState:
    """Return what any of `optimizers` holds for `parameter`."""
    place = group_of(optimizers, parameter)
    return HeldState(None, None, 0) if place is None else held_state(optimizers[place[0]], parameter, rule)
