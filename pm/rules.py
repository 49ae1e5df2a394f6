"""Update rules: how an owner applies a step's summed row gradient to records, one rule per supported optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import cuda_ops
from pm.dense_rules import DenseRule
from pm.storage.store import RecordStore


class SparseRule:
    """What rules share that leave alone the rows without gradient, as PyTorch does too, or to the same effect.

    Of any rule `state_words(dim)` says how many elements of optimizer state a record of `dim` values has, and
    `initial_state(group)` what they start from. `group` has the hyperparameters of the table's parameter group.
    """

    catches_up = False
    moves_looked_up_rows = False
    """Whether a row that was looked up moves though its gradient is zero, while one that was not stays."""

    def covers(self, other: object) -> bool:
        """Whether records of this rule can go on under `other`, whose options were changed."""
        return type(self) is type(other)


class Frozen(SparseRule):
    """No optimizer holds the table: its records carry a value alone, and a gradient for it is an error upstream."""

    name = "frozen"

    def state_words(self, dim: int) -> int:
        return 0

    def initial_state(self, group: Mapping[str, object]) -> float:
        return 0.0


class SGD(SparseRule):
    """`torch.optim.SGD` without momentum and weight decay: value -= lr * grad."""

    name = "sgd"

    def state_words(self, dim: int) -> int:
        return 0

    def initial_state(self, group: Mapping[str, object]) -> float:
        return 0.0

    def apply(self, store: RecordStore, slots, grads, scale, group, count: int, version: int) -> None:
        """Update the records at `slots` (int64 `[n]`, distinct) with `scale * grads` (`[n, dim]`)."""
        store.update(cuda_ops.sgd_update, slots, grads, float(group["lr"]), _sign(group) * scale, version)


class Adagrad(SparseRule):
    """`torch.optim.Adagrad` without weight decay (Duchi et al. 2011), state: the sum of squares per value."""

    name = "adagrad"

    def state_words(self, dim: int) -> int:
        return dim

    def initial_state(self, group: Mapping[str, object]) -> float:
        return float(group["initial_accumulator_value"])

    def apply(self, store: RecordStore, slots, grads, scale, group, count: int, version: int) -> None:
        """Update the records at `slots` (int64 `[n]`, distinct) with `scale * grads` (`[n, dim]`).

        `count` is the number of steps, this one included, in which the table had a gradient: it drives `lr_decay`.
        """
        decayed_lr = float(group["lr"] / (1 + (count - 1) * group["lr_decay"]))
        numbers = decayed_lr, float(group["eps"]), _sign(group) * scale, version
        store.update(cuda_ops.adagrad_update, slots, grads, *numbers)


class SparseAdam(SparseRule):
    """`torch.optim.SparseAdam`: Adam of the rows that have a gradient; their two moments are the state."""

    name = "sparse_adam"
    moves_looked_up_rows = True

    def state_words(self, dim: int) -> int:
        return 2 * dim

    def initial_state(self, group: Mapping[str, object]) -> float:
        return 0.0

    def apply(self, store: RecordStore, slots, grads, scale, group, count: int, version: int) -> None:
        """Update the records at `slots` (int64 `[n]`, distinct) with `scale * grads` (`[n, dim]`); `count` is t."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        step_size = group["lr"] * math.sqrt(1 - beta2**count) / (1 - beta1**count)
        numbers = (beta1, beta2), float(step_size), float(group["eps"]), _sign(group) * scale, version
        store.update(cuda_ops.sparse_adam_update, slots, grads, *numbers)


class RowwiseAdagrad(SparseRule):
    """`adaloader.RowwiseAdagrad`, state: the sum of the mean of squares, one number per row."""

    name = "rowwise_adagrad"

    def state_words(self, dim: int) -> int:
        return 1

    def initial_state(self, group: Mapping[str, object]) -> float:
        return float(group["initial_accumulator_value"])

    def apply(self, store: RecordStore, slots, grads, scale, group, count: int, version: int) -> None:
        """Update the records at `slots` (int64 `[n]`, distinct) with `scale * grads` (`[n, dim]`)."""
        numbers = float(group["lr"]), float(group["eps"]), _sign(group) * scale, version
        store.update(cuda_ops.rowwise_adagrad_update, slots, grads, *numbers)


def _sign(group: Mapping[str, object]) -> float:
    return -1.0 if group["maximize"] else 1.0


Rule = Frozen | SGD | Adagrad | SparseAdam | RowwiseAdagrad | DenseRule
