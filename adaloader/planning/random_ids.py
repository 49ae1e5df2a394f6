"""Random ids that a loader knows ahead: negatives drawn in the loop or the forward pass, whose rows are intended.

Each draw is a function of (seed, rank, pass, number of the batch, number of the draw within it) alone, by the
counter-based generator Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). So a planner
repeats today what the loop will draw for a later batch, a resumed run draws what the interrupted one would have drawn,
and drawing takes nothing from PyTorch's generators.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from adaloader.planning.watch import Watch

_MASK64 = (1 << 64) - 1


@dataclass(eq=False)
class Stream:
    """What the draws of one pass over one loader have in common; whether there were any, and the pass is over."""

    seed: int
    rank: int
    loader: int
    number: int
    is_drawn_from: bool = False
    is_over: bool = False

    def generator(self, batch: int, ordinal: int) -> np.random.Generator:
        """The generator of draw number `ordinal` of a batch; those of no two draws overlap."""
        key = [self.seed & _MASK64, (self.rank << 32 | self.loader) & _MASK64]
        return np.random.Generator(np.random.Philox(key=key, counter=[0, ordinal, batch & _MASK64, self.number]))


class Passes:
    """Numbers the passes over one loader; its state is saved with the loader's position once ids were drawn."""

    def __init__(self, rank: int, loader: int):
        self._rank, self._loader = rank, loader
        self._seed: int | None = None
        self._next = 0
        self._stream: Stream | None = None

    def next_pass(self) -> Stream:
        seed = torch.initial_seed() if self._seed is None else self._seed
        self._stream = Stream(seed, self._rank, self._loader, self._next)
        self._next += 1
        return self._stream

    def state(self) -> dict[str, int] | None:
        """Return what `load_state` needs, None if nothing was drawn."""
        stream = self._stream
        if stream is None or not stream.is_drawn_from:
            return None
        return {"seed": stream.seed, "pass": stream.number + stream.is_over}

    def position(self) -> dict[str, int | None]:
        """Return the pass that is under way, or comes next, whether or not ids were drawn."""
        if self._stream is None:
            return {"seed": self._seed, "pass": self._next}
        return {"seed": self._stream.seed, "pass": self._stream.number + self._stream.is_over}

    def go_on_from(self, position: dict[str, int | None]) -> None:
        """Have the next pass be the one that `position` gave."""
        self._seed, self._next = position["seed"], int(position["pass"])
        self._stream = None

    def load_state(self, state: dict[str, int] | None) -> None:
        """Have the next pass be the one that `state` was saved in."""
        if state is not None:
            self._seed, self._next = int(state["seed"]), int(state["pass"])
            self._stream = None


class _Now(threading.local):
    """Which batch this thread draws for: in the loop the one that was handed out last, in a planner the one planned."""

    stream: Stream | None = None
    batch: int = 0
    ordinal: int = 0
    watch: weakref.ref[Watch] | None = None
    replayed: tuple[Stream, int] | None = None
    is_reading: bool = False


_now = _Now()


