"""Adagrad with one sum per row, as recommender systems train their tables."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaloader.deferred.deferred_tensor import program_of
from adaloader.overrides.constant import constant_tensor


class RowwiseAdagrad(Optimizer):
    """Adagrad (Duchi, Hazan, Singer 2011) whose state is one number per row: the sum of the mean of squares.

    sum += mean(grad * grad) over the row; row -= lr * grad / (sqrt(sum) + eps). A row is what the first dimension
    counts; the elements of a vector are rows of one number, so that biases are trained as by Adagrad. It trains managed
    tables (with their records a number longer, not twice as long) and ordinary parameters, from dense gradients and
    from sparse ones; rows without gradient stay as they are under both.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate, a number or a tensor of one.
        eps: added to the root.
        initial_accumulator_value: what each row's sum starts from.
        maximize: go up the gradient instead of down.

    State: `step` and `sum` `[rows]`, in the parameter's dtype.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        *,
        maximize: bool = False,
    ):
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be one number, got a tensor {list(lr.shape)}")
        for name, value in (("lr", lr), ("eps", eps), ("initial_accumulator_value", initial_accumulator_value)):
            if not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        defaults = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                self._begin(parameter, group)

    def _begin(self, parameter: Tensor, group: dict) -> None:
        rows = parameter.shape[0] if parameter.ndim else 1
        state = self.state[parameter]
        state["step"] = torch.tensor(0.0)
        start = group["initial_accumulator_value"]
        if program_of(parameter) is None:
            state["sum"] = torch.full((rows,), start, dtype=parameter.dtype, device=parameter.device)
        else:  # a table that is never built, whose sums live in its records
            state["sum"] = constant_tensor((rows,), start, dtype=parameter.dtype, device="cpu")

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure` computes the loss anew, and is returned what it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self._begin(parameter, group)
                self.state[parameter]["step"] += 1
                _update(parameter, parameter.grad, self.state[parameter]["sum"], group)
        return loss


def _update(parameter: Tensor, grad: Tensor, total: Tensor, group: dict) -> None:
    if grad.is_sparse:
        grad = grad.coalesce()
        rows, grad = grad.indices()[0], grad.values()
        if grad.numel() == 0:
            return
        if parameter.ndim > 1 and parameter.grad.sparse_dim() != 1:
            raise RuntimeError("RowwiseAdagrad needs sparse gradients with one sparse dimension, that of rows")
    else:
        rows = None
    grad = -grad if group["maximize"] else grad
    flat = grad.reshape(len(total) if rows is None else len(rows), -1)
    squares = flat.square().mean(1)
    if rows is None:
        total += squares
        own = total
    else:
        total.index_add_(0, rows, squares)
        own = total[rows]
    root = own.sqrt().add_(group["eps"])
    move = (flat * -float(group["lr"]) / root[:, None]).view(grad.shape)
    if rows is None:
        parameter += move
    else:
        parameter.index_add_(0, rows, move)
