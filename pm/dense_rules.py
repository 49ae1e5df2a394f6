"""Update rules of optimizers that move every row of a table at every step in which it has a gradient.

Each turns the hyperparameters of one step into an `Entry` of the table's history, by the arithmetic of torch.optim on
its scalars; `cuda_ops.advance` does the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pm.history import Entry

if TYPE_CHECKING:
    from pm.tables import Table

# The part of its first update that a gradient may still make SWEPT_STEPS later, below which no value feels it.
_UNFELT = 1e-17
SWEPT_STEPS = 1024
"""Rows of a table that never come to rest by themselves are caught up at least every so many steps."""


class DenseRule(ABC):
    """What they share. `kind` is the kernel's name for it, `parts` how many words of state it has per value."""

    catches_up = True
    moves_looked_up_rows = False
    kind: str
    parts: int

    @property
    def name(self) -> str:
        return self.kind

    def state_words(self, dim: int) -> int:
        return self.parts * dim

    def initial_state(self, group: Mapping[str, object]) -> float:
        return 0.0

    def covers(self, other: object) -> bool:
        """Whether records of this rule can go on under `other`, whose options were changed."""
        return self == other

    @abstractmethod
    def entry(self, table: Table, group: Mapping[str, object]) -> Entry:
        """Return the entry of the step that `table` is taking, its `gradient_steps`-th, and note what it changes."""


def _is_slow(ratio: float) -> bool:
    return ratio > _UNFELT ** (1 / SWEPT_STEPS)


@dataclass(frozen=True)
class MomentumSGD(DenseRule):
    """`torch.optim.SGD` with momentum (Polyak 1964; Nesterov's as in Sutskever et al. 2013), weight decay, or both.

    With sparse gradients PyTorch computes the same.
    """

    momentum: bool
    parts = property(lambda self: int(self.momentum))
    kind = property(lambda self: "sgd_momentum" if self.momentum else "sgd")

    def covers(self, other: object) -> bool:
        return isinstance(other, MomentumSGD) and (self.momentum or not other.momentum)

    def entry(self, table, group) -> Entry:
        lr, momentum, decay = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
        kept = 1 - float(group["dampening"]) if table.begun else 1.0
        table.begun = table.begun or momentum != 0
        left = 1 - float(np.dtype(table.spec.dtype).type(lr)) * float(np.dtype(table.spec.dtype).type(decay))
        return Entry(
            (lr, momentum, kept, decay, float(group["nesterov"])),
            (1.0, momentum if momentum else 1.0) if self.momentum else (left,),
            coefficient=lr,
            weight_decay=decay if self.momentum else 0.0,
            dies_out=momentum <= 1 if self.momentum else left > 0,
            slow=self.momentum and (decay != 0 or _is_slow(momentum)),
        )


@dataclass(frozen=True)
class DecayingAdagrad(DenseRule):
    """`torch.optim.Adagrad` with weight decay."""

    kind, parts = "adagrad", 1

    def initial_state(self, group) -> float:
        return float(group["initial_accumulator_value"])

    def entry(self, table, group) -> Entry:
        table.begun = True
        lr = group["lr"] / (1 + (table.gradient_steps - 1) * group["lr_decay"])
        decay, eps = float(group["weight_decay"]), float(group["eps"])
        return Entry((lr, 1.0, 0.0, eps, decay, 0.0), (), eps=eps, weight_decay=decay, slow=decay != 0)


@dataclass(frozen=True)
class RMSprop(DenseRule):
    """`torch.optim.RMSprop`."""

    centered: bool
    momentum: bool
    parts = property(lambda self: 1 + self.centered + self.momentum)
    kind = property(lambda self: "rmsprop" + "_centered" * self.centered + "_momentum" * self.momentum)

    def covers(self, other: object) -> bool:
        return isinstance(other, RMSprop) and other.centered == self.centered and self.momentum >= other.momentum

    def entry(self, table, group) -> Entry:
        table.begun = True
        lr, alpha, momentum = float(group["lr"]), float(group["alpha"]), float(group["momentum"])
        decay, eps = float(group["weight_decay"]), float(group["eps"])
        weight = float(np.dtype(table.spec.dtype).type(1 - alpha))
        return Entry(
            (lr, alpha, 1 - alpha, eps, decay, momentum),
            (1.0, momentum if momentum > 0 else 1.0, alpha, 1 - weight),
            coefficient=lr,
            eps=eps,
            weight_decay=decay,
            dies_out=momentum <= 1,
            slow=decay != 0 or _is_slow(momentum),
        )


