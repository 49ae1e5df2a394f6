"""The directory of one rank: where keys are believed to be, and that a chain of beliefs ends at the owner."""

from __future__ import annotations

import numpy as np
import pytest

from pm.exact.directory import NOBODY, Directory, RankIndex

NO_KEYS = np.empty(0, np.int64)


class Ranks:
    """Directories of several ranks, the true owners, and messages to homes that arrive late and in any order."""

    def __init__(self, rng: np.random.Generator, ranks: int, keys: int, cached: int):
        self.rng = rng
        self.directories = [Directory(rank, ranks, cached) for rank in range(ranks)]
        self.owner = self.directories[0].home_of(np.arange(keys, dtype=np.int64))
        self.moves = np.zeros(keys, np.int32)
        self.under_way: list[tuple[int, np.ndarray, int, np.ndarray]] = []

    def move(self, key: int, to: int) -> None:
        """Move one key, whose record arrives at once; its home hears of it later."""
        source, keys = int(self.owner[key]), np.array([key], np.int64)
        self.moves[key] += 1
        moves = self.moves[keys]
        told = self.directories[source].gave(keys, to, moves)
        for home, positions in enumerate(told):
            if len(positions):
                self.under_way.append((home, keys[positions], to, moves[positions]))
        self.directories[source].await_homes(keys, 0)
        self.owner[key] = to
        self.directories[to].arrived(keys)

    def tell_some(self, share: float) -> None:
        self.rng.shuffle(self.under_way)
        count = round(share * len(self.under_way))
        for home, keys, to, moves in self.under_way[:count]:
            self.directories[home].moved(keys, to, moves, self.owner[keys] == home)
        del self.under_way[:count]

    def hops(self, key: int, asker: int) -> int:
        """Follow a request of `asker`; return how often it was sent on."""
        keys = np.array([key], np.int64)
        at, source, hops = int(self.directories[asker].ask_at(keys)[0]), NOBODY, 0
        while at != self.owner[key]:
            source, at = at, int(self.directories[at].forward_to(keys, source)[0])
            assert at not in (NOBODY, source), "no record is on its way"
            hops += 1
            assert hops < 1000
        return hops


@pytest.mark.parametrize("cached", [0, 4, 1000])
def test_every_request_gets_to_the_owner(cached, rng):
    ranks = int(rng.integers(2, 6))
    world = Ranks(rng, ranks, 30, cached)
    for _ in range(300):
        key = int(rng.integers(30))
        to = int(rng.choice([rank for rank in range(ranks) if rank != world.owner[key]]))
        world.move(key, to)
        if rng.random() < 0.3:
            world.tell_some(rng.random())
        for key in rng.integers(0, 30, 5).tolist():
            asker = int(rng.integers(ranks))
            if asker != world.owner[key]:
                world.hops(key, asker)
                world.directories[asker].remember(np.array([key], np.int64), int(world.owner[key]))
        assert all(directory.keys_cached <= cached for directory in world.directories)


def test_what_homes_know_need_not_be_kept_elsewhere(rng):
    world = Ranks(rng, 4, 50, 8)
    for _ in range(200):
        key = int(rng.integers(50))
        world.move(key, int(rng.choice([rank for rank in range(4) if rank != world.owner[key]])))
    assert sum(directory.keys_given for directory in world.directories) > 0
    world.tell_some(1.0)
    for directory in world.directories:
        for home in range(4):
            directory.home_is_ready(home, 0)
        given = directory.keys_given
        for home in range(4):
            directory.home_is_ready(home, 1)
        assert given > 0 and directory.keys_given == 0
    keys = np.arange(50, dtype=np.int64)
    away = world.directories[0].home_of(keys) != world.owner
    assert sum(directory.keys_away for directory in world.directories) == away.sum()
    for key in keys.tolist():
        for asker in range(4):
            if asker != world.owner[key]:
                assert world.hops(key, asker) <= 3


def test_a_request_that_overtakes_its_record_is_kept():
    keys = np.arange(100, dtype=np.int64)
    homes = Directory(0, 3, 0).home_of(keys)
    key = keys[homes == 0][:1]
    third = Directory(2, 3, 0)
    assert third.forward_to(key, 0).tolist() == [NOBODY], "its home sends it here: the record will come"
    assert third.forward_to(key, 1).tolist() == [0], "anybody else may be wrong"
    third.gave(key, 1, np.ones(1, np.int32))
    assert third.forward_to(key, 0).tolist() == [1], "the home does not know yet"


def test_a_key_that_its_home_has_lost_is_an_error():
    directory = Directory(0, 2, 0)
    keys = np.arange(20, dtype=np.int64)
    mine = keys[directory.home_of(keys) == 0]
    with pytest.raises(RuntimeError, match=f"rank 0 is home to key {mine[0]} and has lost it"):
        directory.ask_at(mine)


def test_empty_arrays():
    directory = Directory(1, 2, 10)
    assert (
        len(directory.ask_at(NO_KEYS)) == len(directory.forward_to(NO_KEYS, 0)) == len(directory.is_away(NO_KEYS)) == 0
    )
    told = directory.gave(NO_KEYS, 0, np.empty(0, np.int32))
    assert [len(part) for part in told] == [0, 0]
    directory.moved(NO_KEYS, 0, np.empty(0, np.int32), np.empty(0, bool))
    directory.arrived(NO_KEYS)


def test_a_rank_index_gives_back_what_was_put():
    index = RankIndex()
    keys = np.array([5, 1 << 50, 0], np.int64)
    index.put(keys, np.array([3, 0, 60000]), np.array([0, 1 << 40, 7]))
    ranks, numbers = index.find(np.array([0, 5, 6, 1 << 50], np.int64))
    assert ranks.tolist() == [60000, 3, NOBODY, 0]
    assert numbers[[0, 1, 3]].tolist() == [7, 0, 1 << 40]
    index.put(keys[:1], 1, 2)
    assert len(index) == 3 and index.find(keys[:1])[0].tolist() == [1]
