"""Gradients that come for a whole table at once, from code that autograd cannot see into (an `autograd.Function`)."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch

from adaloader.gradient_layout import check_layout
from adaloader.slabs import Part

if TYPE_CHECKING:
    from adaloader.managed_table import ManagedTable


def catch_whole_gradients(parameter: torch.Tensor, table: ManagedTable) -> None:
    """Have gradients that autograd brings to the parameter itself become row gradients of its table."""
    to_table = weakref.ref(table)

    def caught(gradients: tuple[torch.Tensor | None, ...]) -> tuple[None] | None:
        table, (gradient,) = to_table(), gradients
        if table is None or table.is_dense or gradient is None:
            return None
        table.receive(_part_of(table, gradient.detach()))
        return (None,)

    with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
        trains = parameter.requires_grad
        torch.Tensor.requires_grad_(parameter, True)
        accumulator = torch.Tensor.view_as(parameter, parameter).grad_fn.next_functions[0][0]
        torch.Tensor.requires_grad_(parameter, trains)
    accumulator.register_prehook(caught)
    table.accumulator = accumulator  # which autograd itself does not keep


def _part_of(table: ManagedTable, gradient: torch.Tensor) -> Part:
    check_layout(table.table.spec.rule, gradient.is_sparse, table.name, "a gradient made by an autograd.Function")
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        return Part(gradient.indices()[0].numpy().copy(), gradient.values().clone(), None, None)
    rows = (gradient != 0).any(1).nonzero().squeeze(1)
    return Part(rows.numpy().astype(np.int64), gradient[rows], None, None)
