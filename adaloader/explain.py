"""What a loader says of itself: per table how its keys are known, how well that worked, and what missed last."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from adaloader.tables.candidate import CandidateParameter

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel
    from adaloader.reading.feed import Feed
    from adaloader.tables.managed_table import ManagedTable

_TABLE_MODULES = ("Embedding", "EmbeddingBag")


@dataclass
class LookupExplanation:
    """One place where a table is looked up.

    `keys` is "derived", "constant" (the same for every batch), "among" (some of the ids in a leaf of the batch, all of
    which are intended), "given" (by a function in `keys=`) or "on demand"; `reason` says why it is not better.
    """

    where: str
    operation: str
    keys: str
    reason: str | None = None


@dataclass
class TableExplanation:
    """What is known of one table; counts as in `stats()`, `coverage` is None before the first lookup.

    `why` says why it is managed or dense. `programs` are, per way that batches take through the model, the operations
    that lead from a batch to the table's ids.
    """

    name: str
    shape: list[int]
    managed: bool
    why: str
    keys: str = "not looked up yet"
    lookups: int = 0
    intended: int = 0
    on_demand: int = 0
    coverage: float | None = None
    sites: list[LookupExplanation] = field(default_factory=list)
    programs: list[list[str]] = field(default_factory=list)
    last_mismatch: str | None = None


@dataclass
class Explanation:
    """What `loader.explain()` returns: prints as text, and `to_json()` gives the same to programs.

    `machine_ranks` of the `ranks` read rows in memory that they share, this one included.
    """

    tables: list[TableExplanation]
    recordings: int
    min_rows: int
    ranks: int = 1
    machine_ranks: int = 1

    def __getitem__(self, name: str) -> TableExplanation:
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(f"no table {name!r}; there are {[table.name for table in self.tables]}")

    def to_json(self) -> str:
        """Return all of it as a JSON object with the fields of these classes."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [f"AdaLoader: {len(self.tables)} tables, {self.recordings} steps watched, min_rows={self.min_rows}"]
        if self.ranks > 1:
            lines.append(f"{self.ranks} ranks, of which {self.machine_ranks} read rows in memory that they share")
        for table in self.tables:
            lines += _lines_of(table)
        return "\n".join(lines)

    __repr__ = __str__


def _lines_of(table: TableExplanation) -> list[str]:
    kind = "managed" if table.managed else "dense"
    lines = ["", f"{table.name} {table.shape}: {kind}, {table.why}"]
    if not table.managed:
        return lines
    coverage = "none yet" if table.coverage is None else f"{table.coverage:.2%}"
    counts = f"{table.lookups} rows looked up, {table.on_demand} on demand"
    lines.append(f"  keys: {table.keys}; coverage {coverage} ({counts})")
    for site in table.sites:
        lines.append(
            f"  {site.operation} at {site.where}: {site.keys}" + (f", for {site.reason}" if site.reason else "")
        )
    for number, program in enumerate(table.programs):
        lines.append("  program:" if len(table.programs) == 1 else f"  program {number + 1} of {len(table.programs)}:")
        lines += [f"    {line}" for line in program]
    if table.last_mismatch is not None:
        lines.append(f"  last mismatch: {table.last_mismatch}")
    return lines


def explain(managed: ManagedModel, feed: Feed, recordings: int) -> Explanation:
    """Explain the tables of a model, as a loader with this feed sees them."""
    tables = [_explain_table(managed, table, feed) for table in managed.tables_in_order()]
    names = {table.name for table in tables}
    dense = [
        TableExplanation(name, list(parameter.shape), False, why)
        for name, parameter, why in _dense_tables(managed)
        if name not in names
    ]
    manager = managed.manager
    return Explanation(tables + dense, recordings, managed.settings["min_rows"], manager.ranks, manager.machine_ranks)


