"""Loops that do more than a step to a model: adversarial perturbation, averages of weights, several passes; see
`loop_cases.py`.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from tests.loop_cases import Script


def _tables(s: Script):
    return [s.model.rows.weight, s.model.bag.weight]


def fast_gradient_method(s: Script) -> None:
    """Gradients at the batch and at tables moved along them; the tables go back to where they were."""
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            loss = s.model.loss(batch)
            loss.backward()
            s.note(loss, len(batch["target"]))
            backup = [table.data.clone() for table in _tables(s)]
            for table in _tables(s):
                norm = table.grad.norm()
                if norm != 0 and not torch.isnan(norm):
                    table.data.add_(0.5 * table.grad / norm)
            adversarial = s.model.loss(batch)
            adversarial.backward()
            s.note(adversarial, len(batch["target"]))
            for table, values in zip(_tables(s), backup, strict=True):
                table.data = values
            s.step()


def projected_gradient(s: Script) -> None:
    """Three small moves; in-place operators, and restoring by copy_."""
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            s.zero_grad()
            s.model.loss(batch).backward()
            table = s.model.rows.weight
            backup = table.detach().clone()
            for move in range(3):
                step = table.grad * (0.1 / (table.grad.norm() + 1e-12))
                if move == 1:
                    table.data -= -step
                elif s.ranks == 1 and number % 2:
                    table.data = table.data + step
                else:
                    with torch.no_grad():
                        table.add_(step)
                s.zero_grad()
                loss = s.model.loss(batch)
                loss.backward()
                s.note(loss, len(batch["target"]))
            with torch.no_grad():
                table.copy_(backup)
            s.step()


def steps_by_hand(s: Script) -> None:
    """`p.data.add_(p.grad, alpha=-lr)`, without an optimizer's step."""
    for _ in s.passes():
        for batch in s.loader:
            loss = s.model.loss(batch)
            loss.backward()
            s.note(loss, len(batch["target"]))
            with torch.no_grad():
                for parameter in s.model.parameters():
                    if parameter.grad is not None:
                        parameter.data.add_(parameter.grad, alpha=-0.1)
                        parameter.sub_(parameter.grad, alpha=0.05)
                        parameter.grad = None


def r_drop(s: Script) -> None:
    """Two forward passes with dropout, and one backward of both and of their distance."""
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            outs = []
            for factor in (0.9, 1.1):
                looked_up = s.model.rows(batch["x"]) * factor  # where dropout is, drawn alike on any number of ranks
                features = torch.cat([looked_up.flatten(1), s.model.bag(batch["y"]), batch["dense"]], 1)
                outs.append(s.model.top(features).squeeze(1))
            loss = sum(F.mse_loss(out, batch["target"]) for out in outs) + (outs[0] - outs[1]).square().mean()
            loss.backward()
            s.step()
            s.note(loss, len(batch["target"]))


def moving_average_of_weights(s: Script) -> None:
    """Kept by hand in several spellings, and used to evaluate."""
    shadow = {name: parameter.detach().clone() for name, parameter in s.model.named_parameters()}
    state = copy.deepcopy(s.model.state_dict()) if s.ranks == 1 else None
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            s.zero_grad()
            loss = s.model.loss(batch)
            loss.backward()
            s.step()
            s.note(loss, len(batch["target"]))
            with torch.no_grad():
                for name, parameter in s.model.named_parameters():
                    if number % 3 == 0:
                        shadow[name].lerp_(parameter, 0.1)
                    elif number % 3 == 1:
                        shadow[name].mul_(0.9).add_(parameter.data, alpha=0.1)
                    else:
                        shadow[name] = 0.9 * shadow[name] + 0.1 * parameter.detach()
        s.log.append([])
        for value in shadow.values():
            s.note_same(value.square().sum())
    assert state is None or len(state) == len(shadow)


def _averaging(make):
    def loop(s: Script) -> None:
        averaged = make(s.model)
        schedule = SWALR(s.optimizers[0], swa_lr=0.05, anneal_epochs=2)
        for _ in s.passes():
            for batch in s.loader:
                s.zero_grad()
                loss = s.model.loss(batch)
                loss.backward()
                s.step()
                averaged.update_parameters(s.model)
                s.note(loss, len(batch["target"]))
            schedule.step()
            s.log.append([])
            for parameter in averaged.module.parameters():
                s.note_same(parameter.detach().square().sum())

    return loop


def two_scaled_optimizers(s: Script) -> None:
    """One scaler for several optimizers, of which infinite gradients stop those that have them."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            s.zero_grad()
            loss = s.model.loss(batch)
            scaler.scale(loss).backward()
            if number == 1:
                s.model.top.bias.grad.fill_(torch.inf)
            for at, optimizer in enumerate(s.optimizers):
                if at == 0:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
            scaler.update()
            s.note(loss, len(batch["target"]))
            s.note_same(torch.tensor(scaler.get_scale()))


def freezing_and_thawing(s: Script) -> None:
    """Tables are frozen for some batches, and trained again."""
    for epoch in s.passes():
        for number, batch in enumerate(s.loader):
            s.model.rows.weight.requires_grad_((number + epoch) % 3 != 0)
            s.zero_grad()
            loss = s.model.loss(batch)
            loss.backward()
            s.step()
            s.note(loss, len(batch["target"]))


ALL = {
    "averaged model": _averaging(AveragedModel),
    "exponentially averaged model": _averaging(
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ),
} | {
    loop.__name__: loop
    for loop in (
        fast_gradient_method,
        projected_gradient,
        steps_by_hand,
        r_drop,
        moving_average_of_weights,
        two_scaled_optimizers,
        freezing_and_thawing,
    )
}
