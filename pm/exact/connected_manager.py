"""A manager that talks to other ranks: its waiting for them, what it says of those that do not come, and its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pm.exact.peers import Peers
from pm.manager import Manager
from pm.messages import Kind, Message
from pm.waiting import PeerError, Waiting

if TYPE_CHECKING:
    from pm.colocated.machines import Machines
    from pm.exact.inbox import Inbox
    from pm.transport import Transport

_MOST_NAMED = 16


class ConnectedManager(Manager):
    """What managers of several ranks have in common, whatever they promise of their rows.

    Args:
        rank, ranks: this one, and how many there are.
        timeout_seconds: how long to wait for another rank.
    """

    transport: Transport
    inbox: Inbox
    machines: Machines

    def __init__(self, rank: int, ranks: int, timeout_seconds: float):
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.timeout_seconds = timeout_seconds
        self.others = Peers(rank, ranks)
        self.peers = self.others.others
        self.on_control: Callable[[int, Message], None] | None = None
        self.on_failure: Callable[[BaseException], None] | None = None
        self.who: Sequence[str] = ()
        self._shut = False
        self._waiting = Waiting(rank, timeout_seconds, self.count_wait)

    # Waiting

    def count_wait(self, seconds: float) -> None:
        """The trainer's thread has waited for rows."""
        self.traffic.wait_seconds += seconds
        self.traffic.seconds["waiting"] += seconds

    def name_ranks(self, who: Sequence[str]) -> None:
        """Have errors of ranks that do not come say which process on which host each rank is."""
        self.who = who
        named = [f"rank {rank}: {each}" for rank, each in enumerate(who[:_MOST_NAMED])]
        self._waiting.who = "; ".join(named) + ("; ..." if len(who) > _MOST_NAMED else "")

    @property
    def describe_peers(self) -> Callable[[], str]:
        """Called, where ranks do not come, for a sentence on what they are doing."""
        return self._waiting.describe_peers

    @describe_peers.setter
    def describe_peers(self, describe: Callable[[], str]) -> None:
        self._waiting.describe_peers = describe

    def seconds_since(self, peer: int) -> float:
        """Return how long ago the last message of a rank came."""
        return self.inbox.seconds_since(peer)

    def wait_until(self, reached: Callable[[], bool], describe: Callable[[], str]) -> None:
        """Block until `reached()` is true; `describe()` says what for, if the time limit passes."""
        self._waiting.until(reached, describe)

    def wait_for_others(self, missing: Callable[[], Sequence[int]], action: str) -> None:
        """Block until no rank is `missing()`; `action` says what those that are have not done."""

        def why_in_vain() -> str | None:
            closed = self.others.ended.intersection(missing())
            return self.others.closed(closed, "a collective operation") if closed else None

        self._waiting.until(lambda: not missing(), lambda: self.others.missing(missing(), action), why_in_vain)

    def _check_collective(self, missing: Sequence[int]) -> None:
        """Called again and again while a collective operation waits for ranks: raise if one cannot come."""
        self._waiting.raise_failure()
        cannot = self.others.ended.intersection(missing)
        if cannot:
            raise PeerError(f"rank {self.rank} {self.others.closed(cannot, 'a collective operation')}")

    def barrier(self) -> None:
        """Wait until all ranks are here, and what they have sent this one before was received (collective)."""
        self._check_open()
        self.transport.collective(lambda comm: comm.Ibarrier(), self.timeout_seconds)

    # Counting

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        return {kind.name.lower(): count for kind, count in sorted(self.transport.bytes_by_kind.copy().items())}

    @property
    def bytes_sent(self) -> int:
        return self.transport.bytes_sent

    @property
    def bytes_to_other_machines(self) -> int:
        return sum(self.transport.bytes_to[peer] for peer in self.machines.elsewhere())

    @property
    def bytes_received(self) -> int:
        return self.transport.bytes_received

    # Failing, closing

    def raise_failure(self) -> None:
        """Raise what ended the background thread, if something did. Any thread."""
        self._waiting.raise_failure()

    @property
    def failure_is_known(self) -> bool:
        """Whether the trainer's thread has met what ended the background thread, or wants no more of this manager."""
        return self._waiting.failure_was_raised or self._shut

    def _fail(self, error: BaseException) -> None:
        self._waiting.fail(error)
        if self.on_failure is not None:
            self.on_failure(error)

    @property
    def closed_peers(self) -> frozenset[int]:
        """The ranks that take no more steps."""
        return frozenset(self.others.ended)

    @property
    def gone_peers(self) -> frozenset[int]:
        """The ranks that send and answer nothing any more."""
        return frozenset(self.others.gone)

    def close(self, *, linger: bool = False) -> None:
        """Say that this rank takes no more steps and asks for no more rows; with `linger`, wait until all have said so.

        Until then its rows go on being served in the background, for others may still be looking them up.
        """
        if not self._shut:
            self._shut = True
            for peer in self.peers:
                self.transport.send(peer, Message(Kind.CLOSED))
            self._closing()
            self._end_with_the_last()
        while linger and self.transport.alive:
            time.sleep(2e-3)

    def _closing(self) -> None:
        """This rank has said that it closes: what else that takes."""

    def _end_with_the_last(self) -> None:
        if self._shut and self.others.ended.issuperset(self.peers):
            self.transport.close()

    def _check_open(self) -> None:
        if self._shut:
            raise RuntimeError(
                f"the manager of rank {self.rank} is closed: look rows up, step, and gather tables before close()"
            )
