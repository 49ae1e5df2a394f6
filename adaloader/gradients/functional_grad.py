"""`torch.autograd.grad` with managed tables among the inputs: their gradients come as row gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaloader.errors import ManagedTableError
from adaloader.gradients.parts import Part, no_rows
from adaloader.gradients.row_gradient import RowGradient, row_gradient
from adaloader.gradients.row_sum import RowSum

_UNUSED = (
    "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True if this is "
    "the desired behavior."
)


def grad(
    outputs,
    inputs,
    grad_outputs=None,
    retain_graph=None,
    create_graph=False,
    only_inputs=True,
    allow_unused=None,
    is_grads_batched=False,
    materialize_grads=False,
) -> tuple[torch.Tensor | None, ...]:
    """As `torch.autograd.grad`; a table's is a `RowGradient`, differentiable with `create_graph`.

    Raises:
        ManagedTableError: for batched gradients, or on several ranks, where it would be of this rank's loss alone.
    """
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    tables = [each._managed for each in inputs if hasattr(each, "_managed")]
    if not tables:
        raise ManagedTableError("autograd.grad: a table can be among the inputs, not among the outputs")
    _check(inputs, tables, is_grads_batched)
    captured: dict[object, list[Part]] = {table: [] for table in tables}
    for table in tables:
        table.captured = captured[table]
    try:
        with torch._C.DisableTorchFunctionSubclass():
            found = torch.autograd.grad(
                outputs,
                inputs,
                grad_outputs,
                retain_graph=retain_graph,
                create_graph=create_graph,
                only_inputs=only_inputs,
                allow_unused=True,
            )
    finally:
        for table in tables:
            table.captured = None
    results = [
        _rows(each._managed, captured[each._managed]) if hasattr(each, "_managed") else result
        for each, result in zip(inputs, found, strict=True)
    ]
    if materialize_grads:
        return tuple(_zero(i) if result is None else result for i, result in zip(inputs, results, strict=True))
    if not allow_unused and any(result is None for result in results):
        raise RuntimeError(_UNUSED)
    return tuple(results)


def _check(inputs: Sequence[torch.Tensor], tables: list, is_grads_batched: bool) -> None:
    name = tables[0].name
    if not all(each.requires_grad for each in inputs):
        raise RuntimeError("One of the differentiated Tensors does not require grad")
    if is_grads_batched:
        raise ManagedTableError(f"autograd.grad with is_grads_batched=True cannot be had for table {name!r}")
    if tables[0].owner.ranks > 1:
        raise ManagedTableError(
            f"autograd.grad of table {name!r} would be of this rank's loss alone, one of {tables[0].owner.ranks}: call "
            "backward() and read parameter.grad, or differentiate with respect to the rows that were looked up"
        )


def _rows(table, parts: list[Part]) -> RowGradient | None:
    return row_gradient(RowSum(table, parts, belongs_to_table=False)) if parts else None


def _zero(given: torch.Tensor) -> torch.Tensor:
    if hasattr(given, "_managed"):
        return _rows(given._managed, [no_rows(given._managed)])
    return torch.zeros_like(given)
