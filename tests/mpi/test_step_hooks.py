"""When rows are stepped: before the optimizer's own step if that makes no difference, else after it."""

from __future__ import annotations

import copy
import importlib
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from adaloader import AdaLoader
from adaloader.model.managed_model import managed_models
from tests.mpi.test_exactness import OPTIMIZERS, Clicks, ManyTables, Run, WideAndDeep, assert_exact
from tests.training import close


@dataclass
class WithHooks(Run):
    """Hooks of the user's that come before or after the loader's; they may keep something in a copy of the model."""

    hooks_first: bool = False

    def train(self, make_loader):
        torch.manual_seed(self.seed)
        model = self.model().to(self.dtype)
        optimizer = self.optimizer(model.parameters())
        kept = copy.deepcopy(model)
        if self.hooks_first:
            self.add_hooks(model, optimizer, kept)
        loader = make_loader(model, optimizer)
        if not self.hooks_first:
            self.add_hooks(model, optimizer, kept)
        losses = []
        for _ in range(self.epochs):
            for batch in loader:
                loss = F.binary_cross_entropy_with_logits(model(batch), batch["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append((float(loss.detach()) * len(batch["label"]), len(batch["label"])))
        self.end(model, kept)
        return losses, model, optimizer, loader

    def add_hooks(self, model, optimizer, kept):
        raise AssertionError("which hooks?")

    def end(self, model, kept):
        """Do what is to be done after the last epoch."""


class WithRates(WithHooks):
    """A hook sets the learning rate of each step, and one another after it."""

    def add_hooks(self, model, optimizer, kept):
        rates = (0.05 / step for step in itertools.count(1))
        optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(lr=next(rates)))
        optimizer.register_step_post_hook(lambda *_: optimizer.param_groups[0].update(lr=1e3))


@pytest.mark.parametrize("hooks_first", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad"])
def test_hooks_that_set_the_learning_rate(comm, seed, optimizer, hooks_first):
    length = 6 * 4 * comm.size
    assert_exact(comm, WithRates(WideAndDeep, OPTIMIZERS[optimizer], seed, length=length, hooks_first=hooks_first))


class WithValues(WithHooks):
    """Hooks change gradients before a step and values after it, and average these."""

    def add_hooks(self, model, optimizer, kept):
        def before(*_):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        @torch.no_grad()
        def after(*_):
            for parameter, seen in zip(model.parameters(), kept.parameters(), strict=True):
                parameter.mul_(0.999)
                seen.lerp_(parameter.clone(), 0.3)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    @torch.no_grad()
    def end(self, model, kept):
        for parameter, seen in zip(model.parameters(), kept.parameters(), strict=True):  # as hooks have seen tables
            parameter.copy_(seen)


@pytest.mark.parametrize("hooks_first", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad"])
def test_hooks_that_change_gradients_and_values(comm, seed, optimizer, hooks_first):
    length = 6 * 4 * comm.size
    assert_exact(comm, WithValues(WideAndDeep, OPTIMIZERS[optimizer], seed, length=length, hooks_first=hooks_first))


class WithScaler(Run):
    """A scaler that meets gradients that are no numbers; fused optimizers are told within the step to skip it."""

    def train(self, make_loader):
        torch.manual_seed(self.seed)
        model = self.model().to(self.dtype)
        optimizer = self.optimizer(model.parameters())
        loader = make_loader(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", growth_interval=4)
        losses = []
        for _ in range(self.epochs):
            for number, batch in enumerate(loader):
                loss = F.binary_cross_entropy_with_logits(model(batch), batch["label"])
                optimizer.zero_grad()
                scaler.scale(loss * (float("nan") if number in (1, 4) else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append((float(loss.detach()) * len(batch["label"]), len(batch["label"])))
        return losses, model, optimizer, loader


FUSED = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", FUSED)
def test_fused_optimizers_with_a_scaler(comm, seed, optimizer):
    length = 12 * 4 * comm.size
    assert_exact(comm, WithScaler(WideAndDeep, FUSED[optimizer], seed, length=length, dtype=torch.float32))


@pytest.mark.ranks(2, 3)
def test_rows_are_stepped_before_what_others_do_not_wait_for(comm, seed, monkeypatch):
    """Unless a closure makes the gradients; whatever hooks there are, and each step is one, even if it raises."""
    torch.manual_seed(seed)
    model = ManyTables().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = Clicks(seed, 32 * comm.size, torch.float64)
    loader = AdaLoader(data, batch_size=4, model=model, optimizer=optimizer, min_rows=1)
    manager, before, within = managed_models[model].manager, [], []
    functions = importlib.import_module("torch.optim.sgd")
    plain_step = functions.sgd

    def observed(*args, **keywords):
        within.append(manager.steps)
        if len(within) == 4:
            raise ArithmeticError("within the step")
        plain_step(*args, **keywords)

    monkeypatch.setattr(functions, "sgd", observed)
    for number, batch in enumerate(loader):
        before.append(manager.steps)
        hooks = [optimizer.register_step_pre_hook(lambda *_: None)] if number == 5 else []
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(batch), batch["label"]).backward()
        if number == 3:
            with pytest.raises(ArithmeticError, match="within the step"):
                optimizer.step()
        else:
            optimizer.step(*[lambda: torch.zeros(())] * (number == 6))
        for hook in hooks:
            hook.remove()
    assert before == list(range(8)) and manager.steps == 8
    assert [later - earlier for earlier, later in zip(before, within, strict=True)] == [1, 1, 1, 1, 1, 1, 0, 1]
    close(comm, loader)
