"""What the embedding examples share: their command line, their loaders, and the figures of an epoch."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counters import intended_lookups, stats_of
from ranks import Ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}
TECHNIQUES = ("all", "relocation", "replication", "none")


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to, over all ranks (NaNs on ranks other than 0). Coverage and waiting are None in plain
    PyTorch.
    """

    epoch: int
    train_loss: float
    scores: Mapping[str, float]
    samples_per_second: float
    intent_coverage: float | None
    waiting_share: float | None

    def figures(self) -> dict[str, float | None]:
        """All of it in one flat dict, the scores by their names."""
        fields = dict(vars(self))
        return {"epoch": fields.pop("epoch"), "train_loss": fields.pop("train_loss"), **fields.pop("scores"), **fields}

    def __str__(self) -> str:
        scores = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in self.scores.items())
        line = f"epoch {self.epoch}: train loss {self.train_loss:.5f}{scores}, {self.samples_per_second:,.0f} samples/s"
        if self.intent_coverage is None:
            return line
        return f"{line}, intent coverage {self.intent_coverage:.4f}, waiting {self.waiting_share:.1%}"


class Meter:
    """Counts a training epoch: iterate over it in place of the loader, and `add` each batch's loss."""

    def __init__(self, loader: Iterable, number: int, show: bool):
        self._loader, self._number, self._show = loader, number, show
        self._loss = self._seconds = 0.0
        self._samples = 0
        self._from = self._waited_from = self._to = stats_of(loader)

    def __iter__(self) -> Iterator:
        started = time.perf_counter()
        yield from tqdm(
            self._loader, desc=f"epoch {self._number}", disable=not self._show, leave=False, mininterval=0.5
        )
        self._seconds = time.perf_counter() - started
        self._to = stats_of(self._loader)  # an evaluation that follows looks rows up, and waits for them, too

    def add(self, loss: torch.Tensor, samples: int) -> None:
        """A step is over: its loss, a mean over so many samples."""
        if self._number == 1 and self._samples == 0:
            self._from = stats_of(self._loader)  # keys are learned in the first step of a run: it is left out
        self._loss += loss.item() * samples
        self._samples += samples

    def sums(self) -> np.ndarray:
        """This rank's loss over samples, samples, lookups, those that had been intended, seconds of waiting, and
        seconds: float64 [6]. Of the epoch that has ended.
        """
        after = self._to
        lookups = after["lookups"] - self._from["lookups"]
        intended = intended_lookups(after) - intended_lookups(self._from)
        waited = after["wait_seconds"] - self._waited_from["wait_seconds"]
        return np.array([self._loss, self._samples, lookups, intended, waited, self._seconds])


class Loaders:
    """Makes the loaders of a run: AdaLoader's, or with `--plain` PyTorch's own."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer):
        self._args, self._model, self._optimizer, self._plain = args, model, optimizer, args.plain
        self._epoch = 1
        self._batch_size = args.batch_size * (args.plain_ranks if args.plain else 1)
        self._num_workers = args.num_workers
        given = {name: getattr(args, name) for name in ("min_rows", "lookahead", "techniques")}
        given["device_cache_bytes"] = getattr(args, "device_cache_bytes", None)
        self._settings = {name: value for name, value in given.items() if value is not None}
        if not args.plain:
            self._settings["staleness"] = args.staleness

    def training(self, dataset: Dataset) -> Iterable:
        """Make the loader to train with, which takes over the model's tables; batches are shuffled, and shared out."""
        training = {} if self._plain else {"optimizer": self._optimizer}
        return self._kept(self._make(dataset, batch_size=self._batch_size, shuffle=True, **training))

    def training_in_order(self, dataset: Dataset, order: Sampler, batch_weight: Callable[[Any], float]) -> Iterable:
        """Make the loader to train with, of batches of each rank's own, which count as `batch_weight` says."""
        training = {} if self._plain else {"optimizer": self._optimizer, "batch_weight": batch_weight}
        return self._kept(self._make(dataset, batch_sampler=order, **training))

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the epochs, from 1 or, in a run that is resumed, from the one that it was in."""
        for number in range(self._epoch, self._args.epochs + 1):
            self._epoch = number
            yield number

    def _kept(self, loader: Iterable) -> Iterable:
        """Have checkpoints of the run made, and go on from the last one, as the command line says."""
        folder = self._args.checkpoint_dir
        if folder is None:
            return loader
        import adaloader

        if self._args.resume and any(Path(folder).glob("step-*/index.json")):
            restored = adaloader.load(folder, loader)
            self._epoch = min(restored["epoch"], self._args.epochs)
            print(f"resumed from {restored.path}, in epoch {self._epoch}", flush=True)
        loader.checkpoint(folder, every_steps=self._args.checkpoint_steps, extra=lambda: {"epoch": self._epoch})
        return loader

    def shared(self, dataset: Dataset, batch_size: int | None = None) -> Iterable:
        """Make a loader that shares the samples out among the ranks, in order, for evaluating.

        `batch_size` is that of training if not given.
        """
        # A generator of its own, so that evaluating does not draw from the one that shuffles the training data.
        return self._make(dataset, batch_size=batch_size or self._batch_size, generator=torch.Generator())

    def repeated(self, batches: list) -> Iterable:
        """Make a loader that gives each rank all of `batches`."""
        if self._plain:
            return batches
        from adaloader import AdaLoader

        return AdaLoader.wrap(batches, model=self._model, **self._settings)

    @property
    def _make(self) -> Callable[..., Iterable]:
        shared = {"collate_fn": as_is, "num_workers": self._num_workers}
        if self._plain:
            return partial(DataLoader, **shared)
        from adaloader import AdaLoader

        return partial(AdaLoader, model=self._model, **shared, **self._settings)


def as_is(batch: object) -> object:
    """Collate function for a dataset that returns batches whole."""
    return batch


def summarise(number: int, sums: np.ndarray, scores: Mapping[str, float]) -> Epoch:
    """The epoch's figures from the ranks' `Meter.sums` [ranks, 6] and the scores; NaNs where there are none."""
    if len(sums) == 0:
        return Epoch(number, float("nan"), {}, *[float("nan")] * 3)
    loss, samples, lookups, intended, waited, _ = (float(total) for total in sums.sum(0))
    return Epoch(
        epoch=number,
        train_loss=loss / samples if samples else float("nan"),
        scores=scores,
        samples_per_second=samples / float(sums[:, 5].max()),
        intent_coverage=intended / lookups if lookups else None,
        waiting_share=waited / float(sums[:, 5].sum()) if lookups else None,
    )


def report(args: argparse.Namespace, ranks: Ranks, what: str, epochs: list[Epoch], **more: object) -> None:
    """Print the last line of figures, and write `--json` with `more` figures, on rank 0."""
    if ranks.rank != 0:
        return
    print(f"{what}, {args.optimizer}, {ranks.size} rank(s), {epochs[-1]}", flush=True)
    if args.json:
        figures = {
            "arguments": vars(args),
            "ranks": ranks.size,
            "epochs": [epoch.figures() for epoch in epochs],
            **more,
        }
        Path(args.json).write_text(json.dumps(figures, indent=2, default=str) + "\n")


def device(text: str) -> torch.device:
    """Read `--device`: where the model and its batches are."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: give cpu, cuda or cuda:1, say") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r}: this PyTorch ({torch.__version__}) sees no CUDA device here")
    return found


