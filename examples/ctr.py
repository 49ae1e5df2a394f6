"""Click-through prediction with Wide & Deep or DLRM.

    python examples/ctr.py                      one process
    mpirun -n 2 python examples/ctr.py          two ranks, each with half of every global batch
    python examples/ctr.py --plain              the same in plain PyTorch, on one process

It makes click logs with a planted signal, or reads the Criteo sample from `--data DIR`
(`ctr_data.load_criteo` names the files).
`--plain --plain-ranks N` uses the global batch of N ranks, so that its numbers can be compared with theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from counters import intended_lookups, stats_of
from ctr_data import CRITEO_ROWS, Clicks, as_is, load_criteo, make_synthetic, split
from ctr_models import MODELS
from metrics import log_loss, roc_auc
from ranks import Ranks, peak_memory_bytes
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

DEFERRED_ABOVE_BYTES = 1 << 30
OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to, over all ranks. The last two are None in plain PyTorch."""

    epoch: int
    train_loss: float
    test_log_loss: float
    test_auc: float
    samples_per_second: float
    intent_coverage: float | None
    waiting_share: float | None

    def __str__(self) -> str:
        line = (
            f"epoch {self.epoch}: train loss {self.train_loss:.5f}, test log loss {self.test_log_loss:.5f}, "
            f"test AUC {self.test_auc:.4f}, {self.samples_per_second:,.0f} samples/s"
        )
        if self.intent_coverage is None:
            return line
        return f"{line}, intent coverage {self.intent_coverage:.4f}, waiting {self.waiting_share:.1%}"


def main(arguments: list[str] | None = None) -> list[Epoch]:
    """Train as the command line says; return the epochs' figures (on rank 0; NaNs elsewhere)."""
    args = parse(arguments)
    ranks = Ranks(alone=args.plain)
    train, test = split(load_criteo(args.data) if args.data else make_synthetic(args.samples, args.rows, args.seed))
    model = build_model(args)
    if args.plain and args.deferred:
        train, test = keep_used_rows(model, train, test)
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # the order of samples must not depend on what building the model drew
    make_loaders = plain_loaders if args.plain else managed_loaders
    train_loader, test_loader = make_loaders(args, train, test, model, optimizer)

    epochs = []
    for number in range(1, args.epochs + 1):
        sums = train_epoch(train_loader, model, optimizer, number, show=ranks.rank == 0)
        scores = evaluate(test_loader, model)
        epochs.append(summarise(number, ranks.gather(sums[None]), ranks.gather(scores)))
        if ranks.rank == 0:
            print(epochs[-1], flush=True)
    report(args, ranks, epochs, stats_of(train_loader))
    if args.save:
        save(args, model, ranks)
    return epochs


def build_model(args: argparse.Namespace) -> nn.Module:
    """Build the model; under `deferred_init` where the table is declared rather than built."""
    torch.manual_seed(args.seed)
    context = contextlib.nullcontext()
    if args.deferred:
        import adaloader

        context = adaloader.deferred_init(seed=args.seed, **min_rows_of(args))
    with context:
        return MODELS[args.model](args.rows, args.dim, dropout=args.dropout, sparse=args.plain)


def managed_loaders(
    args: argparse.Namespace, train: Clicks, test: Clicks, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Iterable, Iterable]:
    """Loaders for training and for evaluation; constructing the first one takes over the model's table."""
    from adaloader import AdaLoader

    settings = dict(batch_size=args.batch_size, collate_fn=as_is, num_workers=args.num_workers, model=model)
    settings |= min_rows_of(args)
    if args.lookahead is not None:
        settings["lookahead"] = args.lookahead
    train_loader = AdaLoader(train, shuffle=True, optimizer=optimizer, **settings)
    # A generator of its own, so that evaluating does not draw from the one that shuffles the training data.
    return train_loader, AdaLoader(test, generator=torch.Generator(), **settings)


def plain_loaders(
    args: argparse.Namespace, train: Clicks, test: Clicks, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Iterable, Iterable]:
    """PyTorch's own loaders with the global batch of `--plain-ranks` ranks."""
    settings = dict(batch_size=args.batch_size * args.plain_ranks, collate_fn=as_is, num_workers=args.num_workers)
    return DataLoader(train, shuffle=True, **settings), DataLoader(test, generator=torch.Generator(), **settings)