@dataclass(frozen=True)
class Adadelta(DenseRule):
    """`torch.optim.Adadelta`."""

    kind, parts = "adadelta", 2

    def entry(self, table, group) -> Entry:
        table.begun = True
        lr, rho, eps, decay = (float(group[name]) for name in ("lr", "rho", "eps", "weight_decay"))
        return Entry(
            (lr, rho, 1 - rho, eps, decay, 0.0),
            (1.0, 1.0, rho),
            eps=eps,
            weight_decay=decay,
            slow=decay != 0,
        )


class _AdamLike(DenseRule):
    """Adam and its relatives: their entries differ in the factor of the first moment and in numbers of their own."""

    def entry(self, table, group) -> Entry:
        table.begun = True
        beta1, beta2 = group["betas"]
        lr, decay, eps = group["lr"], group["weight_decay"], float(group["eps"])
        decoupled = bool(group.get("decoupled_weight_decay", False))
        kept = float(1 - lr * decay) if decoupled and decay != 0 else 1.0
        coupled = 0.0 if decoupled else float(decay)
        factor, coefficient, own = self._own(table, group, lr, beta1, beta2)
        weight = float(np.dtype(table.spec.dtype).type(1 - beta1))
        ratio = self._ratio(float(beta1), float(beta2))
        return Entry(
            (1 - beta1, beta2, 1 - beta2, eps, coupled, kept, factor, *own),
            (kept, 1 - weight, beta2),
            coefficient=float(coefficient),
            eps=eps,
            weight_decay=coupled,
            dies_out=ratio <= min(1.0, kept) and kept > 0,
            slow=coupled != 0 or _is_slow(ratio),
        )

    def _ratio(self, beta1: float, beta2: float) -> float:
        """By which factor moment / root shrinks at a step without gradient, at least."""
        return beta1 / math.sqrt(beta2) if beta2 > 0 else math.inf

    @abstractmethod
    def _own(self, table, group, lr, beta1, beta2) -> tuple[float, float, tuple[float, ...]]:
        """Return (factor of the first moment, its bound for all later steps of the same lr, own numbers)."""


@dataclass(frozen=True)
class Adam(_AdamLike):
    """`torch.optim.Adam` and `AdamW`."""

    amsgrad: bool
    parts = property(lambda self: 3 if self.amsgrad else 2)
    kind = property(lambda self: "amsgrad" if self.amsgrad else "adam")

    def _own(self, table, group, lr, beta1, beta2):
        step = float(table.gradient_steps)
        step_size = lr / (1 - beta1**step)
        return -step_size, step_size, ((1 - beta2**step) ** 0.5,)


@dataclass(frozen=True)
class NAdam(_AdamLike):
    """`torch.optim.NAdam`."""

    kind, parts = "nadam", 2

    def _own(self, table, group, lr, beta1, beta2):
        step, momentum_decay = float(table.gradient_steps), group["momentum_decay"]
        mu = beta1 * (1.0 - 0.5 * (0.96 ** (step * momentum_decay)))
        mu_next = beta1 * (1.0 - 0.5 * (0.96 ** ((step + 1) * momentum_decay)))
        table.history.mu_product = table.history.mu_product * type(table.history.mu_product)(mu)
        product = float(table.history.mu_product)
        factor = (-lr * mu_next) / (1.0 - product * mu_next)
        grad_factor = -lr * (1.0 - mu) / (1.0 - product)
        return factor, factor, (1 - beta2**step, grad_factor)


@dataclass(frozen=True)
class RAdam(_AdamLike):
    """`torch.optim.RAdam`."""

    kind, parts = "radam", 2

    def _own(self, table, group, lr, beta1, beta2):
        step = float(table.gradient_steps)
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * (beta2**step) / correction2
        rectification = 0.0
        if rho > 5.0:
            rectification = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
        return lr, lr / correction1, (correction1, correction2**0.5, rectification)

    def _ratio(self, beta1: float, beta2: float) -> float:
        return max(beta1, super()._ratio(beta1, beta2))


@dataclass(frozen=True)
class Adamax(_AdamLike):
    """`torch.optim.Adamax`."""

    kind, parts = "adamax", 2

    def _own(self, table, group, lr, beta1, beta2):
        clr = lr / (1 - beta1 ** float(table.gradient_steps))
        return -clr, clr, ()

    def _ratio(self, beta1: float, beta2: float) -> float:
        return beta1 / beta2 if beta2 > 0 else math.inf
