"""Update rules: how an owner applies a step's summed row gradient to records, one rule per supported optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import cuda_ops
from pm.store import RecordStore


class Frozen:
    """No optimizer holds the table: its records carry a value alone, and a gradient for it is an error upstream."""

    name = "frozen"

    def state_words(self, dim: int) -> int:
        return 0

    def initial_state(self, group: Mapping[str, object]) -> float:
        return 0.0


class SGD:
    """`torch.optim.SGD` without momentum and weight decay: value -= lr * grad."""

    name = "sgd"

    def state_words(self, dim: int) -> int:
        return 0

    def initial_state(self, group: Mapping[str, object]) -> float:
        return 0.0

    def apply(self, store: RecordStore, slots, grads, scale, group, count: int, version: int) -> None:
        """Update the records at `slots` (int64 `[n]`, distinct) with `scale * grads` (`[n, dim]`)."""
        sign = -1.0 if group["maximize"] else 1.0
        dim = store.record_class.dim
        lr = float(group["lr"])
        cuda_ops.sgd_update(store.words, store.stride, dim, store.steps, slots, grads, lr, sign * scale, version)


class Adagrad:
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
        sign = -1.0 if group["maximize"] else 1.0
        decayed_lr = float(group["lr"]) / (1 + (count - 1) * float(group["lr_decay"]))
        cuda_ops.adagrad_update(
            store.words,
            store.stride,
            store.record_class.dim,
            store.steps,
            slots,
            grads,
            decayed_lr,
            float(group["eps"]),
            sign * scale,
            version,
        )


Rule = Frozen | SGD | Adagrad
