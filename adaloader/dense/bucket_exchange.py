"""The exchange of dense gradients: buckets leave, are waited for and checked, and are written back.

What a reduction is, and when it begins and ends, is said in `dense.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn import Parameter

from adaloader.dense.buckets import COUNT_MODULUS, Bucket, Header, plan
from adaloader.ranks.agreement import check_same_on_all_ranks, device_of


@dataclass
class Reduction:
    """One reduction under way: who takes part with what weight, and how far its buckets are."""

    weight: float
    total: float | None
    joined: bool
    deferred: bool
    """It belongs to a backward inside `no_sync()`: nothing is sent."""
    carries: bool
    """It sums what such backwards have left in `.grad`."""
    pending: list[int]
    """Per bucket: parameters that are expected to get a gradient in this backward and have not yet."""
    again: list[bool]
    """Per bucket: it must be summed again, for a gradient came after it had left."""
    fired: set[Parameter] = field(default_factory=set)
    tasks: set[int] = field(default_factory=set)
    handles: list = field(default_factory=list)
    launched: int = 0
    broken: bool = False


class BucketExchange:
    """Sums the gradients of dense parameters over ranks, bucket by bucket, for one reduction at a time (collective).

    `index` is the number of the reduction within the optimizer step `step`: the same on all ranks, and every bucket
    says it of itself. `some_joined` says of the last reduction whether a rank joined it without a backward; None where
    nothing was sent.

    Invariant: buckets below a reduction's `launched` are on the wire.

    Args:
        parameters: (parameter, name), each once.
        group: None at one rank, where there are no buckets.
        others: as of `DenseReducer`.
    """

    def __init__(
        self,
        parameters: list[tuple[Parameter, str]],
        group: dist.ProcessGroup | None,
        *,
        bucket_bytes: int,
        first_bucket_bytes: int,
        timeout_seconds: float,
        describe_peers: Callable[[], str],
        in_vain: Callable[[], str | None],
    ) -> None:
        self.parameters = parameters
        self.rank = dist.get_rank(group) if group is not None else 0
        self.ranks = dist.get_world_size(group) if group is not None else 1
        self.step = 0
        self.index = 0
        self.some_joined: bool | None = None
        self._group = group
        self._sizes_bytes = (bucket_bytes, first_bucket_bytes)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._describe_peers = describe_peers
        self._in_vain = in_vain
        self._ever_fired: set[Parameter] = set()
        self._buckets: list[Bucket] = []
        self._places: dict[Parameter, int] = {}
        self._signature: list[tuple] | None = None
        self._replan()

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter's gradients travel."""
        return bool(self._places)

    def drop(self, parameter: Parameter) -> None:
        """Leave `parameter` out from the next reduction on."""
        self.parameters = [(p, name) for p, name in self.parameters if p is not parameter]
        self._ever_fired.discard(parameter)
        self._signature = None

    def add(self, parameter: Parameter, name: str, order: list[Parameter]) -> None:
        """Take `parameter` in from the next reduction on, placed as in `order`."""
        names = dict(self.parameters) | {parameter: name}
        place = {id(p): at for at, p in enumerate(order)}
        self.parameters = sorted(names.items(), key=lambda item: place.get(id(item[0]), len(place)))
        self._signature = None

    def begin(self, weight: float, total: float | None, *, joined: bool, deferred: bool, carries: bool) -> Reduction:
        """Collective where parameters were frozen, unfrozen, cast or moved: begin a reduction."""
        self._replan()
        pending = [0] * len(self._buckets)
        for parameter in self._ever_fired:
            pending[self._places[parameter]] += 1
        again = [False] * len(self._buckets)
        return Reduction(weight, total, joined, deferred, carries, pending, again)

    def gradient_came(self, current: Reduction, parameter: Parameter) -> None:
        """Let the bucket of `parameter` go if this was the last gradient that it waited for."""
        place = self._places.get(parameter)
        if place is None:  # unfrozen since this backward began: in the next plan
            return
        if place < current.launched:
            current.again[place] = True
        elif parameter not in current.fired and parameter in self._ever_fired:
            current.pending[place] -= 1
        current.fired.add(parameter)
        self._launch(current, len(self._buckets) - 1, only_full=True)

    def note_fired(self, current: Reduction) -> None:
        """Remember which parameters get gradients: later reductions wait for theirs."""
        self._ever_fired |= current.fired

    def sum_up(self, current: Reduction) -> tuple[float, int]:
        """Collective: sum and write back every bucket; return the sum of weights and the number of ranks that did not
        join."""
        sums, again = self.complete(current)
        for number in (number for number, count in enumerate(again) if count):
            self._launch_one(current, number)
            self._wait(self._buckets[number])
        active = self.ranks - round(sums.joined)
        self.some_joined = active < self.ranks
        total = current.total if current.total is not None else sums.weight
        if active and total <= 0:
            raise ValueError(f"the weights of all ranks' batches sum to {total}: give some batch a positive weight")
        if active:
            divisor = self.ranks if sums.total_is_known or current.carries else total
            for bucket in self._buckets:
                bucket.write_back(divisor, self._group)
        self.note_fired(current)
        return total, active

    def complete(self, current: Reduction) -> tuple[Header, list[float]]:
        """Collective: send what has not left, and wait for all; return the sums of headers, and "again" flags."""
        self._launch(current, len(self._buckets))
        return self._wait_for_all(current)

    def _replan(self) -> None:
        """Lay out the buckets anew if a parameter was frozen, unfrozen, cast or moved to another device."""
        signature = [(p.requires_grad, p.dtype, p.device) for p, _ in self.parameters]
        if self._group is None or signature == self._signature:
            return
        self._signature = signature
        trained = [(name, parameter) for parameter, name in self.parameters if parameter.requires_grad]
        check_same_on_all_ranks([(name, p.shape, p.dtype) for name, p in trained], self._group)
        self._buckets, self._places = plan(trained, *self._sizes_bytes, header_device=device_of(self._group))
        self._ever_fired.clear()

    def _launch(self, current: Reduction, end: int, only_full: bool = False) -> None:
        """Collective: send the buckets before `end` that have not left; stop at one not full if asked."""
        if only_full and not self._ever_fired:  # nothing is known yet of what this model's backward reaches
            return
        while current.launched < end and not (only_full and current.pending[current.launched]):
            self._launch_one(current, current.launched)
            current.launched += 1

    def _launch_one(self, current: Reduction, number: int) -> None:
        scale = current.weight
        if current.carries:  # weighed when they were added
            scale = 1.0
        elif current.total is not None:  # equal weights give exactly 1
            scale = current.weight * self.ranks / current.total
        is_last = number == len(self._buckets) - 1
        step, index = self.step % COUNT_MODULUS, self.index % COUNT_MODULUS
        header = Header(
            weight=current.weight,
            total_is_known=float(current.total is not None),
            joined=float(current.joined),
            carries=float(current.carries),
            step=step,
            step_squared=step * step,
            index=index,
            index_squared=index * index,
            abandoned=float(is_last and current.broken),  # the last leaves when that is settled
        )
        again = current.again[:-1] if is_last else []
        with self._explained():
            self._buckets[number].launch(header, scale, again, self._group)

    def _wait_for_all(self, current: Reduction) -> tuple[Header, list[float]]:
        """Collective: wait for and check all buckets; return the most precise sums, and "again" flags."""
        best = Header()
        for bucket in self._buckets:
            sums, again = self._wait(bucket)
            self._check(sums, current)
            if bucket is self._buckets[0] or bucket.flat.dtype is torch.float64:
                best = sums
        return best, again

    def _wait(self, bucket: Bucket) -> tuple[Header, list[float]]:
        with self._explained():
            return bucket.wait(self._timeout, self._in_vain)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of a failure inside what this rank knows of the others."""
        try:
            yield
        except RuntimeError as error:
            self._in_vain()  # raises what ended this rank's manager, which tells more
            peers = self._describe_peers()
            self._in_vain()  # heard of meanwhile: another rank raised for it, and its connection was lost at once
            raise RuntimeError(
                f"rank {self.rank}: summing dense gradients failed in {self._where()}: {error}\n"
                "A rank has ended, has raised, or makes fewer calls of backward() than this one. " + peers
            ) from error

    def _check(self, sums: Header, current: Reduction) -> None:
        """Raise, on every rank alike, unless all ranks are in the same reduction and agree on what it is."""
        if sums.abandoned and not current.broken:
            raise RuntimeError(
                f"rank {self.rank}: another rank's backward raised in {self._where()}, and it went on: "
                "let the exception end the job, or skip the step on every rank"
            )
        for name in ("step", "index"):
            sum_, squares = getattr(sums, name), getattr(sums, f"{name}_squared")
            if self.ranks * squares != sum_ * sum_:
                raise RuntimeError(
                    f"rank {self.rank} is in {self._where()}, others are in another (mean {name} modulo "
                    f"{COUNT_MODULUS}: {sum_ / self.ranks:.2f}): every rank must call backward() and "
                    "optimizer.step() equally often; look for a condition that differs between ranks"
                )
        if sums.total_is_known not in (0.0, self.ranks):
            raise RuntimeError(
                f"only {sums.total_is_known:.0f} of {self.ranks} ranks know the sum of weights: "
                "weights() must return it on all ranks, or None on all"
            )
        if sums.carries not in (0.0, self.ranks):
            raise RuntimeError(
                f"only {sums.carries:.0f} of {self.ranks} ranks had a backward inside no_sync() before "
                f"{self._where()}: every rank must enter it for the same batches"
            )
        all_joined = sums.joined == self.ranks
        if current.total and not all_joined and not math.isclose(sums.weight, current.total, rel_tol=1e-4):
            raise RuntimeError(
                f"rank {self.rank}: the ranks' shares of {self._where()} weigh {sums.weight:g}, and those of its batch "
                f"weigh {current.total:g} in all: ranks are at different batches. A rank has skipped one (continue, a "
                "caught exception, a loss that was not finite) or called backward() twice for one: skip it on every "
                "rank, or multiply its loss by 0 there"
            )

    def _where(self) -> str:
        return f"reduction {self.index} of step {self.step}"
