"""Learning-rate schedulers of PyTorch: which there are, how far each is, and how to take one further."""

from __future__ import annotations

import gc
import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler, ReduceLROnPlateau


def position_of(scheduler: LRScheduler) -> float:
    """Return how far `scheduler` is: the number of its step, with the fraction that a loop may have given it.

    Not `_step_count`: some of PyTorch's have none, and some do not count there.
    """
    if not hasattr(scheduler, "last_epoch"):  # a ChainedScheduler, whose parts are stepped together
        parts = getattr(scheduler, "_schedulers", ())
        return position_of(parts[0]) if parts else 0.0
    if isinstance(scheduler, CosineAnnealingWarmRestarts):
        return scheduler.last_epoch + scheduler.T_cur % 1  # what it was given is `last_epoch` rounded down
    return scheduler.last_epoch


def step_towards(scheduler: LRScheduler, position: float) -> bool:
    """Step `scheduler` if it is behind `position`, and say whether that took it any further."""
    before = position_of(scheduler)
    if before >= position:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about an order of calls that is the others'
        if before % 1 or position % 1:
            scheduler.step(position)  # as the others' loops call it
        else:
            scheduler.step()
    return position_of(scheduler) > before


def schedulers_of(optimizers: list[Optimizer]) -> list[LRScheduler]:
    """Return the learning-rate schedulers of `optimizers` that are stepped by themselves; PyTorch keeps no list of
    them."""
    found = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), LRScheduler)
        and not isinstance(each, ReduceLROnPlateau)
        and any(each.optimizer is optimizer for optimizer in optimizers)
    ]
    inner = {id(part) for each in found for part in getattr(each, "_schedulers", ())}
    return [each for each in found if id(each) not in inner]
