"""What a rank waits for in vain, or too long: which other ranks are behind, and with what."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pm.messages import Kind

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager


class Missing:
    """Says of a rank that waits at staleness 0 which ranks it waits for. Any thread.

    Args:
        manager: whose rank that is; it brings what has arrived.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager

    def describe_step(self) -> str:
        """Return who has not taken the step that is applied next, or has not said what it made of it."""
        manager, others = self._manager, self._manager.others
        behind = self._behind()
        step = manager.applied
        not_stepped = others.not_stepped(manager.serving.round_of(step)) or self.summing_for(step)
        names = [p for p in not_stepped if p in behind] or behind
        return others.missing(names, f"take step {step}")

    def why_no_step(self) -> str | None:
        """Return why that step cannot come; None if it can."""
        manager, others, step = self._manager, self._manager.others, self._manager.applied
        cannot = others.gone.intersection(self._behind())
        if step < manager.steps:
            not_stepped = others.ended.intersection(others.not_stepped(manager.serving.round_of(step)))
            if manager.applied == step:  # else it has been applied meanwhile, and what had arrived for it is gone
                cannot |= not_stepped
        return others.closed(cannot, f"step {step}") if cannot else None

    def describe_rows(self, asked: Collection[int]) -> str:
        """Return who has not sent rows, of the ranks `asked` and those that pass rows on."""
        return self._manager.others.missing({*asked, *self.passing_on()}, "send rows")

    def why_no_rows(self, asked: Collection[int]) -> str | None:
        """Return why these rows cannot come; None if they can."""
        return self._manager.others.why_gone({*asked, *self.passing_on()}, "rows")

    def summing_for(self, step: int) -> set[int]:
        """Return the ranks whose sums of their machines' gradients are missing here, if all ranks took the step."""
        manager = self._manager
        arrived = manager.serving.round_of(step)
        all_stepped = arrived is not None and not manager.others.not_stepped(arrived)
        return manager.machine_sums.missing_ranks(arrived.sums) if all_stepped else set()

    def passing_on(self) -> set[int]:
        """Return the ranks that have yet to pass on rows of others, for which what came later waits."""
        manager, found = self._manager, set()
        for source, first in manager.inbox.first_waiting():
            if first.kind == Kind.COMMON_ROWS:
                found.add(manager.machines.agent(manager.machines.of(manager.rank), source))
        return found - {manager.rank}

    def _behind(self) -> list[int]:
        """Return the ranks of which something is missing: a READY, a sum, or rows that they have to pass on first."""
        manager = self._manager
        summing = self.summing_for(manager.applied) if manager.applied < manager.steps else ()
        return sorted({*manager.others.behind(manager.steps), *summing, *self.passing_on()})
