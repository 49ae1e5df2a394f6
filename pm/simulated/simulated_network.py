"""What a simulation of the protocol is made of: its ranks, its network, and how long things take there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pm.asynchronous.node import DEFAULT_CLOCKS_PER_EXCHANGE
from pm.decision import TECHNIQUES


@dataclass(frozen=True)
class Setting:
    """What a simulation is made of; times are in virtual seconds.

    Args:
        ranks: how many.
        capacities, widths, dtypes: by group of keys: how many keys, words of a record, and their dtype.
        techniques, acts_late, cache_keys, update_threshold, staleness: as of `Node`.
        seed: of all that the network and the workers' pace draw.
        delay_seconds: mean of a buffer's travel (exponential).
        stall_chance, stall_seconds: how often a buffer, or a rank's round, takes so much longer.
        round_seconds: between a rank's rounds, give or take half of it.
        think_seconds: mean between a worker's events.
        rounds_when_needed: rounds take place only where a node says that it needs one.
        sends_with_rounds: what workers bring about leaves with the next message or round, not at once.
        clocks_per_exchange, clocks_per_refresh, clocks_per_move, rounds_to_answer: as of `Node`.
        overdue_chance: of an exchange to be overdue at a round.
        follow_up_seconds: mean until a rank goes on after it has taken in a message; 0: at once.
        most_turns: a simulation that takes more does not settle.
    """

    ranks: int = 2
    capacities: tuple[int, ...] = (16,)
    widths: tuple[int, ...] = (2,)
    dtypes: tuple[str, ...] = ("float64",)
    techniques: str = "all"
    acts_late: bool = True
    cache_keys: int = 1 << 20
    update_threshold: float = 0.0
    staleness: int | None = None
    seed: int = 0
    delay_seconds: float = 1.0
    stall_chance: float = 0.0
    stall_seconds: float = 20.0
    round_seconds: float = 2.0
    think_seconds: float = 0.5
    rounds_when_needed: bool = False
    sends_with_rounds: bool = False
    follow_up_seconds: float = 0.0
    clocks_per_exchange: int = DEFAULT_CLOCKS_PER_EXCHANGE
    clocks_per_refresh: int | None = None
    clocks_per_move: int | None = None
    rounds_to_answer: float | None = None
    overdue_chance: float = 0.0
    most_turns: int = 50_000

    @staticmethod
    def random(rng: np.random.Generator, seed: int) -> Setting:
        """Return a setting drawn from `rng`."""
        ranks = int(rng.choice([2, 3, 4, 5, 8], p=[0.3, 0.3, 0.2, 0.1, 0.1]))
        groups = int(rng.integers(1, 3))
        return Setting(
            ranks=ranks,
            capacities=tuple(int(c) for c in rng.integers(1, rng.choice([3, 12, 40]) + 1, groups)),
            widths=tuple(int(w) for w in ranks + rng.integers(0, 3, groups)),
            dtypes=tuple(str(d) for d in rng.choice(["float32", "float64"], groups)),
            techniques=str(rng.choice(TECHNIQUES, p=[0.45, 0.2, 0.25, 0.1])),
            acts_late=bool(rng.random() < 0.5),
            cache_keys=int(rng.choice([0, 2, 1000])),
            update_threshold=float(rng.choice([0, 0, 0, 5])),
            staleness=None if rng.random() < 0.6 else int(rng.integers(0, 3)),
            seed=seed,
            delay_seconds=float(rng.choice([0.1, 1.0, 5.0])),
            stall_chance=float(rng.choice([0.0, 0.02, 0.1])),
            stall_seconds=10.0,
            round_seconds=float(rng.choice([1.0, 3.0, 10.0])),
            think_seconds=float(rng.choice([0.1, 1.0, 5.0])),
            rounds_when_needed=bool(rng.random() < 0.5),
            sends_with_rounds=bool(rng.random() < 0.3),
            follow_up_seconds=float(rng.choice([0.0, 0.5])),
            clocks_per_exchange=int(rng.choice([1, 2, 5])),
            overdue_chance=float(rng.choice([0.0, 0.1])),
            clocks_per_move=None if rng.random() < 0.5 else int(rng.choice([1, 4, 32])),
            clocks_per_refresh=None if rng.random() < 0.5 else int(rng.choice([1, 4, 32])),
            rounds_to_answer=None if rng.random() < 0.5 else float(rng.choice([0.0, 0.2, 2.0])),
        )


class Network:
    """Buffers on their way: in order from one rank to another, at any time otherwise."""

    def __init__(self, setting: Setting, rng: np.random.Generator):
        self._setting, self._rng = setting, rng
        self._last = np.zeros((setting.ranks, setting.ranks))
        self.on_the_way = 0
        self.bytes_sent = np.zeros(setting.ranks, np.int64)

    def delay(self, mean: float) -> float:
        """Return a random time."""
        stalls = self._rng.random() < self._setting.stall_chance
        return self._rng.exponential(mean) + stalls * self._rng.exponential(self._setting.stall_seconds)

    def arrival(self, now: float, source: int, target: int) -> float:
        """Return when what leaves now arrives."""
        self._last[source, target] = max(self._last[source, target], now + self.delay(self._setting.delay_seconds))
        return self._last[source, target]
