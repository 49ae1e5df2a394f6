"""Dense parameters: their gradients are averaged over ranks while backward still runs.

`DenseReducer` is a thin layer on `torch.distributed.all_reduce` and not `DistributedDataParallel`, for it
must depend neither on the user calling `model(...)`, nor on every parameter being used, nor on one forward
pass per step.

Sums are made by gloo's ring (or NCCL), whose order depends on the ranks alone: a run repeats bit by bit, and
every rank gets the same bits.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from adaloader.agreement import broadcast, check_same_on_all_ranks, device_of
from adaloader.backward import TaskEnd, current_task, enclosing_call, hook_gradient, queue_at_end
from adaloader.buckets import COUNT_MODULUS, Bucket, Header, plan
from adaloader.deferral import Deferral

__all__ = ["DenseReducer", "broadcast"]

MIB = 1 << 20


@dataclass
class _Reduction:
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


class DenseReducer:
    """Averages the gradients of dense parameters over ranks; complete when `backward()` returns.

    Each backward ends with one *reduction*: on every rank, `p.grad := sum_r(w_r * p.grad_r) / sum_r(w_r)`,
    where w_r is what `weights()` says on rank r (samples, say). What is reduced is the accumulated gradient.
    That is right when several backwards are accumulated, for the part A of earlier backwards was reduced and
    so is equal on all ranks: `sum(w_r * (A + g_r)) / W = A + sum(w_r * g_r) / W`, whatever the weights are
    now and were before.

    Buckets leave, strictly in one order, as soon as all their parameters that ever got a gradient have one;
    the last leaves at the end of backward. A gradient that comes after its bucket has left (a parameter used
    in two segments of reentrant checkpointing) makes all ranks sum that bucket again. A parameter without a
    gradient on every rank keeps None; one with a gradient on some ranks gets the average everywhere, with
    zeros from the others. Sparse gradients (`nn.Embedding(sparse=True)`) travel densely, as their tables are
    small, and come out sparse again, with the union of the ranks' rows.

    `reductions` have been made; `backwards` counts those and the backwards inside `no_sync`.
    `some_joined` says of the last reduction whether a rank joined it without a backward (None: nothing was sent).

    All ranks must construct it with the same parameters and make the same reductions. Ranks that are not in
    the same one get an error. Not covered: parameters that the module gains later, changes that a hook
    registered after construction makes to `.grad`, and second derivatives through an averaged `.grad`.

    Invariant: `_current` is None, or the one reduction that this rank has begun and not ended; buckets below
    its `launched` are on the wire.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        group: dist.ProcessGroup | None,
        *,
        weights: Callable[[], tuple[float, float | None]],
        on_reduced: Callable[[float], None],
        on_ended: Callable[[], None] = lambda: None,
        on_begun: Callable[[bool], None] = lambda carries: None,
        bucket_bytes: int = 25 * MIB,
        first_bucket_bytes: int = MIB,
        timeout_seconds: float = 1800.0,
        describe_peers: Callable[[], str] = str,
        in_vain: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Collective: take over the gradients of `named_parameters`.

        Args:
            named_parameters: the dense parameters under their names, float or complex, on any devices; a
                parameter under two names counts once. Frozen ones cost nothing until they are unfrozen (on
                all ranks).
            group: see `process_group`; None at one rank, where gradients are left as they are.
            weights: asked once per reduction: (this rank's weight, sum of all ranks' weights or None if
                unknown). Either all ranks know the sum or none does.
            on_reduced: called after each reduction with this rank's weight / sum of all weights.
            on_ended: called after that, and on ranks that joined too; also after a backward inside `no_sync`.
            on_begun: called when a reduction begins, with whether it sums what `no_sync` has left.
            bucket_bytes: gradients that travel in one message; `first_bucket_bytes`: in the first.
            timeout_seconds: limit of the wait for one bucket.
            describe_peers: its answer is added to the error when a wait fails: whom this rank waits for, say.
            in_vain: asked now and then during a wait: why the others cannot come any more, None where they can. It may
                raise.

        Raises:
            ValueError: the ranks' parameters differ in name, order, shape or dtype.
        """
        self.reductions = 0
        self.backwards = 0
        self.some_joined: bool | None = None
        self._parameters = list({parameter: name for name, parameter in named_parameters}.items())
        self._group = group
        self._weights = weights
        self._on_reduced = on_reduced
        self._on_ended = on_ended
        self._on_begun = on_begun
        self._deferral = Deferral(self._factor_of_backward)
        self._sizes_bytes = (bucket_bytes, first_bucket_bytes)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._describe_peers = describe_peers
        self._in_vain = in_vain
        self._rank = dist.get_rank(group) if group is not None else 0
        self._ranks = dist.get_world_size(group) if group is not None else 1
        self._lock = threading.RLock()  # backward calls hooks on one thread per device
        self._current: _Reduction | None = None
        self._step = 0
        self._index = 0
        self._ever_fired: set[Parameter] = set()
        self._buckets: list[Bucket] = []
        self._places: dict[Parameter, int] = {}
        self._signature: list[tuple] | None = None
        self._hooks: dict[Parameter, RemovableHandle] = {}
        if group is not None:
            self._replan()
            for parameter, _ in self._parameters:
                self._hook(parameter)

    @property
    def begun(self) -> int:
        """Reductions that this rank has begun: those that have ended, and one that is under way."""
        return self.reductions + (self._current is not None)

    @property
    def is_under_way(self) -> bool:
        """Whether a backward is under way, at whose end gradients are summed."""
        return self._current is not None and not self._current.broken

    @property
    def is_deferred(self) -> bool:
        """Whether gradients of backwards inside `no_sync` wait to be summed."""
        return self._deferral.pending > 0

    @property
    def deferred(self) -> int:
        """How many backwards inside `no_sync` wait to be summed."""
        return self._deferral.pending

    @property
    def has_unstepped(self) -> bool:
        """Whether a backward has given gradients since the last step."""
        return self._index > 0 or self.is_deferred

    # --- what the manager calls ---

    def touch(self) -> None:
        """Say that the present backward reaches managed tables, so that it ends with a reduction.

        For use in hooks that `backward()` calls (not `torch.autograd.grad`, which leaves every `.grad`
        alone).

        Raises:
            RuntimeError: no backward is running.
        """
        with self._lock:
            self._enter_task()

    def finish_step(self) -> None:
        """Collective: make sure that the gradients are reduced; call it once per step, before the optimizer.

        Where no reduction happened since the last step, one is made now: backward may have reached nothing of
        ours on this rank, and something on another. So is one that backward could not complete by itself.
        """
        with self._lock:
            if self._current is not None and not self._current.broken:
                self._finish()
            if self._index == 0 or self.is_deferred:
                self._begin(*self._ask_weights())
                self._finish()
            self._step += 1
            self._index = 0

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside send nothing; the first reduction afterwards sums what they have added to `.grad` as well.

        Enter it on all ranks. Where the sum of a batch's weights is not known without asking, gradients are reduced
        all the same.
        """
        self._deferral.enter(parameter for parameter, _ in self._parameters)
        try:
            yield
        finally:
            self._deferral.leave()

    def join(self, zero: bool = True, *, carries: bool = False) -> int:
        """Collective: take part in a reduction without a backward; return the number of ranks that had one.

        A rank that has run out of data calls it once for each backward of the others, and gets the averaged
        gradients; then it steps as they do (`finish_step`). With `zero` it contributes nothing, at weight 0
        whatever `weights()` says; without, the gradients that it has, at its own weight. 0 is returned when
        all ranks joined. Where nothing is sent (no dense parameters, a sum of weights known to all) it counts
        this rank alone. `carries` says that the reduction sums what `no_sync` has left: to such a one every rank
        contributes the gradients that it has.
        """
        with self._lock:
            weight, total = self._ask_weights()
            if carries and not self.is_deferred:
                self._deferral.pending = 1
            self._begin(0.0 if zero else weight, total, joined=zero)
            return self._finish()

    @property
    def has_trained(self) -> bool:
        """Whether any dense parameter is trained, so that gradients travel."""
        return any(parameter.requires_grad for parameter, _ in self._parameters)

    def drop(self, parameter: Parameter) -> None:
        """Leave `parameter` out from the next reduction on: it has become a managed table (on every rank)."""
        with self._lock:
            self._parameters = [(p, name) for p, name in self._parameters if p is not parameter]
            if parameter in self._hooks:
                self._hooks.pop(parameter).remove()
            self._ever_fired.discard(parameter)
            self._signature = None

    def add(self, parameter: Parameter, name: str, order: list[Parameter]) -> None:
        """Take `parameter` in from the next reduction on, placed as in `order` (on every rank): it is no table."""
        with self._lock:
            names = dict(self._parameters) | {parameter: name}
            place = {id(p): at for at, p in enumerate(order)}
            self._parameters = sorted(names.items(), key=lambda item: place.get(id(item[0]), len(place)))
            self._signature = None
            if self._group is not None and parameter not in self._hooks:
                self._hook(parameter)

    def _hook(self, parameter: Parameter) -> None:
        self._hooks[parameter] = hook_gradient(parameter, self._on_gradient)

    def close(self) -> None:
        """Let go of the parameters: their gradients are this rank's own again."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    # --- what backward calls ---

    def _on_gradient(self, parameter: Parameter) -> None:
        """A gradient has been accumulated: let its bucket go if that was the last that it waited for."""
        with self._lock:
            self._enter_task()
            current, place = self._current, self._places.get(parameter)
            if current.deferred:
                current.fired.add(parameter)
                return
            if place is None:  # unfrozen since this backward began: in the next plan
                return
            if place < current.launched:
                current.again[place] = True
            elif parameter not in current.fired and parameter in self._ever_fired:
                current.pending[place] -= 1
            current.fired.add(parameter)
            self._launch(len(self._buckets) - 1, only_full=True)

    def _enter_task(self) -> None:
        """Begin a reduction if none is under way, and see to it that the end of this backward ends it.

        Backward runs inside backward with reentrant checkpointing. Then it is the outer one's end that
        counts, and the inner one can only ask the nodes that the outer one will visit next to report.
        """
        task = current_task()
        if self._current is not None and task in self._current.tasks:
            return
        inner, node = enclosing_call()
        if self._current is not None and not inner and task > max(self._current.tasks):
            self._current.broken = True  # inner backwards start after their outer one: this is a new one
        if self._current is None or self._current.broken:
            weight, total = self._ask_weights()
            self._begin(weight, total, deferred=self._deferral.is_on and total is not None)
        self._current.tasks.add(task)
        queue_at_end(TaskEnd(self._on_inner_end if inner else self._on_outer_end, self._on_failure))
        if node is not None:
            following = [function for function, _ in node.next_functions if function is not None]
            self._current.handles += [f.register_prehook(lambda grads: self.touch()) for f in following]

    def _on_inner_end(self) -> None:
        """The enclosing backward goes on: nothing ends yet."""

    def _on_outer_end(self) -> None:
        with self._lock:
            self._current.broken = False  # if an inner backward raised, its caller has dealt with it
            self._finish()

    def _on_failure(self) -> None:
        """Backward raised. No message now, for this runs wherever Python drops the task: see `_settle`."""
        if self._current is not None:
            self._current.broken = True

    # --- one reduction ---

    def _begin(self, weight: float, total: float | None, *, joined: bool = False, deferred: bool = False) -> None:
        if self._current is not None:
            self._settle()
        carries = self.is_deferred and not deferred
        if carries and total is None:
            raise RuntimeError(
                f"rank {self._rank}: gradients of batches whose ranks' weights have a known sum were gathered inside "
                "no_sync(), and this batch's sum is not known (batch_weight=, or a loader of the rank's own batches): "
                "do not mix the two between steps"
            )
        if not deferred:
            self._on_begun(carries)
        self._replan()
        pending = [0] * len(self._buckets)
        for parameter in self._ever_fired:
            pending[self._places[parameter]] += 1
        again = [False] * len(self._buckets)
        self._current = _Reduction(weight, total, joined, deferred, carries, pending, again)

    def _finish(self) -> int:
        """Collective: end the reduction under way; return the number of ranks that did not join."""
        current = self._current
        total, active = current.total, int(not current.joined)
        if current.deferred:
            self._ever_fired |= current.fired
            self._deferral.pending += 1
            self.backwards += 1
            self._forget()
            self._on_reduced(current.weight / total)
            self._on_ended()
            return active
        try:
            if self._group is None:
                total = current.weight or 1.0
            elif self._places or total is None:
                total, active = self._exchange(current)
        finally:
            self._end()
        if active:
            self._on_reduced(current.weight / total)
        self._on_ended()
        return active

    def _exchange(self, current: _Reduction) -> tuple[float, int]:
        """Collective: sum and write back every bucket; return the sum of weights, and as `_finish` does."""
        self._launch(len(self._buckets))
        sums, again = self._wait_for_all(current)
        for number in (number for number, count in enumerate(again) if count):
            self._launch_one(number)
            self._wait(self._buckets[number])
        active = self._ranks - round(sums.joined)
        self.some_joined = active < self._ranks
        total = current.total if current.total is not None else sums.weight
        if active and total <= 0:
            raise ValueError(f"the weights of all ranks' batches sum to {total}: give some batch a positive weight")
        if active:
            divisor = self._ranks if sums.total_is_known or current.carries else total
            for bucket in self._buckets:
                bucket.write_back(divisor, self._group)
        self._ever_fired |= current.fired
        return total, active

    def _factor_of_backward(self) -> float:
        """Return what gradients of the running backward are multiplied by before they are added to `.grad`."""
        with self._lock:
            self._enter_task()
            current = self._current
            if not (current.deferred or current.carries):
                return 1.0
            return current.weight * self._ranks / current.total

    def _end(self) -> None:
        if self._current.carries:
            self._deferral.summed()
        self._forget()
        self._index += 1
        self.reductions += 1
        self.backwards += 1

    def _forget(self) -> None:
        for handle in self._current.handles:
            handle.remove()
        self._current = None

    def _settle(self) -> None:
        """Collective if anything was sent: get rid of a reduction whose backward raised on this rank.

        If nothing of it was sent, it has not happened: this rank may try again. Otherwise the others wait for
        the rest: they get it, marked, and raise.
        """
        current = self._current
        if current.launched and self._group is not None:
            try:
                self._launch(len(self._buckets))
                self._wait_for_all(current)
            finally:
                self._end()
        else:
            self._forget()

    # --- buckets ---

    def _replan(self) -> None:
        """Lay out the buckets anew if a parameter was frozen, unfrozen, cast or moved to another device."""
        signature = [(p.requires_grad, p.dtype, p.device) for p, _ in self._parameters]
        if self._group is None or signature == self._signature:
            return
        self._signature = signature
        trained = [(name, parameter) for parameter, name in self._parameters if parameter.requires_grad]
        check_same_on_all_ranks([(name, p.shape, p.dtype) for name, p in trained], self._group)
        self._buckets, self._places = plan(trained, *self._sizes_bytes, header_device=device_of(self._group))
        self._ever_fired.clear()

    def _launch(self, end: int, only_full: bool = False) -> None:
        """Collective: send the buckets before `end` that have not left; stop at one not full if asked."""
        current = self._current
        if only_full and not self._ever_fired:  # nothing is known yet of what this model's backward reaches
            return
        while current.launched < end and not (only_full and current.pending[current.launched]):
            self._launch_one(current.launched)
            current.launched += 1

    def _launch_one(self, number: int) -> None:
        current = self._current
        scale = current.weight
        if current.carries:  # weighed when they were added
            scale = 1.0
        elif current.total is not None:  # equal weights give exactly 1
            scale = current.weight * self._ranks / current.total
        is_last = number == len(self._buckets) - 1
        step, index = self._step % COUNT_MODULUS, self._index % COUNT_MODULUS
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
        self._buckets[number].launch(header, scale, again, self._group)

    def _wait_for_all(self, current: _Reduction) -> tuple[Header, list[float]]:
        """Collective: wait for and check all buckets; return the most precise sums, and "again" flags."""
        best = Header()
        for bucket in self._buckets:
            sums, again = self._wait(bucket)
            self._check(sums, current)
            if bucket is self._buckets[0] or bucket.flat.dtype is torch.float64:
                best = sums
        return best, again

    def _wait(self, bucket: Bucket) -> tuple[Header, list[float]]:
        try:
            return bucket.wait(self._timeout, self._in_vain)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self._rank}: summing dense gradients failed in {self._where()}: {error}\n"
                "A rank has ended, has raised, or makes fewer calls of backward() than this one. "
                + self._describe_peers()
            ) from error

    def _check(self, sums: Header, current: _Reduction) -> None:
        """Raise, on every rank alike, unless all ranks are in the same reduction and agree on what it is."""
        if sums.abandoned and not current.broken:
            raise RuntimeError(
                f"rank {self._rank}: another rank's backward raised in {self._where()}, and it went on: "
                "let the exception end the job, or skip the step on every rank"
            )
        for name in ("step", "index"):
            sum_, squares = getattr(sums, name), getattr(sums, f"{name}_squared")
            if self._ranks * squares != sum_ * sum_:
                raise RuntimeError(
                    f"rank {self._rank} is in {self._where()}, others are in another (mean {name} modulo "
                    f"{COUNT_MODULUS}: {sum_ / self._ranks:.2f}): every rank must call backward() and "
                    "optimizer.step() equally often; look for a condition that differs between ranks"
                )
        if sums.total_is_known not in (0.0, self._ranks):
            raise RuntimeError(
                f"only {sums.total_is_known:.0f} of {self._ranks} ranks know the sum of weights: "
                "weights() must return it on all ranks, or None on all"
            )
        if sums.carries not in (0.0, self._ranks):
            raise RuntimeError(
                f"only {sums.carries:.0f} of {self._ranks} ranks had a backward inside no_sync() before "
                f"{self._where()}: every rank must enter it for the same batches"
            )
        all_joined = sums.joined == self._ranks
        if current.total and not all_joined and not math.isclose(sums.weight, current.total, rel_tol=1e-4):
            raise RuntimeError(f"the ranks' weights sum to {sums.weight}, but weights() said {current.total}")

    def _ask_weights(self) -> tuple[float, float | None]:
        weight, total = self._weights()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"rank {self._rank}: a batch's weight is {weight}: it must be finite, 0 or more")
        if total is not None and not (math.isfinite(total) and total > 0):
            raise ValueError(f"rank {self._rank}: the sum of the ranks' weights is {total}: it must be positive")
        return weight, total

    def _where(self) -> str:
        return f"reduction {self._index} of step {self._step}"
