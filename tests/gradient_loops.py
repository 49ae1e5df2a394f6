"""Loops that read, clip, scale or unscale gradients, tables' included; see `loop_cases.py`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from tests.loop_cases import Script


def between(change: Callable[[Script, int], None], every: int = 1) -> Callable[[Script], None]:
    """Return a loop that steps `every` so many batches, with `change(script, number)` before each step."""

    def loop(s: Script) -> None:
        for _ in s.passes():
            for number, batch in enumerate(s.loader, 1):
                loss = s.model.loss(batch) * 5 / every
                loss.backward()
                s.note(loss, len(batch["target"]))
                if number % every == 0:
                    change(s, number)
                    s.step()
                    s.zero_grad()
            s.zero_grad()

    return loop


def clip(order, most=0.5, **options):
    def change(s, number):
        s.note_same(clip_grad_norm_(s.model.parameters(), most, norm_type=order, **options))

    return change


def clip_values(s, number):
    clip_grad_value_(s.model.parameters(), 0.02)


def clip_values_foreach(s, number):
    clip_grad_value_(s.model.parameters(), 0.02, foreach=True)


def clip_twice(s, number):
    s.note_same(clip_grad_norm_(s.model.parameters(), 0.5))
    clip_grad_value_([s.model.rows.weight], 0.01)
    s.note_same(clip_grad_norm_(s.model.bag.parameters(), 0.01))
    s.note_same(get_total_norm([p.grad for p in s.model.parameters() if p.grad is not None]))


def clip_with_known_norm(s, number):
    norm = get_total_norm([p.grad for p in s.model.parameters() if p.grad is not None], 3.0)
    torch.nn.utils.clip_grads_with_norm_(s.model.parameters(), 0.3, norm)


def log_each(s, number):
    for parameter in s.model.parameters():
        if parameter.grad is not None:
            s.note_same(parameter.grad.norm())
            s.note_same(parameter.grad.detach().data.norm(2) + parameter.grad.abs().max() + parameter.grad.sum())
            s.note_same(parameter.grad.square().mean() + parameter.grad.min())


def only_finite(s, number):
    for parameter in s.model.parameters():
        if parameter.grad is not None:
            s.note_same(torch.tensor(float(torch.isfinite(parameter.grad).all() and not parameter.grad.isnan().any())))
            parameter.grad.mul_(0.5)


def scale(s, number):
    for parameter in s.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.25 * number)


def new_gradients(s, number):
    for parameter in s.model.parameters():
        if parameter.grad is not None:
            parameter.grad = (parameter.grad * 0.5).clamp(-0.05, 0.05) - parameter.grad / 7


def dense_form(s, number):
    for parameter in (s.model.rows.weight, s.model.bag.weight):
        s.note_same((parameter.grad.to_dense() * torch.linspace(0, 1, parameter.shape[1], dtype=torch.float64)).sum())


def before_and_after_the_step(s: Script) -> None:
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            s.model.loss(batch).backward()
            s.note_same(s.model.rows.weight.grad.norm())
            s.step()
            s.note_same(s.model.rows.weight.grad.norm())


def twice_before_a_step(s: Script) -> None:
    """A second backward after a clipping; what is clipped then is the sum."""
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            for factor in (3.0, 2.0):
                (factor * s.model.loss(batch)).backward()
                s.note_same(clip_grad_norm_(s.model.parameters(), 0.3))
            s.step()


def prefetching_and_clipping(s: Script) -> None:
    for _ in s.passes():
        iterator = iter(s.loader)
        coming = next(iterator, None)
        while coming is not None:
            batch, coming = coming, next(iterator, None)
            loss = s.model.loss(batch)
            loss.backward()
            s.note(loss, len(batch["target"]))
            clip_grad_norm_(s.model.parameters(), 0.05)
            s.step()
            s.zero_grad()


def counting_batches(s: Script) -> None:
    """As many as the loader has, so that it is not asked for one more; the last pass is dropped at once."""
    for _ in s.passes():
        iterator = iter(s.loader)
        for _ in range(len(s.loader)):
            batch = next(iterator, None)  # a rank may have one less
            if batch is None:
                break
            loss = s.model.loss(batch)
            loss.backward()
            s.note(loss, len(batch["target"]))
            clip_grad_norm_(s.model.parameters(), 0.05)
            s.step()
            s.zero_grad()


def table_unused_on_some_ranks(s: Script) -> None:
    for _ in s.passes():
        for batch in s.loader:
            whole = 0.0
            for rank, share, part in s.shares(batch):
                loss = s.model.side_loss(share) if rank == 0 else s.model.loss(share)
                whole = whole + part * loss
            whole.backward()
            s.note(whole, len(batch["target"]))
            s.note_same(clip_grad_norm_(s.model.parameters(), 0.05))
            s.step()
            s.zero_grad()


def with_scaler(s: Script) -> None:
    """A scale that overflows at first, is halved until it does not, and grows again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            s.zero_grad()
            loss = s.model.loss(batch)
            scaler.scale(loss).backward()
            if number % 2 == 0:
                for optimizer in s.optimizers:
                    scaler.unscale_(optimizer)
                clip_grad_norm_(s.model.parameters(), 0.05)
            for optimizer in s.optimizers:
                scaler.step(optimizer)
            scaler.update()
            s.note(loss, len(batch["target"]))
            s.note_same(torch.tensor(math.log2(scaler.get_scale())))


