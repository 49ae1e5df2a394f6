"""Matrix factorisation on a sparse matrix whose rows and columns follow Zipf's law.

    python examples/mf.py                      one process
    mpirun -n 2 python examples/mf.py          two ranks, each with half of every global batch
    python examples/mf.py --plain              the same in plain PyTorch, on one process

It makes a matrix with planted factors, or reads one from `--data PATH.npz` (`mf_data.load_matrix` names the arrays).
The score is the root mean squared error on a tenth of the entries, held out; with the matrix that it makes, predicting
0 scores about 1, and 0.1 is the noise.
`--plain --plain-ranks N` uses the global batch of N ranks, so that its numbers can be compared with theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np
import torch
from mf_data import Entries, load_matrix, make_synthetic, split
from mf_model import Factors
from ranks import Ranks
from runs import OPTIMIZERS, Epoch, Loaders, Meter, dtype_of, make_parser, parse, report, sparse_of, summarise

EVALUATION_BATCH = 8192


def main(arguments: list[str] | None = None) -> list[Epoch]:
    """Train as the command line says; return the epochs' figures (on rank 0; NaNs elsewhere)."""
    args = read_command_line(arguments)
    ranks = Ranks(alone=args.plain)
    entries = read_entries(args)
    train, held_out = split(entries, args.seed)
    torch.manual_seed(args.seed)
    model = Factors(entries.shape, args.dim, args.penalty, sparse=sparse_of(args))
    model = model.to(dtype_of(args))
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # the order of samples must not depend on what building the model drew
    loaders = Loaders(args, model, optimizer)
    train_loader = loaders.training(train)
    held_out_loader = loaders.shared(held_out, EVALUATION_BATCH)

    epochs = []
    for number in loaders.epochs():
        meter = Meter(train_loader, number, show=ranks.rank == 0)
        train_epoch(meter, model, optimizer)
        scores = evaluate(held_out_loader, model, ranks)
        epochs.append(summarise(number, ranks.gather(meter.sums()[None]), scores))
        if ranks.rank == 0:
            print(epochs[-1], flush=True)
    rows, columns = entries.shape
    report(args, ranks, f"mf, {rows:,} x {columns:,}, {len(entries):,} entries, dim {args.dim}", epochs)
    return epochs


def train_epoch(batches: Meter, model: Factors, optimizer: torch.optim.Optimizer) -> None:
    """Train one epoch."""
    model.train()
    for batch in batches:
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        batches.add(loss, len(batch["value"]))


@torch.no_grad()
def evaluate(loader: Iterable, model: Factors, ranks: Ranks) -> dict[str, float]:
    """Collective: return the root mean squared error on the held-out entries."""
    model.eval()
    squares, count = 0.0, 0
    for batch in loader:
        errors, _ = model(batch)
        squares += float((errors.double() ** 2).sum())
        count += len(errors)
    squares, count = ranks.gather(np.array([[squares, count]])).sum(0)
    return {"test_rmse": float(np.sqrt(squares / count)) if count else float("nan")}


def read_entries(args: argparse.Namespace) -> Entries:
    """Read the matrix, or make it; values are of the model's floating type."""
    if args.data:
        return load_matrix(args.data).to(dtype_of(args))
    return make_synthetic(args.rows, args.columns, args.entries, args.seed).to(dtype_of(args))


def read_command_line(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="PATH.npz", help="a matrix to read; default: one that the program makes")
    add("--rows", type=int, default=10_000, help="rows of the matrix that it makes (%(default)s)")
    add("--columns", type=int, default=1_000, help="columns of it (%(default)s)")
    add("--entries", type=int, default=1_000_000, help="entries drawn; those drawn twice count once (%(default)s)")
    add("--dim", type=int, default=8, help="numbers in a factor (%(default)s)")
    add("--penalty", type=float, default=0.03, help="of squared factors, per entry (%(default)s)")
    return parse(parser, arguments, batch_size=1024, epochs=5, lr=0.3, at_least_1=("dim",))


if __name__ == "__main__":
    main()
