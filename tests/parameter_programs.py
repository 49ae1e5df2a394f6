"""Random programs on a `pm.ParameterManager`, whose every read can be checked.

What each thread of each rank pushes follows from a shared seed, so all ranks know the sums. Word w of a value belongs
to rank w modulo the number of ranks, and updates are positive: what is read says, rank by rank, how much is there.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

import pm
from tests.mpi.meeting import meet

TECHNIQUES = ("all", "relocation", "replication", "none")


@dataclass(frozen=True)
class Program:
    """What a program is made of; equal on all ranks.

    Args:
        seed: of all draws.
        num_keys, lengths, threads, clocks: of the manager and the program.
        options: further arguments of the manager.
        torch_tensors: whether values are tensors.
    """

    seed: int
    num_keys: int
    lengths: np.ndarray | int
    threads: int
    clocks: int
    options: dict
    torch_tensors: bool

    @staticmethod
    def random(seed: int, ranks: int, clocks: int = 12) -> Program:
        """Return a program that follows from the seed."""
        rng = np.random.default_rng(seed)
        num_keys = int(rng.choice([1, 7, 60]))
        length = ranks + int(rng.integers(0, 3))
        several = rng.random() < 0.5
        staleness = [None, None, 0, 1, 3][int(rng.integers(5))]
        options = {
            "techniques": TECHNIQUES[int(rng.integers(4))],
            "cache_keys": int(rng.choice([0, 2, 1000])),
            "act_late": bool(rng.random() < 0.5),
            "staleness": staleness,
            "dtype": str(rng.choice(["float32", "float64"])),
            "update_threshold": None if staleness == 0 or rng.random() < 0.7 else 4.0,
            "timeout_seconds": 60.0,
        }
        return Program(
            seed,
            num_keys,
            length + np.arange(num_keys) % 3 if several else length,
            int(rng.integers(1, 4)),
            int(rng.integers(1, clocks + 1)),
            options,
            bool(rng.random() < 0.5),
        )

    @property
    def length_of(self) -> np.ndarray:
        """Words of each key's value, int64 `[num_keys]`."""
        return np.broadcast_to(self.lengths, self.num_keys)

    def updates(self, rank: int, thread: int, clock: int) -> np.ndarray:
        """Return what a thread adds to each key at a clock (int64 `[num_keys]`, 0 for most)."""
        rng = np.random.default_rng([self.seed, rank, thread, clock])
        total = np.zeros(self.num_keys, np.int64)
        keys = (self.num_keys * rng.random(int(rng.integers(0, 9))) ** 2).astype(np.int64)
        total[keys] = rng.integers(1, 9, len(keys))
        return total

    def total_before(self, rank: int, clock: int) -> np.ndarray:
        """Return what all threads of a rank have added at clocks below `clock` (int64 `[num_keys]`)."""
        parts = [self.updates(rank, t, c) for t in range(self.threads) for c in range(max(0, min(clock, self.clocks)))]
        return np.sum(parts, axis=0) if parts else np.zeros(self.num_keys, np.int64)


