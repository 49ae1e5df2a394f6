"""What a manager counts of what it does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """What the manager has counted; seconds are those that the trainer's thread waited for rows.

    By number of table: `relocations` are rows that this rank gave to another, `replications` rows that it copied to one
    for a plan, `replica_steps` copies that it sent again because they had changed. `hops` are rows asked for that it
    passed on to another rank, `late_intents` rows asked for when they might already have been needed. `neighbour_rows`
    are those that this rank read from the memory of another.
    """

    on_demand_pulls: int = 0
    relocations: Counter[int] = field(default_factory=Counter)
    replications: Counter[int] = field(default_factory=Counter)
    replica_steps: Counter[int] = field(default_factory=Counter)
    hops: int = 0
    late_intents: int = 0
    neighbour_rows: int = 0
    wait_seconds: float = 0.0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("keys", "exchange", "gather", "backward", "update", "waiting"), 0.0)
    )
