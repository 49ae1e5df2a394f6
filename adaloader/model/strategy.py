"""`strategy=`: the user's own word on whether a parameter is a managed table or stays an ordinary dense parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

STRATEGIES = ("managed", "dense")


def check_strategy(strategy: object) -> None:
    """Raise if `strategy` is no mapping from names to "managed" or "dense"."""
    if strategy is None:
        return
    if not isinstance(strategy, Mapping) or not all(isinstance(name, str) for name in strategy):
        raise TypeError(f'strategy must map names of parameters to "managed" or "dense"; got {strategy!r}')
    for name, chosen in strategy.items():
        if chosen not in STRATEGIES:
            raise ValueError(f'strategy for {name!r} must be "managed" or "dense"; got {chosen!r}')


def resolve_strategy(model: nn.Module, strategy: Mapping[str, str] | None) -> dict[str, str]:
    """Return what `strategy` says by each parameter's first name in the model; a module's name means its `weight`.

    Raises:
        ValueError: for a name that no parameter has, one parameter with two strategies, or "managed" for what cannot be
            a table, naming it.
    """
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    resolved: dict[str, str] = {}
    for name, chosen in (strategy or {}).items():
        parameter = parameters.get(name, parameters.get(f"{name}.weight"))
        if parameter is None:
            near = [known for known in parameters if name.split(".")[-1] in known][:5] or list(parameters)[:5]
            raise ValueError(f"strategy names {name!r}, which is no parameter of the model; there are {near}")
        first = first_names[id(parameter)]
        if resolved.setdefault(first, chosen) != chosen:
            raise ValueError(f"strategy says both {resolved[first]!r} and {chosen!r} of parameter {first!r}")
        if chosen == "managed":
            _check_can_be_managed(first, parameter)
    return resolved


def _check_can_be_managed(name: str, parameter: nn.Parameter) -> None:
    if parameter.ndim != 2 or parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f'strategy says "managed" of parameter {name!r} {list(parameter.shape)} {parameter.dtype}; a table has two '
            "dimensions, and float32 or float64 values"
        )
