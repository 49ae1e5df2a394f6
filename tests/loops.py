"""Training loops as people write them; see `loop_cases.py` for what they run on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tests.loop_cases import ROWS, Script


def usual(s: Script) -> None:
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            loss = F.mse_loss(s.model(batch["x"], batch["y"], batch["dense"]), batch["target"])
            loss.backward()
            s.step()
            s.note(loss, len(batch["target"]))


def _work(s: Script, batch) -> None:
    loss = s.model.loss(batch)
    loss.backward()
    s.step()
    s.zero_grad()
    s.note(loss, len(batch["target"]))


def prefetching(s: Script) -> None:
    """One batch ahead, as device prefetchers do."""
    for _ in s.passes():
        iterator = iter(s.loader)
        coming = next(iterator, None)
        while coming is not None:
            batch, coming = coming, next(iterator, None)
            _work(s, batch)


def prefetching_in_the_middle(s: Script) -> None:
    """The next batch is taken between backward and step."""
    for _ in s.passes():
        iterator = iter(s.loader)
        batch = next(iterator, None)
        while batch is not None:
            loss = s.model.loss(batch)
            loss.backward()
            s.note(loss, len(batch["target"]))
            batch = next(iterator, None)
            s.step()
            s.zero_grad()


def prefetching_two(s: Script) -> None:
    for _ in s.passes():
        iterator = iter(s.loader)
        held = list(itertools.islice(iterator, 2))
        while held:
            held += itertools.islice(iterator, 1)
            _work(s, held.pop(0))


def prefetching_and_stepping_twice(s: Script) -> None:
    for _ in s.passes():
        iterator = iter(s.loader)
        coming = next(iterator, None)
        while coming is not None:
            batch, coming = coming, next(iterator, None)
            _work(s, batch)
            _work(s, batch)


def prefetching_and_accumulating(s: Script) -> None:
    """One batch ahead; what is left at the end is dropped."""
    for _ in s.passes():
        iterator = iter(s.loader)
        coming = next(iterator, None)
        number = 0
        while coming is not None:
            batch, coming = coming, next(iterator, None)
            loss = s.model.loss(batch) / 3
            loss.backward()
            s.note(loss, len(batch["target"]))
            number += 1
            if number % 3 == 0:
                s.step()
                s.zero_grad()
        s.zero_grad()


def stepping_at_the_end_too(s: Script) -> None:
    """Accumulates, and counts on the loader's length for the last step."""
    for _ in s.passes():
        for number, batch in enumerate(s.loader, 1):
            loss = s.model.loss(batch) / 3
            loss.backward()
            s.note(loss, len(batch["target"]))
            if number % 3 == 0 or number == len(s.loader):
                s.step()
                s.zero_grad()