class Run:
    """One rank's part in a program (collective)."""

    def __init__(self, comm, program: Program):
        self.comm, self.program = comm, program
        self.rank, self.ranks = comm.rank, comm.size
        self.issued = np.zeros(program.num_keys, np.int64)
        self.seen = np.zeros((self.ranks, program.num_keys), np.int64)
        self.reads = 0
        self._lock = threading.Lock()
        self._failures: list[BaseException] = []

    def run(self) -> Run:
        """Run the program and check the end, and that undoing it leads back to the start."""
        program = self.program
        with pm.ParameterManager(program.num_keys, program.lengths, comm=self.comm, **program.options) as manager:
            workers = [manager] + [manager.worker() for _ in range(program.threads - 1)]
            threads = [threading.Thread(target=self._thread, args=(w, n)) for n, w in enumerate(workers[1:], 1)]
            for thread in threads:
                thread.start()
            self._thread(manager, 0)
            for thread in threads:
                thread.join()
            if self._failures:
                raise self._failures[0]
            manager.barrier()
            everything = np.arange(program.num_keys)
            totals = np.array([program.total_before(rank, program.clocks) for rank in range(self.ranks)])
            self._expect(manager, everything, totals)
            meet(self.comm)
            self._push(manager, everything, -totals[self.rank])
            manager.barrier()
            self._expect(manager, everything, np.zeros_like(totals))
            meet(self.comm)
        return self

    def _thread(self, worker: pm.Worker, number: int) -> None:
        try:
            self._work(worker, number)
        except BaseException as error:  # raised again by the rank's first thread
            if number == 0:
                raise
            self._failures.append(error)

    def _work(self, worker: pm.Worker, number: int) -> None:
        program = self.program
        rng = np.random.default_rng([program.seed, self.rank, number])
        lookahead = int(rng.integers(0, 5))
        handles: list[int] = []
        for clock in range(program.clocks):
            self._intend(worker, number, clock, lookahead, rng)
            keys = np.flatnonzero(program.updates(self.rank, number, clock))
            self._read(worker, clock, rng.permutation(keys))
            with self._lock:  # a read that begins after this must see it
                handles.append(self._push(worker, keys, program.updates(self.rank, number, clock)[keys]))
                self.issued += program.updates(self.rank, number, clock)
            self._read(worker, clock, rng.integers(0, program.num_keys, int(rng.integers(0, 6))), rng.random() < 0.3)
            if rng.random() < 0.3:
                worker.wait(handles.pop())
            if rng.random() < 0.05:
                worker.wait_sync()
            if rng.random() < 0.1:
                time.sleep(float(rng.exponential(0.003)))
            worker.advance_clock()
        worker.wait_all()

    def _intend(self, worker: pm.Worker, number: int, clock: int, lookahead: int, rng: np.random.Generator) -> None:
        aheads = range(clock, clock + lookahead + 1) if clock == 0 else [clock + lookahead]
        for ahead in aheads:
            if ahead < self.program.clocks and rng.random() < 0.8:
                keys = np.flatnonzero(self.program.updates(self.rank, number, ahead))
                worker.intent(keys, ahead, ahead + int(rng.integers(0, 2)))

    # Values

    def _words(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each word of a flat array of values, the place of its key, and the rank that it belongs to."""
        lengths = self.program.length_of[keys]
        place = np.repeat(np.arange(len(keys)), lengths)
        within = np.arange(len(place)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return place, within % self.ranks

    def _room(self, keys: np.ndarray) -> np.ndarray:
        return np.full(int(self.program.length_of[keys].sum()), np.nan, self.program.options["dtype"])

    def _given(self, values: np.ndarray):
        return torch.from_numpy(values) if self.program.torch_tensors else values

    def _push(self, worker: pm.Worker, keys: np.ndarray, amounts: np.ndarray) -> int:
        place, owner = self._words(keys)
        return worker.push(
            keys, self._given(np.where(owner == self.rank, amounts[place], 0).astype(self._room(keys).dtype))
        )

    def _read(self, worker: pm.Worker, clock: int, keys: np.ndarray, only_if_local: bool = False) -> None:
        """Pull keys and check what comes: own changes, what was seen before, and what staleness demands."""
        staleness = self.program.options["staleness"]
        with self._lock:
            floor = self.seen[:, keys]
            floor[self.rank] = np.maximum(floor[self.rank], self.issued[keys])
        if staleness is not None:
            due = [self.program.total_before(rank, clock - staleness)[keys] for rank in range(self.ranks)]
            floor = np.maximum(floor, due)
        out = self._room(keys)
        if only_if_local:
            if not worker.pull_if_local(keys, self._given(out)):
                return
        else:
            worker.wait(worker.pull(keys, self._given(out)))
        place, owner = self._words(keys)
        held = out.astype(np.int64)
        assert (held == out).all(), f"rank {self.rank} read {out}"
        assert (held >= floor[owner, place]).all(), f"rank {self.rank} read {out} of {keys}, not at least {floor}"
        ceiling = np.array([self.program.total_before(rank, self.program.clocks)[keys] for rank in range(self.ranks)])
        assert (held <= ceiling[owner, place]).all(), f"rank {self.rank} read {out} of {keys}, not at most {ceiling}"
        with self._lock:
            self.reads += len(keys)
            np.maximum.at(self.seen, (owner, keys[place]), held)

    def _expect(self, manager: pm.ParameterManager, keys: np.ndarray, by_rank: np.ndarray) -> None:
        out = self._room(keys)
        manager.wait(manager.pull(keys, self._given(out)))
        place, owner = self._words(keys)
        np.testing.assert_array_equal(out, by_rank[owner, place])
