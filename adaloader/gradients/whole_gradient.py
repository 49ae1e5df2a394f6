"""Gradients that come for a whole table at once: of values read as a whole, or from an `autograd.Function`."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch

from adaloader.gradients.parts import Part
from adaloader.memory.device_memory import on_host
from adaloader.optimizers.gradient_layout import check_layout

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable


_gradient_of = torch.Tensor.grad.__get__


def catch_whole_gradients(parameter: torch.Tensor, table: ManagedTable) -> None:
    """Have gradients that autograd brings to the parameter itself become row gradients of its table."""
    to_table = weakref.ref(table)

    def caught(parameter: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            gradient = _gradient_of(parameter)
        if gradient is None:  # its rows' was delivered; so it is almost always, at each table and backward
            return
        table = to_table()
        if table is None or table.is_dense:
            return
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.grad.__set__(parameter, None)
        table.receive(_part_of(table, gradient.detach()))

    # Hooks of the user's on a table are kept with the table.
    parameter._post_accumulate_grad_hooks = OrderedDict({0: caught})


def read_whole(table: ManagedTable) -> torch.Tensor:
    """Return all values `[num_rows, dim]`, in memory of their own, with a gradient that becomes one of the rows."""
    with torch._C.DisableTorchFunctionSubclass():
        return _WholeRead.apply(table.parameter, table)


class _WholeRead(torch.autograd.Function):
    """The parameter's memory does not have its values; its gradient is caught where autograd brings it."""

    @staticmethod
    def forward(ctx, parameter: torch.Tensor, table: ManagedTable) -> torch.Tensor:
        with table.owner.paused():
            return table.whole_values().clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, None


def _part_of(table: ManagedTable, gradient: torch.Tensor) -> Part:
    check_layout(table.table.spec.rule, gradient.is_sparse, table.name, "a gradient of all of it")
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        return Part(on_host(gradient.indices()[0]).copy(), gradient.values().clone(), None, None)
    rows = (gradient != 0).any(1).nonzero().squeeze(1)
    return Part(on_host(rows).astype(np.int64), gradient[rows], None, None)
