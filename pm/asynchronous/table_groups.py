"""Which keys of the asynchronous protocol stand for the rows of a table: tables whose records are alike share a group.

What a message, a round or a kernel costs depends on how many keys it is about far less than on how many of them there
are: 26 tables as 26 groups took the protocol six times as long as one group of as many keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pm import rules
from pm.partition import each_rank
from pm.recorder import Recorder
from pm.tables import Table


@dataclass(frozen=True)
class Span:
    """Keys of a group that stand for a table's rows: those from `first` on, `rows` of them, in the rows' order."""

    group: int
    first: int
    rows: int

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Return the keys of `rows`, int64 `[n]` both."""
        return rows + self.first if self.first else rows

    def rows_among(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (positions at which `keys` (int64 `[n]`) are of this table, its rows there), int64 `[m]` each."""
        at = np.flatnonzero((keys >= self.first) & (keys < self.first + self.rows))
        return at, keys[at] - self.first


class TableGroups:
    """The tables of each group, in the order of their keys. Groups are numbered as they are added."""

    def __init__(self) -> None:
        self._tables: list[list[Table]] = []
        self._firsts: list[np.ndarray] = []
        self._spans: dict[int, Span] = {}

    def add(self, tables: Sequence[Table]) -> list[int]:
        """Put tables into new groups, as few as can be; return the groups' numbers."""
        return [self.add_group(members) for members in self.alike(tables)]

    @staticmethod
    def alike(tables: Sequence[Table]) -> list[list[Table]]:
        """Return the tables of each group that there would be."""
        found: dict[object, list[Table]] = {}
        for table in tables:
            found.setdefault(_kind(table), []).append(table)
        return list(found.values())

    def add_group(self, members: list[Table]) -> int:
        """Put tables that are alike into a new group; return its number."""
        number = len(self._tables)
        ends = np.cumsum([table.spec.rows for table in members])
        self._tables.append(members)
        self._firsts.append(ends - [table.spec.rows for table in members])
        for table, first in zip(members, self._firsts[-1].tolist(), strict=True):
            self._spans[table.number] = Span(number, first, table.spec.rows)
        return number

    def span_of(self, table: Table) -> Span:
        """Return the keys of a table."""
        return self._spans[table.number]

    def members(self, group: int) -> list[Table]:
        """Return the tables of a group."""
        return self._tables[group]

    def firsts(self, group: int) -> np.ndarray:
        """Return the first key of each of a group's tables (int64, ascending)."""
        return self._firsts[group]

    def split(self, group: int, keys: np.ndarray) -> Iterator[tuple[Table, np.ndarray | slice, np.ndarray]]:
        """Yield (table, positions at which `keys` (int64 `[n]`) are of it, its rows there) for tables that have any."""
        members, firsts = self._tables[group], self._firsts[group]
        if len(members) == 1:
            yield members[0], slice(None), keys
            return
        of = np.searchsorted(firsts, keys, side="right") - 1
        for at, some in each_rank(of, len(members)):
            yield members[at], some, keys[some] - firsts[at]


class RecorderByTable:
    """A recorder of what happens to keys of groups, as what happens to rows of tables."""

    def __init__(self, recorder: Recorder, groups: TableGroups):
        self._recorder, self._groups = recorder, groups

    def note(self, what: str, group: int, keys: np.ndarray, **more: object) -> None:
        for table, _, rows in self._groups.split(group, keys):
            self._recorder.note(what, table.number, rows, **more)


def _kind(table: Table) -> object:
    """Return what is equal for tables that may share a group.

    Not those that no optimizer has trained yet, which may be given another rule; nor those whose every step moves all
    rows, which are caught up slot by slot.
    """
    rule = table.spec.rule
    is_alone = isinstance(rule, rules.Frozen) or rule.catches_up
    return (table.number, None) if is_alone else (None, table.spec.record_class)
