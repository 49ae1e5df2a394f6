"""The oracle of these tests: the same loop in plain PyTorch, over the same batches, from the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from adaloader import AdaLoader, full_optimizer_state_dict, full_state_dict

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-11}

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.3),
}


@dataclass
class Outcome:
    """What a loop returned, and what it left behind: weights and optimizer state by name."""

    returned: list[torch.Tensor]
    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    stats: dict[str, object] | None = None


def run_plain(make_model, make_optimizer, batches: Iterable, loop: Callable, *, seed: int = 0) -> Outcome:
    """Run `loop(model, optimizer, batches)` in plain PyTorch; it returns a list of tensors or numbers."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    returned = [torch.as_tensor(value).detach().clone() for value in loop(model, optimizer, batches)]
    return Outcome(returned, dict(model.state_dict()), _flat_state(optimizer.state_dict()))


def run_managed(make_model, make_optimizer, batches: Iterable, loop: Callable, *, seed: int = 0, **keywords) -> Outcome:
    """Run the same under AdaLoader's management of every table, however small."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    loader = AdaLoader.wrap(batches, model=model, optimizer=optimizer, **{"min_rows": 1, **keywords})
    try:
        returned = [torch.as_tensor(value).detach().clone() for value in loop(model, optimizer, loader)]
        weights, state = full_state_dict(model), full_optimizer_state_dict(model, optimizer)
        return Outcome(returned, weights, _flat_state(state), loader.stats())
    finally:
        loader.close()


def assert_same_as_plain(make_model, make_optimizer, batches, loop, *, dtype=torch.float64, **keywords) -> Outcome:
    """Run the loop both ways; compare what it returned, weights and optimizer state; return the managed outcome."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        plain = run_plain(make_model, make_optimizer, deepcopy(batches), loop)
        managed = run_managed(make_model, make_optimizer, batches, loop, **keywords)
    finally:
        torch.set_default_dtype(before)
    assert_same(managed, plain, dtype)
    return managed


def assert_same(managed: Outcome, plain: Outcome, dtype: torch.dtype) -> None:
    assert len(managed.returned) == len(plain.returned)
    for at, (ours, theirs) in enumerate(zip(managed.returned, plain.returned, strict=True)):
        _close(f"value {at} of the loop", ours, theirs, dtype)
    for what, ours, theirs in (("weights", managed.weights, plain.weights), ("state", managed.state, plain.state)):
        assert ours.keys() == theirs.keys(), what
        for name in theirs:
            _close(f"{what} of {name}", ours[name], theirs[name], dtype)


def _close(what: str, ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * 10 if dtype == torch.float32 else TOLERANCE[dtype]
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit, msg=lambda text: f"{what}: {text}")


def _flat_state(state: dict) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": value
        for index, entry in state["state"].items()
        for name, value in entry.items()
        if torch.is_tensor(value)
    }


def weigh(out: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs in every element."""
    factors = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view(out.shape)
    return (factors * out).sum() + 0.1 * (out * out).sum()


def train(loss_of: Callable[[nn.Module, object], torch.Tensor]) -> Callable:
    """The usual loop over `loss_of(model, batch)`, returning the losses."""

    def loop(model, optimizer, loader):
        losses = []
        for batch in loader:
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        return losses

    return loop
