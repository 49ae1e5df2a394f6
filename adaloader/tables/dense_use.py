"""A table that turns out to be used as a whole (a tied output layer, a penalty on its weight) becomes dense again."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from adaloader.errors import ManagedTableError
from adaloader.gradients.gradient_hooks import give_back_hooks
from adaloader.gradients.parts import spread
from adaloader.memory.free_memory import free_bytes
from adaloader.optimizers.held_state import state_names
from adaloader.optimizers.supported import group_of
from intents.sites import users_line

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable

log = logging.getLogger("adaloader")


def use_as_a_whole(tables: Collection[ManagedTable], operation: str) -> None:
    """Have `tables` be dense, or, where their rows are spread over ranks, ready to be read as a whole with gradient.

    Raises:
        ManagedTableError: if neither can be; all tables are then as before.
    """
    for table in tables:
        why = why_not_whole(table)
        if why is not None:
            raise refuse(table, operation, why)
    for table in tables:
        if is_spread(table):
            _say_once(table, operation)
        else:
            become_dense(table, operation)


def is_spread(table: ManagedTable) -> bool:
    """Whether the table's rows are on several ranks, so that none can make it dense by itself."""
    if table.owner.ranks == 1:
        return False
    return table.probation is None or bool(table.parts) or table.table.gradient_steps > table.steps_before


def why_not_dense(table: ManagedTable) -> str | None:
    """Return why the table cannot become dense any more, None if it can."""
    if is_spread(table):
        return "its rows were spread over the ranks after the first step that used it"
    return why_not_whole(table)


def why_not_whole(table: ManagedTable) -> str | None:
    """Return why the table can be used as a whole with its gradient neither as it is nor made dense, None if it can."""
    if table.owner.strategy.get(table.name) == "managed":
        return 'strategy= says "managed"'
    if table.is_deferred:
        return "it was declared under deferred_init, and is never built whole"
    needed = table.parameter.numel() * table.parameter.element_size() * (2 if table.probation is not None else 3)
    free = free_bytes()
    if needed > free >= 0:
        return f"a gradient of its size and what goes with it take {needed:,} bytes, where {free:,} are free"
    return None


def become_dense(table: ManagedTable, operation: str) -> None:
    """Give the parameter its values and optimizer state back; lookups made before send their gradients there too.

    On several ranks all ranks must meet the same use in the same step.
    """
    model, parameter = table.owner, table.parameter
    where = users_line()
    # Out of a function transform (jvp comes here from one), whose wrappers of what is made there do not outlive it.
    with model.paused(), torch.no_grad(), torch.inference_mode(False), temporarily_clear_interpreter_stack():
        values = table.whole_values()
        values = values if table.probation is not None else values.clone()
        _give_state_back(table)
        gradient = _dense_gradient(table)
        table.is_dense, table.probation, table.whole = True, None, None
        parameter.__class__ = torch.nn.Parameter
        del parameter._managed
        parameter.data = values
        parameter.grad = gradient
        give_back_hooks(table)
    model.table_became_dense(table, f"{operation} at {where} uses it as a whole")
    log.info("table %r stays an ordinary dense parameter: %s at %s uses it as a whole", table.name, operation, where)


def _dense_gradient(table: ManagedTable) -> torch.Tensor | None:
    if not table.has_gradient:
        return None
    total = torch.zeros(table.parameter.shape, dtype=table.parameter.dtype, device=table.parameter.device)
    for part in table.parts:
        values = part.values.detach() * (1.0 if part.scale is None else part.scale)
        if part.counts is not None:
            values = values / table.here(part.counts).clamp(min=1).to(values.dtype)[:, None]
        total += spread(part.rows, values, total.shape)
    return total


def _give_state_back(table: ManagedTable) -> None:
    """Put what the records hold into the optimizer; during probation it never left."""
    from adaloader.optimizers.optimizer_state import saved_entry

    model, probation, names = table.owner, table.probation, state_names(table.table.spec.rule)
    place = group_of(model.optimizers, table.parameter)
    if place is None or not names:
        return
    optimizer = model.optimizers[place[0]]
    entry = optimizer.state.get(table.parameter, {})
    if probation is None:
        if entry or table.table.begun:
            entry = saved_entry(model, table, optimizer.param_groups[place[1]], entry)
            optimizer.state[table.parameter] = {
                name: _copy(value, table.parameter.device if name in names else value.device)
                if torch.is_tensor(value)
                else value
                for name, value in entry.items()
            }
    elif probation.states is not None and model.manager.rank > 0:
        for name, part in zip(names, probation.states, strict=True):
            optimizer.state[table.parameter][name] = _copy(part, table.parameter.device)


def _copy(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return value.to(device, copy=True)


def _say_once(table: ManagedTable, operation: str) -> None:
    if table.is_read_whole:
        return
    table.is_read_whole = True
    log.warning(
        "table %r %s is used as a whole, with its gradient, by %s at %s: its rows are spread over the ranks, and each "
        "rank brings all of them each time. strategy={%r: 'dense'} keeps it whole on every rank from the start; what "
        "needs no gradient there (a constraint, a norm to log) belongs under torch.no_grad()",
        table.name,
        list(table.parameter.shape),
        operation,
        users_line(),
        table.name,
    )


def refuse(table: ManagedTable, operation: str, why: str, *, may_be_read: bool = True) -> ManagedTableError:
    """Return the error for a use as a whole that is not possible; `may_be_read`: but would be, without gradient."""
    read = "If no gradient is needed there (a constraint, a norm to log), do it under torch.no_grad(). "
    return ManagedTableError(
        f"{operation} at {users_line()} was called on table {table.name!r} {list(table.parameter.shape)} and needs all "
        f"of it, with its gradient; AdaLoader manages its rows, and only lookups (embedding, embedding_bag, "
        f"index_select, table[ids]) are possible now: {why}. {read if may_be_read else ''}To keep it an ordinary dense "
        f"parameter from the start, pass AdaLoader(..., strategy={{{table.name!r}: 'dense'}}) or "
        f"min_rows={table.table.spec.rows + 1}"
    )
