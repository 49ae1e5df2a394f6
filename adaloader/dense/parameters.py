"""Dense parameters: their gradients are averaged over ranks while backward still runs.

`DenseReducer` is a thin layer on `torch.distributed.all_reduce` and not `DistributedDataParallel`, for it
must depend neither on the user calling `model(...)`, nor on every parameter being used, nor on one forward
pass per step.

This file says when a reduction begins and ends; `bucket_exchange.py` sends what it sums. Sums are made by gloo's
ring (or NCCL), whose order depends on the ranks alone: a run repeats bit by bit, and every rank gets the same
bits.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator

import torch.distributed as dist
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from adaloader.dense.bucket_exchange import BucketExchange, Reduction
from adaloader.dense.deferral import Deferral
from adaloader.errors import ManagedTableError
from adaloader.gradients.backward import TaskEnd, current_task, enclosing_call, hook_gradient, queue_at_end

MIB = 1 << 20


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

    All ranks must construct it with the same parameters and make the same reductions. Ranks that are not in
    the same one get an error. Parameters that come later are to be added (`averaged.py` sees to it). Not covered:
    changes that a hook registered after construction makes to `.grad`, and second derivatives through an averaged
    `.grad`.

    Invariant: `_current` is None, or the one reduction that this rank has begun and not ended.
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
        parameters = list({parameter: name for name, parameter in named_parameters}.items())
        self._group = group
        self._weights = weights
        self._on_reduced = on_reduced
        self._on_ended = on_ended
        self._on_begun = on_begun
        self._deferral = Deferral(self._factor_of_backward)
        self._exchange = BucketExchange(
            parameters,
            group,
            bucket_bytes=bucket_bytes,
            first_bucket_bytes=first_bucket_bytes,
            timeout_seconds=timeout_seconds,
            describe_peers=describe_peers,
            in_vain=in_vain,
        )
        self._rank = self._exchange.rank
        self._lock = threading.RLock()  # backward calls hooks on one thread per device
        self._current: Reduction | None = None
        self._hooks: dict[Parameter, RemovableHandle] = {}
        if group is not None:
            for parameter, _ in parameters:
                self._hook(parameter)

    @property
    def some_joined(self) -> bool | None:
        """Whether a rank joined the last reduction without a backward; None: nothing was sent."""
        return self._exchange.some_joined

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
        return self._exchange.index > 0 or self.is_deferred

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

        Raises:
            ManagedTableError: it is called inside of a backward that has dense gradients.
        """
        with self._lock:
            if self._current is not None and not self._current.broken:
                if self._exchange.has_gradients and current_task() in self._current.tasks:
                    raise ManagedTableError(
                        "optimizer.step() inside backward() (in a hook of a parameter): gradients are averaged over "
                        "ranks when backward() ends, and are this rank's alone until then. Step after backward()"
                    )
                self._finish()
            if self._exchange.index == 0 or self.is_deferred:
                self._begin(*self._ask_weights())
                self._finish()
            self._exchange.step += 1
            self._exchange.index = 0

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside send nothing; the first reduction afterwards sums what they have added to `.grad` as well.

        Enter it on all ranks. Where the sum of a batch's weights is not known without asking, gradients are reduced
        all the same.
        """
        self._deferral.enter(parameter for parameter, _ in self._exchange.parameters)
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

    def holds(self, parameter: Parameter) -> bool:
        """Whether gradients of `parameter` are averaged."""
        return parameter in self._hooks

    @property
    def has_trained(self) -> bool:
        """Whether any dense parameter is trained, so that gradients travel."""
        return any(parameter.requires_grad for parameter, _ in self._exchange.parameters)

    def drop(self, parameter: Parameter) -> None:
        """Leave `parameter` out from the next reduction on: it has become a managed table (on every rank)."""
        with self._lock:
            self._exchange.drop(parameter)
            if parameter in self._hooks:
                self._hooks.pop(parameter).remove()

    def add(self, parameter: Parameter, name: str, order: list[Parameter]) -> None:
        """Take `parameter` in from the next reduction on, placed as in `order` (on every rank): it is no table."""
        with self._lock:
            self._exchange.add(parameter, name, order)
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
            if self._current.deferred:
                self._current.fired.add(parameter)
            else:
                self._exchange.gradient_came(self._current, parameter)

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
            if self._current is None:  # a step inside of backward has ended it: no dense gradients travel
                return
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
        self._current = self._exchange.begin(weight, total, joined=joined, deferred=deferred, carries=carries)

    def _finish(self) -> int:
        """Collective: end the reduction under way; return the number of ranks that did not join."""
        current = self._current
        total, active = current.total, int(not current.joined)
        if current.deferred:
            self._exchange.note_fired(current)
            self._deferral.pending += 1
            self.backwards += 1
            self._forget()
            self._on_reduced(current.weight / total)
            self._on_ended()
            return active
        try:
            if self._group is None:
                total = current.weight or 1.0
            elif self._exchange.has_gradients or total is None:
                total, active = self._exchange.sum_up(current)
        finally:
            self._end()
        if active:
            self._on_reduced(current.weight / total)
        self._on_ended()
        return active

    def _factor_of_backward(self) -> float:
        """Return what gradients of the running backward are multiplied by before they are added to `.grad`."""
        with self._lock:
            self._enter_task()
            current = self._current
            if not (current.deferred or current.carries):
                return 1.0
            return current.weight * self._exchange.ranks / current.total

    def _end(self) -> None:
        if self._current.carries:
            self._deferral.summed()
        self._forget()
        self._exchange.index += 1
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
                self._exchange.complete(current)
            finally:
                self._end()
        else:
            self._forget()

    def _ask_weights(self) -> tuple[float, float | None]:
        weight, total = self._weights()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"rank {self._rank}: a batch's weight is {weight}: it must be finite, 0 or more")
        if total is not None and not (math.isfinite(total) and total > 0):
            raise ValueError(f"rank {self._rank}: the sum of the ranks' weights is {total}: it must be positive")
        return weight, total
