"""What optimizers hold for a table's parameter before the table is managed, and the names that they give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import pm
from adaloader.deferred.deferred_tensor import program_of
from adaloader.errors import UnsupportedOptimizerError
from adaloader.memory.device_memory import on_host
from adaloader.optimizers.supported import group_of, snapshot
from adaloader.overrides.constant import constant_tensor

# The entries of `optimizer.state[parameter]` by rule, in PyTorch's order, which is that of the parts of a record.
_ENTRIES = {
    "sgd_momentum": ("momentum_buffer",),
    "adagrad": ("step", "sum"),
    "rowwise_adagrad": ("step", "sum"),
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "amsgrad": ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "sparse_adam": ("step", "exp_avg", "exp_avg_sq"),
    "nadam": ("step", "mu_product", "exp_avg", "exp_avg_sq"),
    "radam": ("step", "exp_avg", "exp_avg_sq"),
    "adamax": ("step", "exp_avg", "exp_inf"),
    "rmsprop": ("step", "square_avg"),
    "rmsprop_momentum": ("step", "square_avg", "momentum_buffer"),
    "rmsprop_centered": ("step", "square_avg", "grad_avg"),
    "rmsprop_centered_momentum": ("step", "square_avg", "momentum_buffer", "grad_avg"),
    "adadelta": ("step", "square_avg", "acc_delta"),
}
# Entries that are one number for the whole parameter.
_SCALARS = ("step", "mu_product")
# The hyperparameter that the others start from, where that is not 0.
_INITIAL_NAMES = {"adagrad": "initial_accumulator_value", "rowwise_adagrad": "initial_accumulator_value"}


@dataclass(frozen=True)
class HeldState:
    """What an optimizer holds for one parameter.

    Args:
        parts: one tensor `[num_rows, ...]` per part of the records' state, where rows may differ; else None.
        constant: the one number that all have; None where there are none, or `parts`.
        steps: steps that it has taken with a gradient of the parameter.
        begun: whether it holds anything.
        mu_product: NAdam's, in the dtype of its tensor.
    """

    parts: tuple[torch.Tensor, ...] | None = None
    constant: float | None = None
    steps: int = 0
    begun: bool = False
    mu_product: np.floating = field(default_factory=lambda: scalar(torch.ones(())))


def scalar(value: torch.Tensor | float) -> np.floating:
    """Return one number, in the dtype of its tensor if it is one of float64, else in float32."""
    double = torch.is_tensor(value) and value.dtype == torch.float64
    return (np.float64 if double else np.float32)(float(value))


def held_state(optimizer: Optimizer, parameter: nn.Parameter, rule: pm.Rule) -> HeldState:
    """Return what `optimizer` holds for `parameter`, whose rows `rule` will update.

    Raises:
        UnsupportedOptimizerError: if the state is a deferred tensor that is no constant, or lacks a part.
    """
    state = optimizer.state.get(parameter, {})
    steps, names = int(state.get("step", 0)), state_names(rule)
    missing = [name for name in names if state.get(name) is None]
    if len(missing) == len(names):
        return HeldState(steps=steps)
    if missing:
        raise UnsupportedOptimizerError(
            f"the optimizer's state of a table {list(parameter.shape)} lacks {', '.join(missing)}: its options were "
            "changed after its first step; build the optimizer anew, or change them back"
        )
    parts = [_whole(name, state[name]) for name in names]
    constants = [_constant(part) for part in parts]
    rest = {"steps": steps, "begun": True, "mu_product": scalar(state.get("mu_product", 1.0))}
    if len(parts) == 1 and constants[0] is not None:
        return HeldState(constant=constants[0], **rest)
    return HeldState(parts=tuple(parts), **rest)


def _whole(name: str, value: torch.Tensor) -> torch.Tensor:
    program = program_of(value)
    if program is None:
        return value.to_dense() if value.layout != torch.strided else value
    if program.constant is None:
        raise UnsupportedOptimizerError(
            f"the optimizer's state {name!r} {list(value.shape)} is a deferred tensor that is no constant; build "
            "the optimizer after the deferred_init context"
        )
    return constant_tensor(value.shape, program.constant, dtype=value.dtype, device="cpu")


def _constant(value: torch.Tensor) -> float | None:
    return value[(0,) * value.ndim].item() if value.numel() > 1 and not any(value.stride()) else None


def entry_names(rule: pm.Rule) -> tuple[str, ...]:
    """Return the names of all entries that an optimizer holds for a parameter under `rule`, in its order."""
    return _ENTRIES.get(rule.name, ())


def state_names(rule: pm.Rule) -> tuple[str, ...]:
    """Return the names of the entries with a number per value, or per row, that `rule` keeps in records."""
    return tuple(name for name in entry_names(rule) if name not in _SCALARS)


def state_shape(rule: pm.Rule, shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of such an entry of a table of `shape`."""
    return tuple(shape[:1]) if isinstance(rule, pm.RowwiseAdagrad) else tuple(shape)


def take_states(parts: Sequence[torch.Tensor], rows: np.ndarray, out: np.ndarray) -> None:
    """Write what `parts`, a tensor `[num_rows, ...]` each, have for `rows` side by side to `out` `[n, state_words]`."""
    width = out.shape[1] // len(parts)
    for at, part in enumerate(parts):
        of_rows = np.take(on_host(part), rows, axis=0)
        out[:, at * width : (at + 1) * width] = of_rows.reshape(len(rows), width)


def is_held_from_the_start(rule: pm.Rule) -> bool:
    """Whether the optimizer makes its state when it is built, not at the first step."""
    return rule.name in _INITIAL_NAMES


def continue_from(table: pm.Table, held: HeldState) -> None:
    """Have `table` count on from the steps that its optimizer has taken."""
    table.gradient_steps, table.begun = held.steps, held.begun
    if table.history is not None:
        table.history.mu_product = held.mu_product


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
            if isinstance(value, torch.Tensor) and value.shape in (parameter.shape, parameter.shape[:1]):
                state[name] = constant_tensor(value.shape, float("nan"), dtype=value.dtype, device="cpu")


def held_anywhere(optimizers: list[Optimizer], parameter: nn.Parameter, rule: pm.Rule) -> HeldState:
    """Return what any of `optimizers` holds for `parameter`."""
    place = group_of(optimizers, parameter)
    return HeldState() if place is None else held_state(optimizers[place[0]], parameter, rule)
