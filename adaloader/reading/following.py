"""Ranks with different numbers of batches: one that runs out follows the others until they have finished theirs.

Following means to take part, with weight 0, in every sum of dense gradients, and in every optimizer step, so that dense
parameters and versions stay the same on all ranks. Ranks that still have batches tell those that ended how many sums
they have begun; nothing is sent about it while all ranks have batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from adaloader.optimizers.supported import adopt_hyperparameters, hyperparameter_vector
from adaloader.ranks.agreement import broadcast
from adaloader.reading.schedules import position_of, schedulers_of, step_towards
from adaloader.tables.writes import write_along
from pm.messages import Kind, Message
from pm.same_step import Stepped

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel

_MOST_ITERATIONS = 1 << 32
_UNASKED = -1
_NOTHING, _ZERO, _NONZERO = range(3)  # what a loop has left in its dense gradients
_NO_SUM = 0, 0, 0
_NONE = np.empty(0, np.float64)


class _Done(Enum):
    """What a rank that follows has done."""

    SOMETHING = auto()
    UP_TO_A_WRITE = auto()
    ALL = auto()


@dataclass
class _Leg:
    """How far this rank had come when it began to follow: steps, sums, backwards inside `no_sync` since, scalers."""

    following: Following
    steps: int
    reductions: int
    deferred: int
    scalers: int


class Follower:
    """Keeps account, for one model, of which ranks have ended which of the iterations that are under way.

    An iteration has the same number on all ranks: that of its loader, and how many that loader has had before. Messages
    arrive on the manager's background thread; everything else happens on the trainer's.
    """

    def __init__(self, model: ManagedModel):
        self._model = weakref.ref(model)
        self._manager = model.manager
        self._open: set[int] = set()
        self._over: set[int] = set()
        self._ended: dict[int, dict[int, Message]] = {}
        self._announced: dict[int, tuple[int, ...]] = {}
        self._last_sum = 0, 0, False, np.empty(0, np.int64)
        self._answered: dict[int, set[int]] = {}
        self._clears: dict[int, int] = {}
        self._cleared: dict[int, set[tuple[int, int]]] = {}
        self._total_weight: float | None = None
        self._postponed: Following | None = None
        self._catching_up: Following | None = None
        self._interrupted: _Leg | None = None
        self._writes_to_come = 0
        self._under_way: weakref.WeakSet[Following] = weakref.WeakSet()
        self._passed_on = self._manager.on_control
        self._manager.on_control = self._receive

    def begin(self, loader: int, count: int, total_weight: float | None) -> Following:
        """Iteration `count` of loader number `loader` begins; ranks may have different numbers of batches in it.

        `total_weight` is that of the batches that some ranks have no part in, if known.
        """
        number = loader * _MOST_ITERATIONS + count
        self._open.add(number)
        following = Following(self, number, total_weight, schedulers_of(self._model().optimizers))
        self._under_way.add(following)
        return following

    def announce(self, carries: bool) -> None:
        """This rank begins a sum of dense gradients: tell the ranks that have ended and would not notice."""
        model = self._model()
        self._last_sum = model.reducer.reductions + 1, self._manager.steps, carries, self._cleared_since_sum()
        following = {peer for number in self._open for peer in list(self._ended.get(number, ()))}
        for peer in following:
            self._send_last_sum(peer, _UNASKED)
        if following:
            self._manager.transport.wake()

    def _send_last_sum(self, peer: int, iteration: int) -> None:
        """Tell `peer` of the last sum, in answer to its having ended `iteration` if that is not `_UNASKED`."""
        number, steps, carries, cleared = self._last_sum
        numbers = number, steps, int(carries), iteration
        self._manager.transport.send(peer, Message(Kind.REDUCTIONS, numbers, (cleared,)))

    def _cleared_since_sum(self) -> np.ndarray:
        """Return (number, backwards inside `no_sync` before) of the tables whose gradient was cleared since this was
        last asked, int64 `[n, 2]`.
        """
        tables = self._model().tables
        cleared = [table for table in tables if table.clears != self._clears.get(table.table.number, 0)]
        self._clears = {table.table.number: table.clears for table in tables}
        said = [(table.table.number, table.cleared_after, int(table.cleared_to_zero)) for table in cleared]
        return np.array(said, np.int64).reshape(-1, 3)

    @property
    def ranks_may_differ(self) -> bool:
        """Whether this rank is in an iteration in which ranks may have different numbers of batches."""
        return bool(self._open)

    @property
    def weight(self) -> tuple[float, float | None]:
        """This rank's weight while it follows, and that of all ranks together."""
        return 0.0, self._total_weight

    def progress(self) -> tuple[int, int]:
        """Steps that this rank has taken, and backwards that it has had or joined."""
        return self._manager.steps, self._model().reducer.backwards

    def end(self, following: Following, positions: list[float], *, follow: bool, in_step: bool = False) -> None:
        """This rank has no more batches in an iteration, or has left its loop; with `follow`, stay until all have
        ended. `in_step`: the loop is in the step of its last batch."""
        number = following.number
        self._open.discard(number)
        self._over.add(number)
        model = self._model()
        gradients = [p.grad for p in model.dense_parameters() if p.grad is not None]
        left = _NONZERO if any(bool(grad.any()) for grad in gradients) else _ZERO if gradients else _NOTHING
        steps = self._manager.steps
        reductions, scalers = model.reducer.reductions, len(model.scalers)
        numbers = (number, reductions, left, steps, int(follow), scalers, model.reducer.deferred)
        hyperparameters = [] if in_step else [hyperparameter_vector(optimizer) for optimizer in model.optimizers]
        arrays = (np.array(positions, np.float64), self._cleared_since_sum(), np.concatenate([*hyperparameters, _NONE]))
        for peer in self._manager.peers:
            self._manager.transport.send(peer, Message(Kind.END, numbers, arrays))
        self._manager.transport.wake()
        if follow:
            self._total_weight = following.total_weight
            self._follow(_Leg(following, steps, reductions, numbers[6], scalers), in_step=in_step)
        self._forget()

    def _follow(self, leg: _Leg, *, in_step: bool) -> None:
        """Follow the others until they have ended; with `in_step`, or until they write what this rank's loop, once out
        of the step in which it is, will write itself."""
        model, number = self._model(), leg.following.number
        while (done := self._follow_once(number, own_steps=leg.steps if in_step else None)) is _Done.SOMETHING:
            pass
        if done is _Done.UP_TO_A_WRITE:
            self._interrupted = leg
            return
        ended = dict(self._ended.get(number, {}))
        self._follow_to_the_end(leg.following, (leg.reductions, leg.deferred), list(ended.values()))
        self._take_over_dense_state(model, leg.steps, ended)
        leg.following.scaler_states = self._states_of_scalers(model, (leg.reductions, leg.scalers), ended)
        leg.following.hyperparameters = self._hyperparameters_of(ended, leg.steps)

    def _forget(self) -> None:
        """Forget the iterations that have ended on all ranks."""
        under_way = None if self._interrupted is None else self._interrupted.following.number
        for over in [n for n in self._over if set(list(self._ended.get(n, ()))) >= set(self._manager.peers)]:
            if over == under_way:
                continue
            self._over.discard(over)
            self._answered.pop(over, None)
            del self._ended[over]

    # Loops that take their next batch before they work on the present one

    def postpone(self, following: Following) -> None:
        """The loop has taken the end of an iteration, and has yet to work on its last batch."""
        earlier, self._postponed = self._postponed, following
        if earlier is not None:
            self.end(earlier, earlier.positions(), follow=False)

    def step_taken(self) -> None:
        """This rank has taken a step of its own."""
        if any(self._ended.get(number) for number in self._open):
            self._manager.transport.flush()  # who follows waits for it
        for following in list(self._under_way):
            following.step_taken()
        writes = self._model().joint_writes
        writes.step_taken()
        self._writes_to_come = writes.after_a_step
        self._follow_after_step()

    def written(self) -> None:
        """The loop has written to a table: that may be what it does after its last step."""
        self._writes_to_come -= 1
        if self._interrupted is not None:
            self._go_on(in_step=True)
        else:
            self._follow_after_step()

    def _follow_after_step(self) -> None:
        """Follow the others if the loop has no batch left, and has written what it writes after its steps."""
        if self._postponed is not None and self._writes_to_come <= 0 and self._postponed.iteration_is_worked_off():
            self._follow_postponed(self._postponed.positions_after_this_step(), in_step=True)

    def _go_on(self, *, in_step: bool) -> None:
        """Go on following after an interruption."""
        leg, self._interrupted = self._interrupted, None
        if leg is not None:
            self._follow(leg, in_step=in_step)
            self._forget()

    def gradient_goes(self) -> None:
        """The loop clears gradients: those of its last batches, if not stepped, the others need before."""
        if self._postponed is not None and self._postponed.gradient_was_not_stepped():
            self._follow_postponed(self._postponed.positions())

    def step_begins(self) -> None:
        """This rank is about to take a step of its own: its schedulers must have come as far as the others'."""
        self._go_on(in_step=False)
        if self._catching_up is not None:
            following, self._catching_up = self._catching_up, None
            following.catch_up()

    def finish(self) -> None:
        """Something else begins: what was postponed is due."""
        if self._postponed is not None:
            self._follow_postponed(self._postponed.positions())
        self.step_begins()

    def _follow_postponed(self, positions: list[float], *, in_step: bool = False) -> None:
        following, self._postponed = self._postponed, None
        self._catching_up = following  # later: the loop has not come to its scheduler yet
        self.end(following, positions, follow=True, in_step=in_step)

    def take_over_scalers(self, states: list[torch.Tensor]) -> None:
        """Set this rank's loss scalers to another's."""
        self._model().scalers.take_over(states)

    # On the background thread

    def _receive(self, source: int, message: Message) -> None:
        if message.kind == Kind.END:
            self._ended.setdefault(message.numbers[0], {})[source] = message
            self._send_last_sum(source, message.numbers[0])
        elif message.kind == Kind.REDUCTIONS:
            number = message.numbers[0]
            self._cleared.setdefault(number, set()).update(map(tuple, message.arrays[0].tolist()))
            self._announced[source] = max(self._announced.get(source, _NO_SUM), message.numbers[:3])
            self._answered.setdefault(message.numbers[3], set()).add(source)
        elif self._passed_on is not None:
            self._passed_on(source, message)

    # Following

    def _follow_once(self, iteration: int, own_steps: int | None) -> _Done:
        """Wait for something to do and do it.

        `own_steps`: those that this rank had taken when it came to its last, if its loop is in it still.
        """
        manager, model = self._manager, self._model()

        def all_ended() -> bool:
            return set(list(self._ended.get(iteration, ()))) | manager.closed_peers >= set(manager.peers)

        def sum_begun() -> bool:
            number, steps, _ = max(list(self._announced.values()), default=_NO_SUM)
            return number > model.reducer.reductions and steps <= manager.steps  # what was stepped before comes first

        def all_answered() -> bool:
            """A step may arrive before the sum that it follows is known here; after a rank's answer it cannot."""
            return self._answered.get(iteration, set()) | manager.closed_peers >= set(manager.peers)

        def in_own_steps() -> set[int]:
            """The ranks that take the next step with a batch of their own. What those say that follow may be here
            before what they were told (which gradients were cleared): that comes first of a rank of its own.
            """
            ended = dict(self._ended.get(iteration, {}))
            return {p for p in manager.peers if p not in ended or ended[p].numbers[3] > manager.steps}

        def in_loop() -> set[int]:
            return set(manager.peers) - set(list(self._ended.get(iteration, ())))

        periodic = model.periodic

        def checkpoint_asked() -> bool:
            return periodic is not None and periodic.meeting.others_wait

        def save_begun() -> bool:
            return model.roll_call is not None and model.roll_call.others_wait

        manager.wait_until(
            lambda: (
                checkpoint_asked()
                or save_begun()
                or all_answered()
                and (
                    sum_begun()
                    or model.combiner.begun_by_others()
                    or model.joint_writes.begun_by(in_loop())
                    or manager.step_of_others(in_own_steps()) is not None
                    or all_ended()
                )
            ),
            lambda: f"rank {self._still_busy(iteration)} to end its iteration of the loader",
        )
        if checkpoint_asked():
            periodic.meeting.decline()
        elif save_begun():
            model.roll_call.answer()
        elif sum_begun():
            self._join_sum(model)
        elif model.combiner.begun_by_others():
            model.combiner.join()
        elif model.joint_writes.begun_by(in_loop()):
            if own_steps is not None and model.joint_writes.begun_by(in_loop(), after_step=own_steps):
                return _Done.UP_TO_A_WRITE
            write_along(model)
        elif (step := manager.step_of_others(in_own_steps())) is not None:
            self._step_along(model, step)
        else:
            return _Done.ALL
        return _Done.SOMETHING

    def _still_busy(self, iteration: int) -> str:
        ended = self._ended.get(iteration, {})
        return ", ".join(str(peer) for peer in self._manager.peers if peer not in ended)

    def _join_sum(self, model: ManagedModel) -> None:
        carries = bool(max(list(self._announced.values()))[2])
        due = model.reducer.reductions + 1
        cleared = self._clear(model, self._cleared.get(due, set()))
        if cleared or not (carries and model.reducer.has_unstepped):
            for parameter in model.dense_parameters():
                parameter.grad = None  # it comes whole from the others
        self._cleared = {number: tables for number, tables in list(self._cleared.items()) if number > due}
        model.joining = True
        try:
            model.reducer.join(carries=carries)
        finally:
            model.joining = False

    def _clear(self, model: ManagedModel, cleared: set[tuple[int, int, int]]) -> bool:
        """Clear the gradients that the others have cleared, and say whether there were any: what this rank had left of
        its last batches counts no more, unless they were cleared before these. Where they left zeros
        (`zero_grad(set_to_none=False)`), so does this rank: an optimizer with momentum steps by them.
        """
        deferred = model.reducer.deferred
        to_zero = {number: bool(zero) for number, after, zero in sorted(cleared) if after >= deferred}
        for table in model.tables:
            if table.table.number in to_zero:
                table.clear_gradient(keep_zero=to_zero[table.table.number])
        return bool(to_zero)

    def _follow_to_the_end(self, following: Following, own: tuple[int, int], ends: list[Message]) -> None:
        """Do what those that ended last did after their last sum; note how far their schedulers had come.

        `own`: the sums, and the backwards inside `no_sync` since, that this rank had had when it ended.
        """
        model = self._model()
        progress = [(end.numbers[1], end.numbers[6]) for end in ends]
        furthest = max([own, *progress])
        last = [end for end, at in zip(ends, progress, strict=True) if at == furthest]
        if furthest[0] != model.reducer.reductions:
            last = []
        self._clear(model, {tuple(each) for end in last for each in end.arrays[1].tolist()})
        left = max((end.numbers[2] for end in last), default=_NONZERO)
        if left != _NONZERO:
            for parameter in model.dense_parameters():
                if left == _NOTHING:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()
        positions = [end.arrays[0].tolist() for end in ends if len(end.arrays[0]) == len(following.schedulers)]
        following.furthest = [max(each) for each in zip(*positions, strict=True)]

    def _take_over_dense_state(self, model: ManagedModel, own_steps: int, ended: dict[int, Message]) -> None:
        """Have ranks that followed steps continue from the dense state of one that took them all (collective).

        The loop may do more to gradients, between backward and step, than a rank outside its loop can know of
        (clipping, say). Without it this changes nothing. Where a rank has left its loop, nothing can be agreed on.
        """
        if set(ended) != set(self._manager.peers) or not all(end.numbers[4] for end in ended.values()):
            return
        steps = {self._manager.rank: own_steps} | {peer: end.numbers[3] for peer, end in ended.items()}
        furthest = max(steps.values())
        if min(steps.values()) == furthest:
            return
        dense = model.dense_parameters()
        tensors = list(dense)
        for optimizer in model.optimizers:
            for parameter in dense:
                state = optimizer.state.get(parameter, {})
                tensors += [state[name] for name in sorted(state) if torch.is_tensor(state[name])]
        source = min(rank for rank, taken in steps.items() if taken == furthest)
        broadcast(tensors, model.process_group, source)

    def _states_of_scalers(
        self, model: ManagedModel, own: tuple[int, int], ended: dict[int, Message]
    ) -> list[torch.Tensor]:
        """Return the states of the loss scalers of the rank that was last in its loop (collective).

        `own`: the sums that this rank had taken part in when it ended, and how many scalers it has. Nothing is
        returned where they need not or cannot be taken over.
        """
        if set(ended) != set(self._manager.peers) or not all(end.numbers[4] for end in ended.values()):
            return []
        said = {self._manager.rank: own} | {peer: (end.numbers[1], end.numbers[5]) for peer, end in ended.items()}
        reductions = {rank: each[0] for rank, each in said.items()}
        if len({each[1] for each in said.values()}) > 1 or len(set(reductions.values())) == 1:
            return []
        states = model.scalers.states()
        if states:
            broadcast(states, model.process_group, max(reductions, key=lambda rank: (reductions[rank], -rank)))
        return states

    def _hyperparameters_of(self, ended: dict[int, Message], own_steps: int) -> np.ndarray:
        """Return the hyperparameters of the rank that was last in its loop, of all optimizers; none if this one was,
        or that one's loop had yet to do what it does after a step.
        """
        last = max(ended.values(), key=lambda end: end.numbers[3], default=None)
        if last is None or last.numbers[3] <= own_steps or not last.numbers[4]:
            return _NONE
        return last.arrays[2]

    def take_over_hyperparameters(self, vector: np.ndarray) -> None:
        """Set those of this rank's optimizers to another's: schedulers, stepped in another order, round otherwise, and
        loops set rates by other means than schedulers."""
        lengths = [len(hyperparameter_vector(optimizer)) for optimizer in self._model().optimizers]
        if len(vector) == sum(lengths):
            for optimizer, part in zip(
                self._model().optimizers, np.split(vector, np.cumsum(lengths)[:-1]), strict=True
            ):
                adopt_hyperparameters(optimizer, part)

    def _step_along(self, model: ManagedModel, step: Stepped) -> None:
        """Take the step that the others take, with their hyperparameters."""
        optimizer = model.optimizers[step.optimizer]
        mine = hyperparameter_vector(optimizer)
        adopt_hyperparameters(optimizer, step.vector)
        model.joining = True
        try:
            optimizer.step()
        finally:
            model.joining = False
            adopt_hyperparameters(optimizer, mine)


