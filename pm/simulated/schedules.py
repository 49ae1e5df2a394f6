"""What simulated workers do: schedules made from a seed, and recordings of what a run looked up, to be replayed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, unique
from pathlib import Path

import numpy as np

_NO_KEYS = np.empty(0, np.int64)
_VERSION = 1


@unique
class Does(IntEnum):
    """What a worker does next: see `Event`."""

    INTEND = 0
    PULL = 1
    PULL_IF_LOCAL = 2
    PUSH = 3
    SET = 4
    ADVANCE = 5
    SYNC = 6
    PAUSE = 7


@dataclass(frozen=True)
class Event:
    """One thing that a worker does.

    Args:
        does: what.
        group, keys: of what keys (distinct, ascending, int64 `[n]`).
        start, end: of an intent: how many clocks after the worker's own at that moment it starts and ends.
        waits: whether the worker goes on only when the operation is done.
        seconds: of a pause, in virtual time.
    """

    does: Does
    group: int = 0
    keys: np.ndarray = field(default_factory=lambda: _NO_KEYS)
    start: int = 0
    end: int = 0
    waits: bool = True
    seconds: float = 0.0


Schedule = dict[tuple[int, int], list[Event]]
"""By (rank, worker): what each worker does, in order."""


def random_schedule(rng: np.random.Generator, ranks: int, workers: int, capacities: list[int], clocks: int) -> Schedule:
    """Return a schedule in which some workers train (intend ahead, pull, push, advance) and others do as they like.

    Args:
        rng: source of randomness; the schedule depends on nothing else.
        ranks, workers: how many ranks, and workers on each.
        capacities: by group, how many keys it has.
        clocks: about how many clocks each worker makes.
    """
    skew = float(rng.choice([0.0, 1.0, 2.0]))
    draw = _Draws(rng, capacities, skew)
    return {
        (rank, worker): _trainer(rng, draw, clocks) if rng.random() < 0.5 else _wanderer(rng, draw, clocks)
        for rank in range(ranks)
        for worker in range(workers)
    }


def common_keys_schedule(rng: np.random.Generator, ranks: int, capacity: int, clocks: int) -> Schedule:
    """Return a schedule in which one worker of each rank intends, pulls and pushes all keys of a group at every clock:
    what one rank changes, every other looks for in the clocks that follow.

    Args:
        rng, ranks, clocks: as in `random_schedule`; all workers make as many clocks.
        capacity: how many keys the group has.
    """
    keys = np.arange(capacity, dtype=np.int64)
    entries = [(clock, keys) for clock in range(clocks)]
    lookahead = int(rng.integers(1, 5))
    return {(rank, 0): _training(entries, lookahead, pushes=True, waits=rng.random() < 0.5) for rank in range(ranks)}


class _Draws:
    """Draws groups and sets of keys, of which low ones are drawn more often."""

    def __init__(self, rng: np.random.Generator, capacities: list[int], skew: float):
        self._rng, self._capacities = rng, capacities
        weights = [np.arange(1, capacity + 1) ** -skew for capacity in capacities]
        self._shares = [weight / weight.sum() for weight in weights]

    def keys(self, most: int = 6) -> tuple[int, np.ndarray]:
        group = int(self._rng.integers(len(self._capacities)))
        count = int(self._rng.integers(0, most + 1))
        keys = self._rng.choice(self._capacities[group], count, p=self._shares[group])
        return group, np.unique(keys).astype(np.int64)


def _trainer(rng: np.random.Generator, draw: _Draws, clocks: int) -> list[Event]:
    lookahead = int(rng.integers(0, 5))
    waits = bool(rng.random() < 0.7)
    hits = float(rng.choice([0.5, 0.9, 1.0]))
    batches = [draw.keys() for _ in range(int(rng.integers(1, clocks + 1)))]
    events = []
    for clock in range(-lookahead, len(batches)):
        ahead = clock + lookahead
        if ahead < len(batches) and rng.random() < hits:
            start = ahead if clock < 0 else lookahead
            events.append(Event(Does.INTEND, *batches[ahead], start=start, end=start + int(rng.integers(0, 2))))
        if clock >= 0:
            events.append(Event(Does.PULL, *batches[clock], waits=waits))
            events.append(Event(Does.PUSH, *batches[clock], waits=waits and rng.random() < 0.5))
            events.append(Event(Does.ADVANCE))
    return events


def _wanderer(rng: np.random.Generator, draw: _Draws, clocks: int) -> list[Event]:
    chances = rng.dirichlet(np.full(len(Does), 2.0) * [3, 3, 1, 4, 1, 3, 0.3, 0.5])
    events = []
    for does in rng.choice(len(Does), 5 * int(rng.integers(1, clocks + 1)), p=chances).tolist():
        group, keys = draw.keys()
        start = int(rng.integers(0, 4))
        end = start + int(rng.integers(0, 3)) if rng.random() < 0.9 else 1 << 40
        events.append(Event(Does(does), group, keys, start, end, bool(rng.random() < 0.5), float(rng.exponential(5.0))))
    return events


@dataclass(frozen=True)
class Recording:
    """What the workers of a run accessed, in the order of each: entry i is of `ranks[i]` at `clocks[i]`.

    Args:
        ranks, clocks: int64 `[n]`; the clocks of a rank do not fall.
        offsets: int64 `[n + 1]`: entry i has `keys[offsets[i] : offsets[i + 1]]`.
        keys: int64, distinct and ascending within an entry.
    """

    ranks: np.ndarray
    clocks: np.ndarray
    offsets: np.ndarray
    keys: np.ndarray

    @staticmethod
    def of(entries: list[tuple[int, int, np.ndarray]]) -> Recording:
        """Return the recording of (rank, clock, keys) entries; keys may repeat and come in any order."""
        keys = [np.unique(np.asarray(keys, np.int64)) for _, _, keys in entries]
        offsets = np.cumsum([0, *(len(part) for part in keys)], dtype=np.int64)
        ranks, clocks = (np.array([entry[at] for entry in entries], np.int64) for at in (0, 1))
        return Recording(ranks, clocks, offsets, np.concatenate([_NO_KEYS, *keys]))

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        for at, (rank, clock) in enumerate(zip(self.ranks.tolist(), self.clocks.tolist(), strict=True)):
            yield rank, clock, self.keys[self.offsets[at] : self.offsets[at + 1]]

    def save(self, path: str | Path) -> None:
        """Write the recording to a file (.npz)."""
        np.savez_compressed(
            path, version=_VERSION, ranks=self.ranks, clocks=self.clocks, offsets=self.offsets, keys=self.keys
        )

    @staticmethod
    def load(path: str | Path) -> Recording:
        """Return the recording that a file holds.

        Raises:
            ValueError: if the file is no recording of a version that this program knows.
        """
        with np.load(path, allow_pickle=False) as file:
            version = int(file["version"]) if "version" in file else None
            if version != _VERSION:
                raise ValueError(f"{path} is not a recording of version {_VERSION} (its version: {version})")
            return Recording(*(file[name] for name in ("ranks", "clocks", "offsets", "keys")))

    @staticmethod
    def of_records(paths: Sequence[str | Path]) -> Recording:
        """Return what the ranks of a run intended, from the files that they wrote (`Recorder`), one for each.

        A key intended for clock c counts as accessed there. Of a file with several runs the last one counts. Keys of
        several groups become one: those of each follow those of the group before.

        Raises:
            ValueError: if a file is no such file, or two are of one rank.
        """
        intents: dict[int, list[tuple[int, int, np.ndarray]]] = {}  # by rank: clock, group, keys
        for path in paths:
            rank, found = _intents_in(Path(path))
            if rank in intents:
                raise ValueError(f"{path} is of rank {rank}, and so is another; give one file for each rank")
            intents[rank] = found
        sizes = Counter()
        for found in intents.values():
            for _, group, keys in found:
                sizes[group] = max(sizes[group], int(keys.max()) + 1)
        groups = sorted(sizes)
        first = dict(zip(groups, np.cumsum([0, *(sizes[group] for group in groups)]).tolist(), strict=False))
        entries = []
        for rank, found in sorted(intents.items()):
            by_clock: dict[int, list[np.ndarray]] = {}
            for clock, group, keys in found:
                by_clock.setdefault(clock, []).append(keys + first[group])
            entries += [(rank, clock, np.concatenate(keys)) for clock, keys in sorted(by_clock.items())]
        return Recording.of(entries)

    def schedule(self, lookahead: int = 10, *, pushes: bool = True) -> Schedule:
        """Return the schedule of a training run that made this recording: one worker a rank, which intends `lookahead`
        clocks ahead, and pulls and pushes what it accesses at each clock.
        """
        by_rank: dict[int, list[tuple[int, np.ndarray]]] = {}
        for rank, clock, keys in self:
            by_rank.setdefault(rank, []).append((clock, keys))
        return {(rank, 0): _training(entries, lookahead, pushes) for rank, entries in by_rank.items()}


def _intents_in(path: Path) -> tuple[int, list[tuple[int, int, np.ndarray]]]:
    """Return the rank that wrote a file, and (start, group, keys) of the intents of its last run."""
    rank, found = None, []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["what"] == "begins":
                rank, found = int(event["rank"]), []
            elif event["what"] == "intends" and rank is not None:
                found.append((int(event["start"]), int(event["group"]), np.array(event["keys"], np.int64)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of intents and moves ({type(error).__name__}: {error})") from error
    if rank is None:
        raise ValueError(f'{path} is not a record of intents and moves: no line says which rank "begins"')
    return rank, found


def _training(entries: list[tuple[int, np.ndarray]], lookahead: int, pushes: bool, waits: bool = False) -> list[Event]:
    events, intended, accessed = [], 0, 0
    for now in range(entries[-1][0] + 1):
        while intended < len(entries) and entries[intended][0] <= now + lookahead:
            clock, keys = entries[intended]
            events.append(Event(Does.INTEND, 0, keys, start=clock - now, end=clock - now))
            intended += 1
        while accessed < len(entries) and entries[accessed][0] == now:
            keys = entries[accessed][1]
            events.append(Event(Does.PULL, 0, keys))
            if pushes:
                events.append(Event(Does.PUSH, 0, keys, waits=waits))
            accessed += 1
        events.append(Event(Does.ADVANCE))
    return events