def _explain_table(managed: ManagedModel, table: ManagedTable, feed: Feed) -> TableExplanation:
    counts, rows = table.counts, table.table.spec.rows
    made = TableExplanation(
        table.name,
        list(table.parameter.shape),
        True,
        f"it is looked up by ids and its {rows} rows are at least min_rows={managed.settings['min_rows']}",
        lookups=counts.rows,
        intended=counts.intended,
        on_demand=counts.on_demand,
        coverage=counts.intended / counts.of_batches if counts.of_batches else None,
        last_mismatch=table.last_mismatch,
    )
    if rows < managed.settings["min_rows"]:
        made.why = "it was declared under deferred_init"
    if managed.strategy.get(table.name) == "managed":
        made.why = 'strategy= says "managed"'
    if not feed.intends:
        made.keys = "none (keys=None): every row on demand"
        return made
    if table.name in feed.given_tables:
        made.keys = "given by the function in keys="
        made.sites = [LookupExplanation(site.where, site.operation, "given") for site in _sites(managed, table)]
        return made
    sites = [_explain_site(site) for site in _sites(managed, table)]
    made.sites = list({(site.where, site.operation, site.keys): site for site in sites}.values())
    made.programs = [program.describe(table.name) for program in managed.watch.programs if _looks_up(program, table)]
    if made.sites:
        made.keys = ", ".join(dict.fromkeys(site.keys for site in made.sites))
    elif counts.rows:
        made.keys = "not known (no watched step showed its lookups)"
    return made


def _sites(managed: ManagedModel, table: ManagedTable):
    sites = [site for program in managed.watch.programs for site in program.sites if site.table == table.name]
    return sites or [site for site in managed.watch.underived.values() if site.table == table.name]


def _looks_up(program, table: ManagedTable) -> bool:
    return any(site.table == table.name for site in program.sites)


def _explain_site(site) -> LookupExplanation:
    if site.reason is None:
        return LookupExplanation(site.where, site.operation, "constant" if site.constant else "derived")
    if site.among is not None:
        return LookupExplanation(
            site.where, site.operation, "among", f"{site.reason}; all of {site.held_by} is intended"
        )
    return LookupExplanation(site.where, site.operation, "on demand", site.reason)


def _dense_tables(managed: ManagedModel):
    """Yield name, parameter and reason of what could be a table and is an ordinary parameter."""
    model = managed.model()
    if model is None:  # freed: nothing is left to be explained of it
        return
    tables = {id(table.parameter) for table in managed.tables}
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            continue
        reason = managed.dense_because.get(name) or _why_dense(managed, name, parameter, holders.get(id(parameter), []))
        if reason is not None:
            yield name, parameter, reason


def _why_dense(managed: ManagedModel, name: str, parameter: nn.Parameter, holders: list[nn.Module]) -> str | None:
    """Why a parameter that may be looked up is no managed table; None for one that is none by its make."""
    if managed.strategy.get(name) == "dense":
        return 'strategy= says "dense"'
    is_embedding = any(_module_name(module) in _TABLE_MODULES for module in holders)
    if any(isinstance(module, torch.jit.ScriptModule) for module in holders):
        return "it belongs to a TorchScript module, whose lookups cannot be caught" if is_embedding else None
    if not is_embedding and name not in managed.watched:
        return None
    if parameter.ndim != 2:
        return f"it has {parameter.ndim} dimensions, and tables have 2"
    if parameter.shape[0] < managed.settings["min_rows"]:
        return f"its {parameter.shape[0]} rows are fewer than min_rows={managed.settings['min_rows']}"
    if parameter.dtype not in (torch.float32, torch.float64):
        return f"its dtype is {parameter.dtype}, not float32 or float64"
    if isinstance(parameter, CandidateParameter):
        return "it was not used yet: if its first use is a lookup, it becomes a managed table"
    return "its first use was no lookup, but needed the whole of it"


def _module_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "")
    return next((base.__name__ for base in type(module).__mro__ if base.__name__ in _TABLE_MODULES), "")