def clipping(s: Script) -> None:
    """Dense gradients are whole when backward returns."""
    dense = [parameter for name, parameter in s.model.named_parameters() if not name.startswith(("rows", "bag"))]
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            loss = s.model.loss(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(dense, 0.1)
            s.step()
            s.note(loss, len(batch["target"]))
            s.note_same(norm)


def all_taken_first(s: Script) -> None:
    for _ in s.passes():
        batches = list(s.loader)
        for batch in batches[:3]:
            s.note(s.model.loss(batch).detach(), len(batch["target"]))


def called_twice(s: Script) -> None:
    for _ in s.passes():
        for batch in s.loader:
            first = s.model(batch["x"], batch["y"], batch["dense"])
            second = s.model(batch["x"].flip(1), batch["y"], -batch["dense"])
            loss = F.mse_loss(first, batch["target"]) + (first * second).mean()
            loss.backward()
            s.step()
            s.zero_grad()
            s.note(loss, len(batch["target"]))


def again_after_the_step(s: Script) -> None:
    """As a GAN does: two steps for one batch."""
    for _ in s.passes():
        for batch in s.loader:
            for sign in (1.0, 0.5):
                s.zero_grad()
                loss = sign * s.model.loss(batch)
                loss.backward()
                s.step()
                s.note(loss, len(batch["target"]))


def accumulating(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader, 1):
            loss = s.model.loss(batch) / 4
            loss.backward()
            s.note(loss, len(batch["target"]))
            if number % 4 == 0:
                s.step()
                s.zero_grad()


def accumulating_to_the_end(s: Script) -> None:
    """What is left at the end of the epoch is stepped too."""
    for _ in s.passes():
        gathered = 0
        for batch in s.loader:
            loss = s.model.loss(batch) / 3
            loss.backward()
            s.note(loss, len(batch["target"]))
            gathered += 1
            if gathered == 3:
                s.step()
                s.zero_grad()
                gathered = 0
        s.zero_grad()


def evaluating_the_batch(s: Script) -> None:
    for _ in s.passes():
        for batch in s.loader:
            with torch.no_grad():
                s.note(s.model.loss(batch), len(batch["target"]))
            loss = s.model.loss(batch)
            with torch.no_grad():
                s.note(s.model.loss(batch), len(batch["target"]))
            loss.backward()
            s.step()
            s.zero_grad()
            with torch.inference_mode():
                s.note(s.model.loss(batch), len(batch["target"]))


def evaluating_another_loader(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            _work(s, batch)
            if number == 1:
                _validate(s)
        _validate(s)


def evaluating_another_loader_in_mid_step(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            loss = s.model.loss(batch)
            if number == 0:
                _validate(s)
            loss.backward()
            if number == 0:
                _validate(s)
            s.step()
            s.zero_grad()
            s.note(loss, len(batch["target"]))


def _validate(s: Script) -> None:
    s.model.eval()
    s.log.append([])
    with torch.no_grad():
        for batch in s.validation:
            s.note(s.model.loss(batch), len(batch["target"]))
    s.log.append([])
    s.model.train()


def evaluating_without_no_grad(s: Script) -> None:
    for _ in s.passes():
        for batch in s.loader:
            _work(s, batch)
        s.log.append([])
        for batch in s.validation:
            s.note(s.model.loss(batch), len(batch["target"]))


def evaluating_any_ids(s: Script) -> None:
    """All ranks look up the same ids, of no batch."""
    ids = torch.arange(0, ROWS, 7)
    for _ in s.passes():
        for batch in s.loader:
            with torch.no_grad():
                s.note_same(s.model.rows(ids).sum())
            _work(s, batch)
        s.log.append([])
        s.note_same(s.model.bag(ids[None]).detach().sum())


def evaluating_on_one_rank(s: Script) -> None:
    """Rank 0 looks, once with a loader of its own; the others go on."""
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            _work(s, batch)
            if s.rank == 0 and number % 2 == 1:
                with torch.no_grad():
                    s.note_same(s.model.rows(torch.arange(3, ROWS, 5)).sum())
            else:
                s.log[-1].append((0.0, 0))


def skipping(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            if number % 3 == 1:
                continue
            _work(s, batch)


def skipping_the_first(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            if number == 0:
                continue
            _work(s, batch)


def skipping_the_end(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            if number < 2:
                _work(s, batch)


def leaving_early(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            _work(s, batch)
            if number == 1:
                break


def peeking(s: Script) -> None:
    """A first batch is taken for its shapes, several times, and looked up once."""
    for _ in range(5):
        batch = next(iter(s.loader))
    s.model.loss(batch)
    usual(s)


def stepping_every_other_batch(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            s.zero_grad()
            loss = s.model.loss(batch)
            loss.backward()
            s.note(loss, len(batch["target"]))
            if number % 2 == 0:
                s.step()


def forward_only_sometimes(s: Script) -> None:
    """A step without a lookup, of dense parameters alone."""
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            s.zero_grad()
            loss = s.model.side_loss(batch) if number % 2 == 0 else s.model.loss(batch)
            loss.backward()
            s.step()
            s.note(loss, len(batch["target"]))


def unused_on_some_steps(s: Script) -> None:
    for _ in s.passes():
        for number, batch in enumerate(s.loader):
            loss = s.model.loss(batch)
            if number % 2:
                loss = loss + s.model.side_loss(batch)
            loss.backward()
            s.step()
            s.zero_grad()
            s.note(loss, len(batch["target"]))


def unused_on_some_ranks(s: Script) -> None:
    """Rank 0 leaves out a table, rank 1 a dense layer."""
    for _ in s.passes():
        for batch in s.loader:
            whole = 0.0
            for rank, share, part in s.shares(batch):
                loss = s.model.side_loss(share) if rank == 0 else s.model.loss(share)
                whole = whole + part * loss
            whole.backward()
            s.step()
            s.zero_grad()
            s.note(whole, len(batch["target"]))


def two_batches_for_one_backward(s: Script) -> None:
    for _ in s.passes():
        iterator = iter(s.loader)
        for first, second in zip(iterator, iterator, strict=False):
            losses = [s.model.loss(batch) for batch in (second, first)]
            (losses[0] + 0.5 * losses[1]).backward()
            s.step()
            s.zero_grad()
            for loss, batch in zip(losses, (second, first), strict=True):
                s.note(loss, len(batch["target"]))


def lookups_in_the_loop(s: Script) -> None:
    """Outside any module, and of ids that the loop has made."""
    for _ in s.passes():
        for batch in s.loader:
            ids = (batch["x"] * 3 + batch["y"][:, :1]) % ROWS
            looked_up = F.embedding(ids, s.model.rows.weight)
            pooled = F.embedding_bag(torch.cat([ids, batch["y"]], 1), s.model.bag.weight, mode="sum")
            loss = looked_up.square().mean() + F.mse_loss(pooled.sum(1), batch["target"])
            loss.backward()
            s.step()
            s.zero_grad()
            s.note(loss, len(batch["target"]))


def changing_the_batch(s: Script) -> None:
    """Preprocessing in place."""
    for _ in s.passes():
        for batch in s.loader:
            batch["x"].add_(1).remainder_(ROWS)
            batch["y"] = batch["y"].clamp(min=2)
            _work(s, batch)


def wrapped_by_others(s: Script) -> None:
    from tqdm import tqdm

    for _ in s.passes():
        bar = tqdm(enumerate(tqdm(s.loader, disable=True)), disable=True)
        for (_, batch), _ in zip(bar, itertools.count(), strict=False):
            _work(s, batch)


def two_iterators(s: Script) -> None:
    """Two passes over one loader at a time; one is left half way."""
    first, second = iter(s.loader), iter(s.loader)
    for _ in range(2):
        _work(s, next(first))
        _work(s, next(second))
    del first
    for batch in second:
        _work(s, batch)


def two_loaders(s: Script) -> None:
    """Alternately from the loader and from the one for validation, which is trained on as well."""
    for _ in s.passes():
        for batch, other in zip(s.loader, s.validation, strict=False):
            _work(s, batch)
            with torch.no_grad():
                s.note(s.model.loss(other), len(other["target"]))


def never_clearing(s: Script) -> None:
    """Gradients add up over all steps."""
    for _ in s.passes():
        for batch in s.loader:
            loss = s.model.loss(batch)
            loss.backward()
            s.step()
            s.note(loss, len(batch["target"]))


def clearing_to_zero(s: Script) -> None:
    for _ in s.passes():
        for batch in s.loader:
            for optimizer in s.optimizers:
                optimizer.zero_grad(set_to_none=False)
            loss = s.model.loss(batch)
            loss.backward()
            s.step()
            s.note(loss, len(batch["target"]))


def separate_backwards(s: Script) -> None:
    """Two losses of one forward pass, one after the other."""
    for _ in s.passes():
        for batch in s.loader:
            s.zero_grad()
            predicted = s.model(batch["x"], batch["y"], batch["dense"])
            first, second = F.mse_loss(predicted, batch["target"]), s.model.side_loss(batch)
            predicted.square().mean().backward(retain_graph=True)
            first.backward()
            second.backward()
            s.step()
            s.note(first, len(batch["target"]))


ALL: list[Callable[[Script], None]] = [
    usual,
    prefetching,
    prefetching_in_the_middle,
    prefetching_two,
    prefetching_and_stepping_twice,
    prefetching_and_accumulating,
    stepping_at_the_end_too,
    clipping,
    all_taken_first,
    called_twice,
    again_after_the_step,
    accumulating,
    accumulating_to_the_end,
    evaluating_the_batch,
    evaluating_another_loader,
    evaluating_another_loader_in_mid_step,
    evaluating_without_no_grad,
    evaluating_any_ids,
    evaluating_on_one_rank,
    skipping,
    skipping_the_first,
    skipping_the_end,
    leaving_early,
    peeking,
    stepping_every_other_batch,
    forward_only_sometimes,
    unused_on_some_steps,
    unused_on_some_ranks,
    two_batches_for_one_backward,
    lookups_in_the_loop,
    changing_the_batch,
    wrapped_by_others,
    two_iterators,
    two_loaders,
    never_clearing,
    clearing_to_zero,
    separate_backwards,
]
NEED_EVEN_BATCHES = (two_batches_for_one_backward,)
"""One backward over batches that rank shares differ in has no weight that is right for both."""