def moved(batch: Any, to: torch.device) -> Any:
    """Return a batch with its tensors on a device, in whatever dicts, lists and tuples they are."""
    if isinstance(batch, torch.Tensor):
        return batch.to(to, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: moved(part, to) for name, part in batch.items()}
    return type(batch)(moved(part, to) for part in batch) if isinstance(batch, (list, tuple)) else batch


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """The floating type of the model."""
    return torch.float64 if args.dtype == "float64" else torch.float32


def sparse_of(args: argparse.Namespace) -> bool:
    """Whether the gradients of tables are sparse tensors: in plain PyTorch, where the optimizer takes them."""
    return args.plain and args.optimizer != "adam"


def staleness(text: str) -> int | None:
    """Read `--staleness`: a number of steps, or `none`."""
    if text.lower() == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, 0 or more, and not none")
    return int(text)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for an example's own options; `parse` adds those that all have."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    *,
    batch_size: int,
    epochs: int,
    lr: float,
    at_least_1: tuple[str, ...] = (),
    smaller_batch_size: int | None = None,
    has_dtype: bool = True,
    has_device: bool = False,
) -> argparse.Namespace:
    """Read the command line: the options that `parser` has, and those of all examples with these defaults.

    Those named in `at_least_1` are refused below 1. With `--data`, the default of `--batch-size` is
    `smaller_batch_size`, if there is one. Without `has_dtype`, there is no `--dtype`; with `has_device`, there is
    `--device`.
    """
    add = parser.add_argument
    also = f"; with --data, which is small, {smaller_batch_size}" if smaller_batch_size else ""
    add("--batch-size", type=int, help=f"samples per rank and step ({batch_size}{also})")
    add("--epochs", type=int, default=epochs, help="(%(default)s)")
    add("--lr", type=float, default=lr, help="(%(default)s)")
    add("--optimizer", choices=sorted(OPTIMIZERS), default="adagrad", help="(%(default)s)")
    if has_dtype:
        add("--dtype", choices=("float32", "float64"), default="float32", help="(%(default)s)")
    if has_device:
        add("--device", type=device, default="cpu", help="where the model is: cpu, cuda, cuda:1 (%(default)s)")
        add("--device-cache-bytes", type=int, help="memory there for rows (the loader's default)")
    add(
        "--staleness",
        type=staleness,
        default=0,
        metavar="STEPS",
        help="0: exact; a number of steps that a rank may be behind the others' updates; none: no bound (%(default)s)",
    )
    add("--techniques", choices=TECHNIQUES, help="how rows may get to the ranks (the loader's default: all)")
    add("--lookahead", type=int, help="batches to read ahead (the loader's default)")
    add("--num-workers", type=int, default=0, help="worker processes of each loader (%(default)s)")
    add("--min-rows", type=int, help="manage tables with at least so many rows (the loader's default)")
    add("--plain", action="store_true", help="plain PyTorch, one process")
    add("--plain-ranks", type=int, default=1, help="with --plain: the global batch of so many ranks")
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH", help="write the figures")
    add("--checkpoint-dir", metavar="DIR", help="make checkpoints there; SIGTERM, SIGUSR1 and Ctrl-C end with one")
    add("--checkpoint-steps", type=int, default=200, metavar="N", help="steps from one to the next (%(default)s)")
    add("--resume", action="store_true", help="go on from the newest there, if any, on however many ranks")
    args = parser.parse_args(arguments)
    if args.batch_size is None:
        args.batch_size = smaller_batch_size if smaller_batch_size and args.data else batch_size
    if args.checkpoint_dir and args.plain:
        parser.error("--checkpoint-dir is for runs without --plain: plain PyTorch has its own")
    if args.resume and not args.checkpoint_dir:
        parser.error("--resume needs --checkpoint-dir, to say where from")
    for name in ("epochs", "batch_size", "plain_ranks", "checkpoint_steps", *at_least_1):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")
    return args
