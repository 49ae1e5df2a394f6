"""Whether ranks took the same step: the same optimizer with the same hyperparameters, and for the same batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pm.waiting import PeerError

BatchRange = tuple[int, int, int]
"""Batches that a step may be for: (of which loader, first, last)."""
ANY_BATCH: BatchRange = (-1, 0, 0)
"""Nothing is said of the batches of a step."""


class Stepped(NamedTuple):
    """What a rank says of a step that it takes; it travels as these numbers and this array.

    `vector` are the hyperparameters of the `optimizer` as float64; nan equals nan.
    """

    optimizer: int = 0
    vector: np.ndarray = np.empty(0)
    batches: BatchRange = ANY_BATCH

    @classmethod
    def received(cls, optimizer: int, *batches: int, vector: np.ndarray) -> Stepped:
        return cls(optimizer, vector, batches)

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.optimizer, *self.batches


UNSAID = Stepped()
"""Of a rank that takes all its steps alike, whatever they are for."""


def check_same_step(
    step: int, rank: int, stepped: Mapping[int, Stepped], describe: Callable[[int, int], str] | None
) -> None:
    """Raise PeerError, naming value and ranks, unless all stepped the same optimizer with the same hyperparameters, and
    may have done so for the same batch.

    Args:
        step: number of the step.
        rank: this rank.
        stepped: what each rank said, by rank.
        describe: names the hyperparameter (optimizer, position in the vector).
    """
    mine = stepped[rank]
    if any(each.optimizer != mine.optimizer for each in stepped.values()):
        optimizers = ", ".join(f"rank {r}: optimizer {each.optimizer}" for r, each in sorted(stepped.items()))
        raise PeerError(f"step {step}: ranks stepped different optimizers: {optimizers}")
    if len({each.batches for each in stepped.values()}) > 1:
        _check_same_batch(step, stepped)
    as_bytes = mine.vector.tobytes()
    for each in stepped.values():
        if each.vector.tobytes() != as_bytes:  # the same nearly always, which this tells in a sixth of the time
            _check_same_vector(step, rank, stepped, describe)


def _check_same_batch(step: int, stepped: Mapping[int, Stepped]) -> None:
    known = [each.batches for each in stepped.values() if each.batches != ANY_BATCH]
    for loader in {batches[0] for batches in known}:
        of_loader = [batches for batches in known if batches[0] == loader]
        if max(first for _, first, _ in of_loader) > min(last for _, _, last in of_loader):
            raise PeerError(
                f"step {step}: ranks train on different batches: {_by_batches(stepped)}. Ranks that share each batch "
                "leave a loop early, or pass over a batch, all or none: decide it from a number that all have (an "
                "all-reduce), or give each rank batches of its own (AdaLoader.wrap)"
            )


def _check_same_vector(
    step: int, rank: int, stepped: Mapping[int, Stepped], describe: Callable[[int, int], str] | None
) -> None:
    mine = stepped[rank].vector
    for other, each in sorted(stepped.items()):
        if len(each.vector) != len(mine):
            raise PeerError(f"step {step}: ranks {rank} and {other} step an optimizer with different groups")
    vectors = np.stack([each.vector for each in stepped.values()])
    differ = np.flatnonzero(~((vectors == mine) | (np.isnan(vectors) & np.isnan(mine))).all(0))
    if len(differ):
        at = int(differ[0])
        name = f"hyperparameter {at}" if describe is None else describe(stepped[rank].optimizer, at)
        values = _by_value({r: repr(float(each.vector[at])) for r, each in stepped.items()})
        raise PeerError(f"step {step}: ranks disagree on {name}: {values}")


def _by_batches(stepped: Mapping[int, Stepped]) -> str:
    def name(batches: BatchRange) -> str:
        _, first, last = batches
        if batches == ANY_BATCH:
            return "unknown ones"
        return f"number {first}" if first == last else f"one of numbers {first} to {last}"

    return _by_value({rank: name(each.batches) for rank, each in stepped.items()})


def _by_value(values: Mapping[int, str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in sorted(values.items()):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on rank {', '.join(map(str, of))}" for value, of in ranks.items())