class Following:
    """This rank's part in one iteration in which ranks may have different numbers of batches.

    Args:
        follower: of the model.
        number: of the iteration, the same on all ranks.
        total_weight: of the batches that some ranks have no part in, if known.
        schedulers: of the model's optimizers.

    `furthest` is how far the others' schedulers had come when they ended it, known once this rank has followed them.
    """

    def __init__(self, follower: Follower, number: int, total_weight: float | None, schedulers: list[LRScheduler]):
        self.number = number
        self.total_weight = total_weight
        self.schedulers = schedulers
        self.iteration_is_worked_off: Callable[[], bool] = lambda: True
        self.gradient_was_not_stepped: Callable[[], bool] = lambda: False
        self._follower = follower
        self._progress_at_start = follower.progress()
        self._positions_at_step: list[float] | None = None
        self._gains_after_step: list[float] | None = None
        self.furthest: list[float] = []
        self.scaler_states: list[torch.Tensor] = []
        self.hyperparameters = _NONE

    def ended(self, reason: str, *, handed_out: bool, later: bool) -> None:
        """The iteration has ended; `later` says that the loop has yet to work on a batch of it."""
        if reason == "exhausted" and later:
            self._follower.postpone(self)
            return
        # A loop that has had batches and made no step is no training: what it lacks, nobody waits for.
        trained = not handed_out or self._follower.progress() != self._progress_at_start
        self._follower.end(self, self.positions(), follow=reason == "exhausted" and trained)
        self.catch_up()

    def step_taken(self) -> None:
        """Note how far the schedulers are in a step of the loop's."""
        self._positions_at_step = self.positions()

    def batch_begun(self) -> None:
        """Note how far they have come between the step before and this batch."""
        if self._positions_at_step is not None:
            before = self._positions_at_step
            self._gains_after_step = [now - then for now, then in zip(self.positions(), before, strict=True)]
            self._positions_at_step = None

    def positions_after_this_step(self) -> list[float]:
        """Return how far the schedulers will be when the loop has done what it does after a step: it is in one, or has
        just taken it."""
        if self._gains_after_step is None or self._positions_at_step is None:
            return self.positions()
        return [then + gain for then, gain in zip(self._positions_at_step, self._gains_after_step, strict=True)]

    def catch_up(self) -> None:
        """Take the scheduler steps that the others took after this rank had left the loop, their hyperparameters, and
        their loss scale."""
        behind = list(zip(self.schedulers, self.furthest, strict=False))
        while behind:  # in turns, as loops step them: rates are rounded in that order
            behind = [each for each in behind if step_towards(*each)]
        if len(self.hyperparameters):
            self._follower.take_over_hyperparameters(self.hyperparameters)
            self.hyperparameters = _NONE
        if self.scaler_states:
            self._follower.take_over_scalers(self.scaler_states)
            self.scaler_states = []

    def positions(self) -> list[float]:
        """Return how far the schedulers are."""
        return [position_of(scheduler) for scheduler in self.schedulers]