def random_ids(
    high: int | None,
    size: int | Sequence[int],
    *,
    low: int = 0,
    weights: torch.Tensor | None = None,
    replacement: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """Return random ids in `[low, high)`, in place of `torch.randint(low, high, size)` and `torch.multinomial`.

    In a loop over a loader that manages a model, the loader knows what will be drawn, and rows looked up by these ids
    are there in time. Elsewhere, in `Dataset` and `collate_fn`, and with a `generator`, PyTorch's generator draws.

    Args:
        high: ids are below it; None for `low + len(weights)`.
        size: shape of the result; it may depend on the batch.
        low: the smallest id.
        weights: `[high - low]` or None, not negative: ids are drawn with probabilities proportional to these (a later
            change of the tensor counts).
        replacement: False to draw, along the last dimension of `size`, no id twice.
        generator: draw from this one, unknown to the loader.
        dtype: torch.int64 or torch.int32.

    Raises:
        ValueError: for an empty range, a negative size, weights that are no probabilities or are not one per id, or
            more ids than there are without replacement.
        TypeError: for another dtype.
    """
    shape = (int(size),) if hasattr(size, "__index__") else tuple(int(length) for length in size)
    if high is None and weights is not None:
        high = low + len(weights)
    _check(low, high, shape, weights, replacement, dtype)
    if generator is not None or _now.stream is None or _now.is_reading:
        return _drawn_by_pytorch(low, high, shape, weights, replacement, generator).to(dtype)
    _now.stream.is_drawn_from = True
    ordinal, _now.ordinal = _now.ordinal, _now.ordinal + 1
    made = _draw(_now.stream.generator(_now.batch, ordinal), low, high, shape, weights, replacement, dtype)
    watch = _now.watch() if _now.watch is not None else None
    if watch is not None and watch.recorder is not None:
        watch.recorder.drawn(REDRAW, ordinal, low, high, shape, weights, replacement, dtype, made)
    return made


class _Redraw:
    """Draws again, in a planner, what the loop will draw for the batch that is planned."""

    def __call__(self, offset, ordinal, low, high, size, weights, replacement, dtype) -> torch.Tensor:
        if _now.replayed is None:
            raise RuntimeError("random ids are known only for batches of a loader")
        stream, batch = _now.replayed
        _check(low, high, tuple(size), weights, replacement, dtype)
        return _draw(stream.generator(batch + offset, ordinal), low, high, tuple(size), weights, replacement, dtype)

    def __repr__(self) -> str:
        return "adaloader.random_ids"


REDRAW = _Redraw()


def batch_begins(stream: Stream, batch: int, watch: Watch) -> None:
    """The loop gets a batch: what it draws from now on is for that."""
    _now.stream, _now.batch, _now.ordinal, _now.watch = stream, batch, 0, weakref.ref(watch)


def pass_ends(stream: Stream) -> None:
    """A pass is over: what is drawn now is for no batch, unless another loader's is in hand."""
    if _now.stream is stream:
        _now.stream = None


@contextlib.contextmanager
def planning(stream: Stream, batch: int) -> Iterator[None]:
    """Programs that run inside draw what the loop will draw for `batch`."""
    _now.replayed = (stream, batch)
    try:
        yield
    finally:
        _now.replayed = None


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """What is drawn inside makes batches, rather than being drawn for one."""
    before, _now.is_reading = _now.is_reading, True
    try:
        yield
    finally:
        _now.is_reading = before


def _check(low: int, high: int | None, shape: tuple[int, ...], weights, replacement: bool, dtype: torch.dtype) -> None:
    if dtype not in (torch.int64, torch.int32):
        raise TypeError(f"random_ids gives ids of torch.int64 or torch.int32, not {dtype}")
    if high is None or high <= low:
        raise ValueError(f"random_ids needs low < high, got low={low}, high={high}")
    if any(length < 0 for length in shape):
        raise ValueError(f"random_ids got a negative size: {shape}")
    choices = high - low
    if weights is not None:
        if weights.ndim != 1 or len(weights) != choices:
            raise ValueError(f"random_ids needs one weight per id, {choices}; got weights {list(weights.shape)}")
        probable = int(np.count_nonzero(_probabilities(weights)))
        choices = choices if replacement else probable
    if not replacement and shape and shape[-1] > choices:
        raise ValueError(f"random_ids cannot draw {shape[-1]} of {choices} ids without replacement")


def _probabilities(weights: torch.Tensor) -> np.ndarray:
    values = weights.detach().cpu().numpy().astype(np.float64)
    total = values.sum()
    if not np.isfinite(total) or total <= 0 or (values < 0).any():
        raise ValueError(f"random_ids needs weights that are not negative, with a positive sum; their sum is {total}")
    return values / total


def _draw(random: np.random.Generator, low, high, shape, weights, replacement, dtype) -> torch.Tensor:
    choices = high - low
    if not replacement:
        drawn = _distinct(random, choices, shape, weights)
    elif weights is None:
        drawn = random.integers(choices, size=shape)
    else:
        bounds = np.cumsum(_probabilities(weights))
        drawn = np.searchsorted(bounds / bounds[-1], random.random(shape), side="right")
    with torch._C._DisableTorchDispatch():  # a recorder takes what comes from numpy for a constant
        return torch.from_numpy(np.asarray(drawn + low, np.int64 if dtype == torch.int64 else np.int32))


def _distinct(random: np.random.Generator, choices: int, shape: tuple[int, ...], weights) -> np.ndarray:
    """The first of exponential clocks that run as fast as the weights: sampling without replacement."""
    count = shape[-1] if shape else 1
    clocks = random.exponential(size=(*shape[:-1], choices))
    if weights is not None:
        with np.errstate(divide="ignore"):
            clocks = clocks / _probabilities(weights)
    return np.argsort(clocks, axis=-1, kind="stable")[..., :count].reshape(shape)


def _drawn_by_pytorch(low, high, shape, weights, replacement, generator) -> torch.Tensor:
    if weights is None and replacement:
        return torch.randint(low, high, shape, generator=generator)
    rates = torch.ones(high - low) if weights is None else weights.detach()
    if replacement:
        count = int(np.prod(shape))
        drawn = (
            torch.multinomial(rates, count, True, generator=generator) if count else torch.empty(0, dtype=torch.int64)
        )
    else:
        _probabilities(rates)
        clocks = torch.empty(*shape[:-1], high - low, dtype=torch.float64).exponential_(generator=generator) / rates
        drawn = clocks.argsort(-1)[..., : shape[-1] if shape else 1]
    return drawn.reshape(shape) + low
