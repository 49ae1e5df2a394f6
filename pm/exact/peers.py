"""What a rank knows of the others: how far they are, who has closed; and what to say of one that does not come."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pm.exact.rounds import Round
from pm.messages import Message


class Peers:
    """The state of the other ranks, kept by the background thread from their messages.

    `ready[p]` is the version at which rank p has sent what is asked of it, for plans up to number `seen[p]`. Ranks that
    have `ended` take no more steps; those that are `gone` do not serve their rows either.
    """

    def __init__(self, rank: int, ranks: int):
        self.others = [p for p in range(ranks) if p != rank]
        self.ready = [0] * ranks
        self.seen = [-1] * ranks
        self.ended: set[int] = set()
        self.gone: set[int] = set()

    def on_ready(self, source: int, message: Message) -> None:
        """READY(version, plan)."""
        self.ready[source], self.seen[source] = message.numbers

    def all_ready(self, version: int) -> bool:
        return all(self.ready[p] >= version for p in self.others)

    def behind(self, version: int) -> list[int]:
        return [p for p in self.others if self.ready[p] < version]

    def not_stepped(self, arrived: Round | None) -> list[int]:
        """Return the ranks whose STEP is missing from what has arrived for a step."""
        return [p for p in self.others if arrived is None or p not in arrived.stepped]

    def why_gone(self, asked: Collection[int], what: str) -> str | None:
        """Return why `what` cannot be had of the ranks `asked`: one of them is gone; None if none is."""
        gone = self.gone.intersection(asked)
        return self.closed(gone, what) if gone else None

    @staticmethod
    def missing(peers: Iterable[int], action: str) -> str:
        return f"rank {_names(peers)} to {action}; every rank must take the same optimizer steps"

    @staticmethod
    def closed(peers: Iterable[int], what: str) -> str:
        return (
            f"waits for {what} of rank {_names(peers)}, which has closed its loader or ended; every rank must take the "
            "same optimizer steps"
        )


def _names(peers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(peers))))
