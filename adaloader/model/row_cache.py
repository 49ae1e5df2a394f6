"""The rows of a model's tables that are kept on its device: which tables have a cache there, and of what size."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

import pm
from adaloader.memory.device_memory import KINDS
from adaloader.model.managed_model import ManagedModel, log


def lone_manager(tables: Iterable[nn.Parameter], budget_bytes: int | None) -> pm.Manager:
    """Return the manager of one rank for these tables, with `device_cache_bytes` as the loader was given it.

    Raises:
        ValueError: if a cache is asked for, and there is no table on a device.
    """
    if any(table.device.type in KINDS for table in tables):
        return pm.CachedManager()
    if budget_bytes:
        raise ValueError(
            f"device_cache_bytes={budget_bytes:,} is for the rows of tables on a CUDA device, and no managed table is "
            "on one: move the model there before the loader is built, or leave device_cache_bytes out"
        )
    return pm.Manager()


def cache_rows(managed: ManagedModel, budget_bytes: int | None) -> None:
    """Keep rows of the managed tables on their device, `budget_bytes` in all (None: what the device says; 0: none).

    With several ranks none are kept there, nor of tables whose optimizer moves rows that have no gradient.
    """
    on_device = [table for table in managed.tables if table.memory is not None]
    if not isinstance(managed.manager, pm.CachedManager):
        if budget_bytes and on_device:
            log.warning(
                "device_cache_bytes=%s has no effect on %d ranks: rows are copied to the device for each batch",
                f"{budget_bytes:,}",
                managed.ranks,
            )
        return
    if budget_bytes is None:
        budget_bytes = min((table.memory.default_cache_bytes() for table in on_device), default=0)
    if budget_bytes:
        managed.manager.cache({table.table.number: table.memory for table in on_device}, budget_bytes)
