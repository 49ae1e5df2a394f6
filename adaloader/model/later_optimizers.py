"""Optimizers that come later: for tables that none has trained yet, and in place of those that did."""

from __future__ import annotations

from dataclasses import replace

from torch.optim import Optimizer

import pm
from adaloader.model import adoption
from adaloader.model.adoption import form_on_rank_0
from adaloader.model.managed_model import ManagedModel
from adaloader.optimizers.gradient_layout import check_modules
from adaloader.optimizers.held_state import HeldState, continue_from, free_state, held_state, starting_from
from adaloader.optimizers.optimizer_state import hook_optimizer
from adaloader.optimizers.supported import group_of, rule_for, snapshot
from adaloader.ranks.table_values import all_texts, load_states
from adaloader.tables.managed_table import ManagedTable
from adaloader.tables.probation import confirm
from pm.dense_rules import DenseRule


def attach_later(managed: ManagedModel, optimizers: list[Optimizer]) -> None:
    """A later loader brings optimizers that the first one did not have: for tables that none has trained, or in place
    of those that did."""
    fresh = [o for o in optimizers if not any(o is known for known in managed.optimizers)]
    held = [(table, place) for table in managed.tables if (place := group_of(optimizers, table.parameter, table.name))]
    brought = [(table, optimizers[number], at) for table, (number, at) in held if optimizers[number] in fresh]
    changed = [entry for entry in brought if not isinstance(entry[0].table.spec.rule, pm.Frozen)]
    if changed:
        _check_change(managed, changed)
    for table, optimizer, at in brought:
        if isinstance(table.table.spec.rule, pm.Frozen):
            train_from_now_on(managed, table, optimizer)
        else:
            _change_optimizer(managed, table, optimizer, at)
    for known in managed.optimizers:
        if any(group_of([known], table.parameter) for table, _, _ in changed):
            managed.let_go(known)
    managed.attach(fresh)
    for optimizer in fresh:
        hook_optimizer(managed, optimizer)


def _check_change(managed: ManagedModel, changed: list[tuple[ManagedTable, Optimizer, int]]) -> None:
    """Raise if a table cannot be trained by the group of an optimizer that it is to be trained by in place of another,
    before anything is changed (collective).

    Raises:
        UnsupportedOptimizerError: if the optimizer can train no table.
        ValueError: on all ranks, with the reason.
    """
    problem = ""
    for table, optimizer, at in changed:
        kind = type(optimizer).__name__
        if managed.was_let_go(optimizer):
            problem = (
                f"this {kind} trained table {table.name!r} until a later loader was given another optimizer for it, "
                "and its state went then: pass that one, or build a new optimizer"
            )
        elif why := _why_not_changed(table, optimizer, at):
            problem = (
                f"table {table.name!r} is trained by an earlier loader's optimizer, and cannot go on under this "
                f"{kind}: {why}. Change that one's param_groups (lr, weight_decay), or take full_state_dict(model), "
                "close the loader, and build model and loader anew from it"
            )
        group = optimizer.param_groups[at]
        check_modules(managed.model(), {table.name: (rule_for(optimizer, group, table.name), group)})
    manager = managed.manager
    if first := next((text for text in all_texts(manager, problem) if text), ""):
        raise ValueError(first)
    kinds = [(table.name, type(optimizer).__name__, at) for table, optimizer, at in changed]
    adoption.agree(manager, "optimizers for the next stage", repr(kinds))


def train_from_now_on(managed: ManagedModel, table: ManagedTable, optimizer: Optimizer) -> None:
    """A table that no optimizer held is held by `optimizer` now (collective): a later loader has brought it, or
    `add_param_group` has added the table.
    """
    _, at = group_of([optimizer], table.parameter, table.name)
    group = optimizer.param_groups[at]
    check_modules(managed.model(), {table.name: (rule_for(optimizer, group, table.name), group)})
    _adopt_later(managed, table, optimizer, at)


def _adopt_later(model: ManagedModel, table: ManagedTable, optimizer: Optimizer, at: int) -> None:
    """Have group `at` of `optimizer` train a table that no optimizer has held so far (collective)."""
    spec, held, form, differs_by_row = _trained_by(model, table, optimizer, at)
    model.manager.replace_rule(table.table, spec)
    _begin_with(model, table, optimizer, held, form, differs_by_row)


def _why_not_changed(table: ManagedTable, optimizer: Optimizer, at: int) -> str:
    """Return why group `at` of `optimizer` cannot train a table in place of another optimizer, "" if it can.

    Raises:
        UnsupportedOptimizerError: if it can train no table.
    """
    rule = rule_for(optimizer, optimizer.param_groups[at], table.name)
    held_state(optimizer, table.parameter, rule)
    if _keeps_records(table.table.spec.rule, rule):
        return ""
    return table.owner.manager.why_rule_stays(table.table, all_made=table.all_rows_held or table.probation is not None)


def _change_optimizer(model: ManagedModel, table: ManagedTable, optimizer: Optimizer, at: int) -> None:
    """Have group `at` of `optimizer` train a table that another one trained, with its own state (collective)."""
    if table.probation is not None:
        confirm(table)
    manager = model.manager
    spec, held, form, differs_by_row = _trained_by(model, table, optimizer, at)
    if _keeps_records(table.table.spec.rule, spec.rule):
        with manager.still():
            table.table.spec = spec
            manager.reset_states(table.table)
    else:
        manager.replace_rule(table.table, spec, all_made=table.all_rows_held)
    _begin_with(model, table, optimizer, held, form, differs_by_row)


def _keeps_records(old: pm.Rule, new: pm.Rule) -> bool:
    """Whether records of rows under one rule can go on as they are under the other."""
    return old == new if isinstance(old, DenseRule) else type(old) is type(new)


def _trained_by(
    model: ManagedModel, table: ManagedTable, optimizer: Optimizer, at: int
) -> tuple[pm.TableSpec, HeldState, HeldState, bool]:
    """Return the spec of a table that group `at` of `optimizer` is going to train, what that holds for it, the same but
    what differs by row as it is on rank 0, and whether any does (collective)."""
    group = optimizer.param_groups[at]
    rule = rule_for(optimizer, group, table.name)
    held = held_state(optimizer, table.parameter, rule)
    differs_by_row, form = form_on_rank_0(model.manager, held)
    group = starting_from(snapshot(group), rule, form.constant)
    return replace(table.table.spec, rule=rule, group=group, fill_states=None), held, form, differs_by_row


def _begin_with(
    model: ManagedModel, table: ManagedTable, optimizer: Optimizer, held: HeldState, form: HeldState, by_row: bool
) -> None:
    """Have records go on from what `optimizer` holds; see `_trained_by` (collective)."""
    continue_from(table.table, form)
    if by_row:
        load_states(model.manager, table.table, held.parts)
    free_state([optimizer], table.parameter)
