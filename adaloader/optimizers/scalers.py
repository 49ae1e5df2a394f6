"""Loss scales: a `torch.amp.GradScaler` per rank, whose scale must be the same on all, as gradients are averaged.

A rank that follows others at the end of an epoch (`following.py`) is outside its loop and does not update its scaler;
it takes over what the others' have come to.
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch.amp.grad_scaler import GradScaler

_UNSCALE_CODE = GradScaler._unscale_grads_.__code__


class Scalers:
    """The scalers that have unscaled gradients of one model's tables, in the order of their first use."""

    def __init__(self):
        self._known: list[weakref.ref[GradScaler]] = []

    def __len__(self) -> int:
        return len(self._alive())

    def _alive(self) -> list[GradScaler]:
        return [scaler for known in self._known if (scaler := known()) is not None]

    def in_use(self) -> None:
        """A gradient is being unscaled: note by which scaler, if by one; it does not say."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _UNSCALE_CODE:
                scaler = frame.f_locals["self"]
                if all(known is not scaler for known in self._alive()):
                    self._known.append(weakref.ref(scaler))
                return
            frame = frame.f_back

    def states(self) -> list[torch.Tensor]:
        """Return copies of scale (float32 `[]`) and growth tracker (int32 `[]`) of each."""
        return [part.clone() for scaler in self._alive() for part in (scaler._scale, scaler._growth_tracker)]

    def take_over(self, states: list[torch.Tensor]) -> None:
        """Set the scalers to another rank's `states`."""
        own = [part for scaler in self._alive() for part in (scaler._scale, scaler._growth_tracker)]
        for mine, theirs in zip(own, states, strict=False):
            mine.copy_(theirs)
