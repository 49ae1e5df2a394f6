"""The parameter manager by hand, for programs without a loader: AdaPM's primitives (arXiv 2206.00470) over MPI."""

from __future__ import annotations

import contextlib

import numpy as np

from pm.asynchronous.holdings import Group
from pm.asynchronous.locations import DEFAULT_CACHE_KEYS
from pm.asynchronous.runtime import DEFAULT_ROUNDS_PER_SECOND, Runtime
from pm.by_hand.arguments import (
    check_comm,
    check_count,
    check_flag,
    check_integer,
    check_positive,
    check_same,
    check_staleness,
    check_update_threshold,
)
from pm.by_hand.lengths import Lengths
from pm.by_hand.worker import Worker
from pm.decision import check_techniques
from pm.launch import default_comm
from pm.storage.store import RecordClass


class ParameterManager(Worker, contextlib.AbstractContextManager):
    """Holds `num_keys` values over all ranks, and brings each to where it is intended to be used (collective).

    Values start as zeros, made when a key is first touched. The manager is its own first worker; `worker()` gives one
    for each further thread. By default nothing waits for anybody (`staleness=None`): a rank sees its own changes at
    once, and others' with the rounds that exchange them; after `barrier()` all ranks see the same. With `staleness=s` a
    worker at clock c sees all changes that any worker made in clocks below c - s. As a context manager it closes
    itself.

    AdaPM's channels are left out: what it does per key over several channels is done here for all keys of a round at
    once, on arrays.

    Args:
        num_keys: how many keys there are: 0 to `num_keys` - 1.
        value_length: values per key: an int, or an integer array `[num_keys]` with one length for each.
        comm: mpi4py communicator, which is duplicated; all processes by default, one rank without a launcher.
        dtype: "float32" or "float64".
        staleness: None, or how many clocks a worker may be behind the others' changes.
        techniques: "all" (the manager decides per key and over time whether to move it or copy it), or for comparison
            "relocation", "replication" or "none" (neither).
        update_threshold: changes to copies that are smaller in every value are held back until they have added up to
            it, or a barrier (not with `staleness=0`).
        act_late: whether intents are acted on as late as is safe, whatever their start; False: at once.
        max_rounds_per_second: how often ranks exchange what has come together.
        cache_keys: how many keys' locations a rank remembers beyond those that it needs.
        seed: of samples.
        record: path of a file to which this rank writes its intents, moves and copies, one JSON object per line
            (`pm.recorder` says which); `python -m pm.simulator --replay` runs what all ranks' files say.
        timeout_seconds: how long to wait for another rank.

    Raises:
        ValueError, TypeError: if an argument is not as described; before other ranks are spoken to.
        ValueError: on all ranks, if they do not give the same `num_keys`, `value_length`, `dtype`, `staleness`,
            `techniques` and `update_threshold`; names the ranks and what differs.
        OSError: if this rank cannot write its file of `record`.
        MemoryError: if this rank has no address space for so many keys.
        RuntimeError: on the ranks for which another had one of these two errors; under mpirun without mpi4py, if `comm`
            is not given.
    """

    def __init__(
        self,
        num_keys: int,
        value_length: object,
        *,
        comm=None,
        dtype: str = "float32",
        staleness: int | None = None,
        techniques: str = "all",
        update_threshold: float | None = None,
        act_late: bool = True,
        max_rounds_per_second: float = DEFAULT_ROUNDS_PER_SECOND,
        cache_keys: int = DEFAULT_CACHE_KEYS,
        seed: int = 0,
        record: object = None,
        timeout_seconds: float = 300.0,
    ):
        lengths, of_values = Lengths(num_keys, value_length), _check_dtype(dtype)
        check_comm(comm)
        check_techniques(techniques)
        staleness = check_staleness(staleness)
        update_threshold = check_update_threshold(update_threshold, staleness)
        act_late = check_flag("act_late", act_late)
        max_rounds_per_second = check_positive("max_rounds_per_second", max_rounds_per_second, "a number of rounds")
        cache_keys = check_count("cache_keys", cache_keys, "a number of keys")
        seed = check_integer("seed", seed, "an integer")
        timeout_seconds = check_positive("timeout_seconds", timeout_seconds, "a number of seconds")
        comm = default_comm() if comm is None else comm
        same = {
            "num_keys": lengths.num_keys,
            "dtype": of_values.name,
            "staleness": staleness,
            "techniques": techniques,
            "update_threshold": update_threshold,
        }
        as_bytes = {name: (value, repr(value).encode()) for name, value in same.items()}
        check_same(comm, as_bytes | {"value_length": (lengths, lengths.digest())})
        groups = [
            Group(
                number,
                lengths.keys_in(number),
                RecordClass(length, of_values.name, "additive", 0),
                _zeros,
                bound=lengths.num_keys,
            )
            for number, length in enumerate(lengths.by_group)
        ]
        runtime = Runtime(
            comm,
            groups,
            max_rounds_per_second=max_rounds_per_second,
            record=record,
            timeout_seconds=timeout_seconds,
            techniques=techniques,
            acts_late=act_late,
            cache_keys=cache_keys,
            update_threshold=update_threshold,
            staleness=staleness,
        )
        super().__init__(runtime, lengths, of_values, seed, number=0)
        self._workers = 1

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self._runtime.rank

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self._runtime.ranks

    def worker(self) -> Worker:
        """Return access for another thread, with a clock of its own, which starts where the slowest other one is."""
        self._workers += 1
        return Worker(self._runtime, self.lengths, self.dtype, self._seed, number=self._workers - 1)

    def barrier(self) -> None:
        """Wait until all ranks are here, and see all changes that any of them has made before (collective)."""
        self.wait_sync()
        self._runtime.all_are_here()

    def stats(self) -> dict[str, object]:
        """Return what this rank has counted.

        relocations: keys that moved away from here (promotions: of these, to a rank whose copy became the record, so
        that no value travelled). replications: copies given out. replica_steps: refreshes of copies sent. hops: keys
        in questions that were passed on. late_intents: keys that were not here when their intent began. remote_pulls,
        remote_pushes: keys. rounds, rounds_per_second. wait_seconds. bytes_sent, bytes_received; bytes_by_kind of
        message. owned, copies: keys held. memory_bytes.
        """
        return self._runtime.stats()

    def explain(self, key: int) -> dict[str, object]:
        """Return what this rank knows of one key: whether it is here, as what and why, where its owner is, and how it
        came and went.

        Raises:
            IndexError: if the key is out of range.
        """
        (part,) = self.lengths.parts(self.lengths.check([key]))
        return self._runtime.explain(part.group, int(key))

    def close(self) -> None:
        """Finish what is under way, on all ranks, and end the background thread (collective); again: does nothing."""
        if not self._runtime.closed:
            self._runtime.close_clocks()  # ranks may come to their ends at different clocks
            self.barrier()
            self._runtime.end()

    def __enter__(self) -> ParameterManager:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:  # the others learn that this rank is gone, and what waits for it ends
            self._runtime.end()


def _zeros(keys: np.ndarray, out: np.ndarray) -> None:
    out[...] = 0


def _check_dtype(dtype: object) -> np.dtype:
    name = str(np.dtype(dtype)) if not str(dtype).startswith("torch.") else str(dtype).removeprefix("torch.")
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64'; got {dtype!r}")
    return np.dtype(name)