def infinite_in_some_rows(s: Script) -> None:
    """Some samples' rows get infinite gradients: these steps are skipped on all ranks."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            looked_up = s.model.rows(batch["x"])
            special = batch["dense"][:, :1, None] > 1.6
            looked_up.register_hook(lambda grad, special=special: grad.masked_fill(special, math.inf))
            loss = looked_up.square().mean() + s.model.loss(batch)
            scaler.scale(loss).backward()
            for optimizer in s.optimizers:
                scaler.step(optimizer)
            scaler.update()
            s.note(loss, len(batch["target"]))
            s.note_same(torch.tensor(scaler.get_scale()))


def hooked(s: Script) -> None:
    """Hooks on tables that scale, clamp and look at the gradient of each backward, and one that sees `.grad`."""
    seen, pooled = [], []

    handles = [
        s.model.rows.weight.register_hook(lambda grad: grad * 0.5),
        s.model.rows.weight.register_hook(lambda grad: grad.clamp(-0.01, 0.02)),
        s.model.rows.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.norm())),
        s.model.bag.weight.register_hook(lambda grad: pooled.append(grad.norm())),
    ]
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            loss = s.model.loss(batch)
            loss.backward()
            s.note(loss, len(batch["target"]))
            assert len(seen) == len(pooled) == 1  # called once per backward
            s.note_same(seen.pop() + pooled.pop())
            if number % 2:
                s.step()
                s.zero_grad()
        s.zero_grad()
    for handle in handles:
        handle.remove()


def for_some_inputs(s: Script) -> None:
    """`backward(inputs=...)`: a table and a layer, then a table alone, then dense parameters alone."""
    model = s.model
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            loss = model.loss(batch)
            inputs = [[model.rows.weight, model.top.weight], [model.bag.weight], [model.top.weight, model.top.bias]]
            loss.backward(inputs=inputs[number % 3])
            s.note(loss, len(batch["target"]))
            given = {id(p) for p in inputs[number % 3]}
            asked = model.top.parameters() if s.ranks > 1 else model.parameters()  # a table's may be another rank's
            assert all((p.grad is not None) == (id(p) in given) for p in asked)
            s.step()
            s.zero_grad()


def retaining(s: Script) -> None:
    """Several backwards through one graph, of which one is of a part of it, with a norm in between."""
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            loss = s.model.loss(batch)
            loss.backward(retain_graph=True)
            s.note_same(get_total_norm([p.grad for p in s.model.parameters() if p.grad is not None]))
            (0.5 * loss).backward(retain_graph=True, inputs=[s.model.rows.weight])
            loss.backward()
            s.note(loss, len(batch["target"]))
            s.step()


def no_sync(s: Script):
    return s.loader.no_sync() if hasattr(s.loader, "no_sync") else contextlib.nullcontext()


def accumulating_without_sums(s: Script) -> None:
    """Over three batches, the last of an epoch included; two epochs run on into each other."""
    for _ in s.passes():
        for number, batch in enumerate(s.loader, 1):
            with no_sync(s) if number % 3 else contextlib.nullcontext():
                loss = s.model.loss(batch) / 3
                loss.backward()
            s.note(loss, len(batch["target"]))
            if number % 3 == 0:
                s.note_same(clip_grad_norm_(s.model.parameters(), 0.1))
                s.step()
                s.zero_grad()


def dropping_what_was_not_summed(s: Script) -> None:
    """Cleared at the start of every third batch; the epoch ends inside."""
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            if number % 3 == 0:
                s.zero_grad()
            with no_sync(s) if number % 3 < 2 else contextlib.nullcontext():
                loss = s.model.loss(batch) / 3
                loss.backward()
            s.note(loss, len(batch["target"]))
            if number % 3 == 2:
                s.step()


def stepping_without_a_sum(s: Script) -> None:
    """The loop forgets it: the step sums."""
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            with no_sync(s):
                loss = s.model.loss(batch) / 2
                loss.backward()
                s.note(loss, len(batch["target"]))
                if number % 2:
                    s.step()
                    s.zero_grad()


def sum_after_sum(s: Script) -> None:
    """What was summed before stays in `.grad`, and counts once."""
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            with no_sync(s) if number % 2 else contextlib.nullcontext():
                loss = s.model.loss(batch) / 4
                loss.backward()
            s.note(loss, len(batch["target"]))
            if number % 4 == 3:
                s.step()
                s.zero_grad()
        s.zero_grad()


ALL = {
    "clip": between(clip(2.0)),
    "clip, 1-norm": between(clip(1.0)),
    "clip, max": between(clip("inf")),
    "clip, 0-norm": between(clip(0.0)),
    "clip, foreach": between(clip(2.0, foreach=True, error_if_nonfinite=True)),
    "clip, one by one": between(clip(2.0, foreach=False)),
    "clip, not reached": between(clip(2.0, 1e9)),
    "clip, accumulated": between(clip(2.0), every=2),
    "clip values": between(clip_values),
    "clip values, foreach": between(clip_values_foreach),
    "clip values, accumulated": between(clip_values, every=3),
    "clip twice": between(clip_twice),
    "clip with a known norm": between(clip_with_known_norm),
    "log each": between(log_each),
    "only finite": between(only_finite),
    "scale": between(scale),
    "scale, accumulated": between(scale, every=2),
    "new gradients": between(new_gradients),
    "dense form": between(dense_form),
} | {
    loop.__name__: loop
    for loop in (
        before_and_after_the_step,
        twice_before_a_step,
        prefetching_and_clipping,
        counting_batches,
        for_some_inputs,
        retaining,
        table_unused_on_some_ranks,
        with_scaler,
        infinite_in_some_rows,
        hooked,
        accumulating_without_sums,
        dropping_what_was_not_summed,
        stepping_without_a_sum,
        sum_after_sum,
    )
}
