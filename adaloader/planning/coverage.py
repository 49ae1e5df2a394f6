"""Coverage: the share of the rows looked up that were intended before; a warning, once per table, where it is low."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel
    from adaloader.tables.managed_table import ManagedTable

log = logging.getLogger("adaloader")

# Batches of a model that are no matter: its steps are watched, and its loop becomes known.
_WARM_UP = 10
_WINDOW = 10
_WANTED = 0.99


@dataclass
class LookupCounts:
    """Unique rows looked up, by how they came here.

    `aside` are those of `on_demand` that were looked up for no batch: inference between steps, which none can foresee.
    """

    rows: int = 0
    intended: int = 0
    on_demand: int = 0
    aside: int = 0

    @property
    def of_batches(self) -> int:
        """Rows that were looked up for a batch: coverage is the share of these that was intended."""
        return self.rows - self.aside


class CoverageCheck:
    """Looks, every few batches, at the coverage of each table since it looked last."""

    def __init__(self):
        self._batches = 0
        self._before: dict[ManagedTable, tuple[int, int]] = {}
        self._said: set[str] = set()

    def batch_begins(self, managed: ManagedModel) -> None:
        """A batch whose keys are intended is handed out."""
        self._batches += 1
        if self._batches < _WARM_UP or (self._batches - _WARM_UP) % _WINDOW:
            return
        for table in managed.tables:
            rows, intended = table.counts.of_batches, table.counts.intended
            rows_before, intended_before = self._before.get(table, (rows, intended))
            self._before[table] = rows, intended
            share = (intended - intended_before) / (rows - rows_before) if rows > rows_before else 1.0
            if share < _WANTED and table.name not in self._said:
                self._said.add(table.name)
                log.warning(
                    "table %r: only %.1f %% of the rows that the last %d batches looked up were intended ahead "
                    "(coverage), the rest was fetched on demand: %s. %s; loader.explain() says more",
                    table.name,
                    100 * share,
                    _WINDOW,
                    _reason(managed, table),
                    remedy(table.name, _reason(managed, table)),
                )


def _reason(managed: ManagedModel, table: ManagedTable) -> str:
    sites = [site for program in managed.watch.programs for site in program.sites if site.table == table.name]
    sites.sort(key=lambda site: site.among is not None)
    reasons = [f"{site.reason} (at {site.where})" for site in sites if site.reason]
    return (reasons or [table.last_mismatch or "its lookups were not foreseen"])[0]


def remedy(table: str, reason: str) -> str:
    """What a user can do about a lookup that is not derived for `reason`."""
    given = f"To have them ahead pass AdaLoader(..., keys={{{table!r}: function of a batch that returns the ids}})"
    drawn = "at random" in reason or "numpy" in reason
    return given + (", or draw them by adaloader.random_ids if they are random" if drawn else "")