def train_epoch(
    loader: Iterable, model: nn.Module, optimizer: torch.optim.Optimizer, number: int, show: bool
) -> np.ndarray:
    """Train one epoch; return this rank's sums, float64 [6].

    They are the loss over samples, samples, lookups, those of them that had been intended, seconds of
    waiting, and seconds. The first step of the run, in which keys are learned, is left out of the lookups.
    """
    loss_fn = nn.BCEWithLogitsLoss()
    model.train()
    counted_from, started = stats_of(loader), time.perf_counter()
    waited_before = counted_from["wait_seconds"]
    loss_sum, samples = 0.0, 0
    for batch in tqdm(loader, desc=f"epoch {number}", disable=not show, leave=False, mininterval=0.5):
        loss = loss_fn(model(batch["dense"], batch["sparse"]), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 1 and samples == 0:
            counted_from = stats_of(loader)
        loss_sum += loss.item() * len(batch["label"])
        samples += len(batch["label"])
    seconds, after = time.perf_counter() - started, stats_of(loader)
    lookups = after["lookups"] - counted_from["lookups"]
    intended = intended_lookups(after) - intended_lookups(counted_from)
    return np.array([loss_sum, samples, lookups, intended, after["wait_seconds"] - waited_before, seconds])


@torch.no_grad()
def evaluate(loader: Iterable, model: nn.Module) -> np.ndarray:
    """Return (label, logit) of this rank's share of the test set, float64 [n, 2]."""
    model.eval()
    scores = [torch.stack([batch["label"], model(batch["dense"], batch["sparse"])], dim=1).double() for batch in loader]
    return torch.cat(scores).numpy() if scores else np.empty((0, 2))


def summarise(number: int, sums: np.ndarray, scores: np.ndarray) -> Epoch:
    """The epoch's figures from the ranks' sums [ranks, 6] and scores [n, 2]; NaNs where there are none."""
    if len(sums) == 0:
        return Epoch(number, *[float("nan")] * 6)
    loss, samples, lookups, intended, waited, _ = (float(total) for total in sums.sum(0))
    return Epoch(
        epoch=number,
        train_loss=loss / samples,
        test_log_loss=log_loss(scores[:, 0], scores[:, 1]),
        test_auc=roc_auc(scores[:, 0], scores[:, 1]),
        samples_per_second=samples / float(sums[:, 5].max()),
        intent_coverage=intended / lookups if lookups else None,
        waiting_share=waited / float(sums[:, 5].sum()) if lookups else None,
    )


def report(args: argparse.Namespace, ranks: Ranks, epochs: list[Epoch], stats: Mapping[str, float]) -> None:
    """Collective: print each rank's memory and the last line of figures, and write `--json`, on rank 0."""
    memory = ranks.gather(np.array([[peak_memory_bytes(), stats["memory_bytes"]]]))
    if ranks.rank != 0:
        return
    for rank, (peak, rows) in enumerate(memory):
        print(f"rank {rank}: peak memory {peak / 2**20:,.0f} MiB, of which rows {rows / 2**20:,.0f} MiB")
    print(
        f"{args.model}, {args.optimizer}, {args.rows:,} x {args.dim}, {ranks.size} rank(s), {epochs[-1]}",
        flush=True,
    )
    if args.json:
        figures = {
            "arguments": vars(args),
            "ranks": ranks.size,
            "epochs": [asdict(epoch) for epoch in epochs],
            "peak_memory_bytes": memory[:, 0].astype(int).tolist(),
            "row_memory_bytes": memory[:, 1].astype(int).tolist(),
        }
        Path(args.json).write_text(json.dumps(figures, indent=2, default=str) + "\n")


def save(args: argparse.Namespace, model: nn.Module, ranks: Ranks) -> None:
    """Collective: write the whole model as plain tensors, which `load_state_dict` takes in plain PyTorch."""
    if args.plain:
        state = model.state_dict()
    else:
        import adaloader

        state = adaloader.full_state_dict(model)
    if ranks.rank == 0:
        torch.save(dict(state), args.save)


def keep_used_rows(model: nn.Module, train: Clicks, test: Clicks) -> tuple[Clicks, Clicks]:
    """Make the declared table of a plain model a small real one: the rows that occur in the data, renumbered.

    The rows start as they would in the declared table, so that plain PyTorch can be compared with a table
    that it could not build.
    """
    from adaloader.deferred import program_of

    used, name = torch.cat([train.sparse, test.sparse]).unique(), "embedding.weight"
    program = program_of(model.embedding.weight)
    rows = np.empty((len(used), model.embedding.embedding_dim), dtype=np.float32)
    program.fill(used.numpy(), rows, seed=program.seed, name=name)
    model.embedding = nn.Embedding.from_pretrained(torch.from_numpy(rows), freeze=False, sparse=True)
    return tuple(clicks.with_ids(torch.searchsorted(used, clicks.sparse)) for clicks in (train, test))


def min_rows_of(args: argparse.Namespace) -> dict[str, int]:
    """The keyword `min_rows`, where it was given."""
    return {} if args.min_rows is None else {"min_rows": args.min_rows}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line, and fill in what depends on other options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="wdl")
    add("--data", metavar="DIR", help="folder with the Criteo sample; default: data that the program makes")
    add(
        "--samples",
        type=int,
        default=200_000,
        help="samples to make, the last tenth for the test (%(default)s)",
    )
    add("--rows", type=int, help="rows of the table (2,600,000; with --data 33,762,588)")
    add("--dim", type=int, default=128, help="floats in a row (%(default)s)")
    add("--batch-size", type=int, help="samples per rank and step (1024; with --data, which is small, 128)")
    add("--epochs", type=int, default=3)
    add("--lr", type=float, default=0.003)
    add("--optimizer", choices=sorted(OPTIMIZERS), default="adagrad")
    add("--dropout", type=float, default=0.0, help="in the dense part (%(default)s)")
    add("--lookahead", type=int, help="batches to read ahead (the loader's default)")
    add("--num-workers", type=int, default=0, help="worker processes of the loader (%(default)s)")
    add("--min-rows", type=int, help="manage tables with at least so many rows (the loader's default)")
    add(
        "--deferred",
        action=argparse.BooleanOptionalAction,
        help="declare the table (default: if above 1 GiB)",
    )
    add("--plain", action="store_true", help="plain PyTorch, one process")
    add("--plain-ranks", type=int, default=1, help="with --plain: the global batch of so many ranks")
    add("--seed", type=int, default=0)
    add("--save", metavar="PATH", help="write the model's tensors for plain PyTorch")
    add("--json", metavar="PATH", help="write the figures")
    args = parser.parse_args(arguments)
    if args.rows is None:
        args.rows = CRITEO_ROWS if args.data else 2_600_000
    if args.batch_size is None:
        args.batch_size = 128 if args.data else 1024
    if args.deferred is None:
        args.deferred = args.rows * args.dim * 4 > DEFERRED_ABOVE_BYTES
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: train at least 1")
    if args.save and args.plain and args.deferred:
        parser.error("--save with --plain needs --no-deferred: a declared table is trained with renumbered rows")
    return args


if __name__ == "__main__":
    main()
