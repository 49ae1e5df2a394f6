"""Whole tables on rank 0, for leaving: what that takes, and who may ask for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from adaloader.memory.free_memory import free_bytes
from adaloader.model.managed_model import ManagedModel, log, managed_models
from adaloader.ranks.table_values import numbers_of_rank_0, read_whole, read_whole_states
from adaloader.tables.managed_table import ManagedTable

_CHUNK_ROWS = 1 << 16


def managed_of(model: nn.Module, instead: str) -> ManagedModel:
    """Return what manages `model`; what this rank still owes the others of an iteration that has ended is done first.

    Raises:
        ValueError: if nothing does, naming what to use `instead`.
        RuntimeError: on several ranks, once the model's last loader was closed here: the others may have gone.
    """
    managed = managed_models.get(model)
    if managed is None:
        raise ValueError(
            f"no AdaLoader manages this {type(model).__name__}; pass the model that the loader was given, or use "
            f"{instead}"
        )
    have_all_steps(managed)
    return managed


def have_all_steps(managed: ManagedModel) -> None:
    """Do what this rank still owes the others of an iteration that has ended.

    Raises:
        RuntimeError: on several ranks, once the model's last loader was closed here: the others may have gone.
    """
    if managed.parted:
        raise RuntimeError(
            f"the last loader of this {type(managed.model()).__name__} was closed, so that the {managed.ranks} ranks "
            "over which its tables are spread have parted; call full_state_dict(model), and what else takes or loads "
            "whole state, before loader.close()"
        )
    if managed.follower is not None:
        managed.follower.finish()


@contextlib.contextmanager
def exporting(managed: ManagedModel) -> Iterator[None]:
    """All ranks ask for the tables inside, which rank 0 gets, each gathered once."""
    managed.exporting = True
    try:
        yield
    finally:
        managed.exporting = False
        managed.exported.clear()


@contextlib.contextmanager
def leaving_tables_out(managed: ManagedModel) -> Iterator[None]:
    """What `state_dict()` of the model and its optimizers gives inside has nothing of managed tables."""
    managed.leaving_tables_out = True
    try:
        yield
    finally:
        managed.leaving_tables_out = False


@contextlib.contextmanager
def importing(managed: ManagedModel) -> Iterator[dict[ManagedTable, torch.Tensor]]:
    """What is copied onto tables inside is not written, but collected in the mapping that this gives."""
    managed.importing = {}
    try:
        yield managed.importing
    finally:
        managed.importing = None


def refuse_on_several_ranks(managed: ManagedModel, call: str, instead: str) -> None:
    """Raise RuntimeError where a call of one rank alone would need rows of all, unless all ranks are in it."""
    if managed.ranks > 1 and not managed.exporting:
        raise RuntimeError(
            f"{call}: the rows of managed tables are spread over {managed.ranks} ranks; call adaloader.{instead} on "
            "all ranks instead"
        )


def table_for_state_dict(managed: ManagedModel, table: ManagedTable, *, states: bool = False) -> torch.Tensor | None:
    """Return what a `state_dict()` has of a table: all of it, in memory of its own; see `gather_table`.

    Inside `exporting` that is on rank 0 alone, and collective. Otherwise it is on the rank that asks, which may be one
    alone: trainers that know nothing of ranks ask on each.

    Raises:
        MemoryError: if this rank lacks the memory.
        RuntimeError: on several ranks, once the model's last loader was closed here.
    """
    if managed.ranks == 1 or managed.exporting:
        return gather_table(managed, table, states=states)
    have_all_steps(managed)
    with managed.paused(), torch.inference_mode(False):
        if table.probation is None:
            return (read_whole_states if states else read_whole)(managed.manager, table.table)
        if not states:
            return table.probation.values.clone()
        rows = np.arange(table.table.spec.rows, dtype=np.int64)  # no step has been taken with it
        return torch.from_numpy(managed.manager.initial_states(table.table, rows))


def gather_table(managed: ManagedModel, table: ManagedTable, *, states: bool = False) -> torch.Tensor | None:
    """Return a whole table `[num_rows, dim]` or its optimizer state `[num_rows, state_words]` on rank 0, else None.

    Collective. Within one export a table is gathered once, however many names it has.
    """
    key = (table.name, states)
    if key in managed.exported:
        return managed.exported[key]
    spec, whole, receive = table.table.spec, None, None
    managed.manager.settle()  # rows that nobody holds are what they are after the same steps
    if managed.manager.rank == 0:
        words = table.table.store.record_class.state_words if states else spec.dim
        whole = torch.empty(spec.rows, words, dtype=getattr(torch, spec.dtype), device="cpu")
        array = whole.numpy()
        if states and table.table.history is None:
            array.fill(spec.rule.initial_state(spec.group))
            if table.probation is not None:
                table.probation.fill_states(np.arange(spec.rows), array)
        elif not table.all_rows_held:
            for start in range(0, spec.rows, _CHUNK_ROWS):
                rows = np.arange(start, min(start + _CHUNK_ROWS, spec.rows), dtype=np.int64)
                array[start : start + len(rows)] = managed.manager.unmade_rows(table.table, rows)[int(states)]

        def receive(rows, values, held_states):
            array[rows] = held_states if states else values

    managed.manager.gather_table(table.table, receive)
    if managed.exporting:
        managed.exported[key] = whole
    return whole


def snapshots(managed: ManagedModel, state: Mapping[str, object]) -> dict[str, object]:
    """Return `state`, during an export, with tensors on the CPU that do not change when training goes on."""
    gathered = {whole.untyped_storage().data_ptr() for whole in managed.exported.values() if whole is not None}

    def snapshot(value):
        if not torch.is_tensor(value):
            return value
        is_ours = value.layout == torch.strided and value.untyped_storage().data_ptr() in gathered
        return value.detach() if is_ours else value.detach().to("cpu", copy=True)

    return {name: snapshot(value) for name, value in state.items()}


def check_memory(managed: ManagedModel, needed_bytes: int) -> None:
    """Say what gathering takes on rank 0 and what is free there; raise on every rank if it is not enough (collective).

    Raises:
        MemoryError: with both figures.
    """
    needed, free = numbers_of_rank_0(managed.manager, [needed_bytes, free_bytes()])
    message = f"gathering the managed tables takes {needed:,} bytes on rank 0, where {free:,} are free"
    if needed > free >= 0:
        raise MemoryError(message + "; keep the tables sharded, or gather on a machine with more memory")
    if managed.manager.rank == 0:
        log.info(message)
