"""A thread of access to a parameter manager: its operations, its intents, its clock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pm.asynchronous.operations import Action, Operation
from pm.asynchronous.runtime import Runtime
from pm.by_hand.arguments import check_integer
from pm.by_hand.lengths import Lengths
from pm.by_hand.sampling import Sampling

DONE = -1
"""The handle of an operation that was done at once."""


class Request:
    """One call of a worker: operations on the groups of its keys, done one by one, under the runtime's lock."""

    def __init__(self, parts: int):
        self.remaining = parts
        self.when_done: Callable[[], object] = lambda: None

    def part_is_done(self) -> None:
        self.remaining -= 1
        if not self.remaining:
            self.when_done()


class Worker:
    """One thread's access to the keys of a `ParameterManager`, with a clock of its own.

    Operations are asynchronous: they return a handle for `wait`, or -1 where they were done at once because all keys
    are here. Keys are int64 `[n]` (array, tensor or list, in range, repeated as you like), values `[n, value_length]`,
    or flat, one after the other, where keys have values of different lengths. Updates are copied at once; what is
    pulled is in `out` after `wait`. One thread at a time uses a worker.
    """

    def __init__(self, runtime: Runtime, lengths: Lengths, dtype: np.dtype, seed: int, number: int):
        self.lengths = lengths
        self.dtype = dtype
        self.number = number
        self._runtime = runtime
        self._seed = seed
        self._clock = runtime.add_clock()
        self._requests: dict[int, Request] = {}  # that are not done, by handle
        self._handles = 0
        self._sampling: Sampling | None = None

    # Operations

    def pull(self, keys: object, out: object) -> int:
        """Read the values of keys into `out`; return a handle.

        Raises:
            IndexError: if a key is out of range.
            TypeError, ValueError: if keys or `out` have the wrong dtype or shape, or `out` is read-only. Nothing is
                done then.
        """
        keys = self.lengths.check(keys)
        array = self.lengths.check_values(out, keys, self.dtype, "out", written=True)
        parts = self.lengths.parts(keys)
        request = Request(len(parts))
        operations = []
        for part in parts:
            direct = part.inverse is None and part.words is None
            pulled = array if direct else np.empty((len(part.keys), part.length), self.dtype)

            def done(part=part, pulled=pulled) -> None:
                if pulled is not array:
                    part.write(pulled, array)
                request.part_is_done()

            operations.append(Operation(Action.PULL, part.group, part.keys, pulled, done))
        return self._run(request, operations)

    def push(self, keys: object, updates: object) -> int:
        """Add updates to the values of keys; return a handle. Raises as `pull`."""
        return self._change(Action.PUSH, keys, updates)

    def set(self, keys: object, values: object) -> int:
        """Set the values of keys (of a key that is given twice, the last one); return a handle. Raises as `pull`."""
        return self._change(Action.SET, keys, values)

    def _change(self, action: Action, keys: object, values: object) -> int:
        keys = self.lengths.check(keys)
        array = self.lengths.check_values(values, keys, self.dtype, "values")
        parts = self.lengths.parts(keys)
        request = Request(len(parts))
        operations = [
            Operation(
                action,
                part.group,
                part.keys,
                part.added_up(array) if action == Action.PUSH else part.last(array),
                request.part_is_done,
            )
            for part in parts
        ]
        return self._run(request, operations)

    def _run(self, request: Request, operations: list[Operation]) -> int:
        self._runtime.run(operations)
        if not request.remaining:
            return DONE
        with self._runtime.lock:
            if not request.remaining:  # meanwhile
                return DONE
            self._handles += 1
            self._requests[self._handles] = request
            request.when_done = partial(self._requests.pop, self._handles)
        return self._handles

    def pull_if_local(self, keys: object, out: object) -> bool:
        """Read keys into `out` if all of them are here, without a message; return whether. Raises as `pull`."""
        keys = self.lengths.check(keys)
        array = self.lengths.check_values(out, keys, self.dtype, "out", written=True)
        found = []
        for part in self.lengths.parts(keys):
            pulled = np.empty((len(part.keys), part.length), self.dtype)
            if not self._runtime.pull_if_local(part.group, part.keys, pulled):
                return False
            found.append((part, pulled))
        for part, pulled in found:
            part.write(pulled, array)
        return True

    def is_local(self, keys: object) -> np.ndarray:
        """Return which keys can be pulled now without a message, bool `[n]`. Raises as `pull`."""
        keys = self.lengths.check(keys)
        local = np.empty(len(keys), bool)
        groups = self.lengths.groups_of(keys)
        with self._runtime.lock:
            for group in np.unique(groups).tolist():
                some = groups == group
                local[some] = self._runtime.node.operations.is_local(group, keys[some])
        return local

    def wait(self, handle: int) -> None:
        """Wait until an operation is done.

        Raises:
            TypeError: if the handle is no integer.
            ValueError: if no operation of this worker had that handle.
            PeerError: if another rank does not answer.
        """
        handle = _check_handle(handle)
        if handle == DONE:
            return
        if not 0 < handle <= self._handles:
            raise ValueError(f"handle {handle} is not one that this worker was given")
        request = self._requests.get(handle)
        if request is not None:
            self._runtime.wait_until(lambda: not request.remaining, "the owners of keys to answer")

    def wait_all(self) -> None:
        """Wait until all operations of this worker are done."""
        with self._runtime.lock:
            handles = list(self._requests)
        for handle in handles:
            self.wait(handle)

    def wait_sync(self) -> None:
        """Wait until what this rank has changed so far is visible on every rank."""
        self.wait_all()
        self._runtime.wait_sync()

    # Intents and time

    def intent(self, keys: object, start: int, end: int | None = None) -> None:
        """Say that this worker will access keys while its clock is in [start, end] (`end`: `start` if not given).

        A hint: it makes access fast, and is never needed for it to be right.

        Raises:
            ValueError: if `end` is before `start`.
            TypeError: if one of them is no integer; and as `pull`.
            IndexError: as `pull`.
            RuntimeError: if this worker is closed.
        """
        start = check_integer("start", start, "a clock (an int)")
        end = start if end is None else check_integer("end", end, "a clock (an int)")
        if end < start:
            raise ValueError(f"an intent must not end before it starts; got start {start}, end {end}")
        parts = self.lengths.parts(self.lengths.check(keys))
        self._runtime.intend(self._clock, [(part.group, part.keys) for part in parts], start, end)

    @property
    def current_clock(self) -> int:
        """This worker's clock, which starts at 0 (that of a later worker: at the slowest of the others')."""
        return self._clock.now

    def advance_clock(self) -> int:
        """Move this worker's clock on by one and return it; with a bound on staleness, wait as long as that demands.

        Raises:
            PeerError: if another rank does not come.
            RuntimeError: if this worker is closed.
        """
        self._runtime.advance(self._clock)
        return self._clock.now

    # Sampling

    def enable_sampling(
        self, keys: object = None, distribution: object = None, scheme: str = "naive", replacement: bool = True
    ) -> None:
        """Say from which keys, by which distribution and scheme this worker samples; see `pm.by_hand.sampling`.

        Args:
            keys: int64 `[m]`, distinct; None for all.
            distribution: None (uniform), weights `[m]`, or a function (generator, n) -> n independent keys.
            scheme: "naive", "preloc", "pool" or "local".
            replacement: whether a sample may have a key twice.

        Raises:
            ValueError, TypeError: if an argument is not as described.
            IndexError: if a key is out of range.
        """
        self._sampling = Sampling(
            _Access(self),
            seed=self._seed,
            keys=None if keys is None else self.lengths.check(keys),
            distribution=distribution,
            scheme=scheme,
            replacement=replacement,
        )

    def prepare_sample(self, n: int, start: int | None = None, end: int | None = None) -> int:
        """Prepare a sample of `n` keys for clocks in [start, end] (now, if not given); return a handle for it.

        Without `enable_sampling`, samples are drawn uniformly from all keys, with replacement.

        Raises:
            ValueError: for `n` below 0, an end before its start, and more keys than there are, without replacement.
            TypeError: if an argument is no integer.
        """
        if self._sampling is None:
            self.enable_sampling()
        return self._sampling.prepare(n, start, end)

    def pull_sample(self, handle: int, keys: object, out: object) -> None:
        """Take the next keys of a prepared sample: write them to `keys` (int64 `[k]`) and their values to `out`.

        Raises:
            ValueError: for a handle of no sample, more keys than are left of it, or an `out` that does not fit or is
                read-only.
            TypeError: if the handle is no integer, `keys` is not a writeable int64 vector, or `out` has another dtype.
        """
        handle = _check_handle(handle)
        if self._sampling is None:
            raise ValueError(f"handle {handle} is of no sample: prepare_sample was not called")
        self._sampling.pull(handle, keys.detach().numpy() if hasattr(keys, "detach") else keys, out)

    def finish_sample(self, handle: int) -> None:
        """Forget a sample of which no more keys will be pulled. One that was pulled whole is forgotten by itself.

        Raises:
            TypeError: if the handle is no integer.
        """
        handle = _check_handle(handle)
        if self._sampling is not None:
            self._sampling.finish(handle)

    def close(self) -> None:
        """This worker is done: its intents end, and nobody waits for its clock."""
        self.wait_all()
        self._runtime.close_clock(self._clock)


def _check_handle(handle: object) -> int:
    return check_integer("a handle", handle, "an int that this worker gave out")


class _Access:
    """What sampling needs of a worker (`pm.by_hand.sampling.KeyAccess`)."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self.rank = worker._runtime.rank
        self.stream = worker.number
        self.num_keys = worker.lengths.num_keys

    @property
    def current_clock(self) -> int:
        return self._worker.current_clock

    def intend(self, keys: np.ndarray, start: int, end: int) -> None:
        self._worker.intent(keys, start, end)

    def is_local(self, keys: np.ndarray) -> np.ndarray:
        return self._worker.is_local(keys)

    def pull(self, keys: np.ndarray, out: object) -> None:
        self._worker.wait(self._worker.pull(keys, out))
