"""What the user says of a batch's keys: `keys={table: function of a batch}`, whichever way tables are named there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from adaloader.model.managed_model import ManagedModel
from adaloader.optimizers.gradient_layout import own_weight
from adaloader.tables.candidate import decide_now
from adaloader.tables.managed_table import ManagedTable


def keys_by_table(managed: ManagedModel, keys) -> str | None | dict[ManagedTable, Callable[[Any], Any]]:
    """Return `keys` with tables in place of what names them: a parameter, its name, its module or that one's name.

    Raises:
        ValueError: for a name of no managed table.
        TypeError: for what is no function of a batch.
    """
    if not isinstance(keys, Mapping):
        return keys
    model = managed.model()
    by_table = {}
    for given, function in keys.items():
        decide_now(given if isinstance(given, nn.Parameter) else dict(model.named_parameters()).get(given))
        table = _find_table(managed, model, given)
        if not callable(function):
            raise TypeError(f"keys= for table {table.name!r} must be a function of a batch, got {function!r}")
        by_table[table] = function
    return by_table


def _find_table(managed: ManagedModel, model: nn.Module, given) -> ManagedTable:
    for table in managed.tables:
        if given is table.parameter or (isinstance(given, str) and given == table.name):
            return table
    if isinstance(given, nn.Module):
        for parameter in given.parameters(recurse=False):
            for table in managed.tables:
                if table.parameter is parameter:
                    return table
    if isinstance(given, str):
        names = dict(model.named_parameters(remove_duplicate=False))
        names.update({name: own_weight(m) for name, m in model.named_modules()})
        for table in managed.tables:
            if names.get(given) is table.parameter:
                return table
    names = [table.name for table in managed.tables]
    shown = given if isinstance(given, str) else type(given).__name__
    raise ValueError(f"keys= names {shown!r}, which is no managed table; managed are {names}")
