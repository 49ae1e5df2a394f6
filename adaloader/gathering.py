"""Whole tables on rank 0, for leaving: what that takes, and who may ask for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from adaloader.managed_model import ManagedModel, log, managed_models
from adaloader.managed_table import ManagedTable
from adaloader.table_values import numbers_of_rank_0

_CHUNK_ROWS = 1 << 16
# Where containers find their limits, and the files of a limit and of what is used: cgroup version 2, and 1.
_CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory")
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def managed_of(model: nn.Module, instead: str) -> ManagedModel:
    """Return what manages `model`; what this rank still owes the others of an iteration that has ended is done first.

    Raises:
        ValueError: if nothing does, naming what to use `instead`.
    """
    managed = managed_models.get(model)
    if managed is None:
        raise ValueError(
            f"no AdaLoader manages this {type(model).__name__}; pass the model that the loader was given, or use "
            f"{instead}"
        )
    if managed.follower is not None:
        managed.follower.finish()
    return managed


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
        whole = torch.empty(spec.rows, words, dtype=getattr(torch, spec.dtype))
        array = whole.numpy()
        if states and table.table.history is None:
            array.fill(spec.rule.initial_state(spec.group))
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


def free_bytes() -> int:
    """Return the memory available to this process without swapping, -1 if the system does not say."""
    available = [left for root in _CGROUPS if (left := _left_in_cgroup(Path(root))) is not None]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        available.append(int(line.split()[1]) * 1024)
    return min(available, default=-1)


def _left_in_cgroup(folder: Path) -> int | None:
    """Return what a container's limit leaves, counting cached files as free; None where there is no limit."""
    for limit_name, usage_name in _CGROUP_FILES:
        if (folder / limit_name).exists() and (folder / usage_name).exists():
            limit = (folder / limit_name).read_text().strip()
            if limit == "max":
                return None
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(statistics.get("active_file", 0)) + int(statistics.get("inactive_file", 0))
            return max(0, int(limit) - int((folder / usage_name).read_text()) + cached)
    return None
