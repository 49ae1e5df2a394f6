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
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from counters import stats_of
from ctr_data import CRITEO_ROWS, Clicks, load_criteo, make_synthetic, split
from ctr_models import MODELS
from metrics import log_loss, roc_auc
from ranks import Ranks, peak_memory_bytes
from runs import OPTIMIZERS, Epoch, Loaders, Meter, make_parser, moved, parse, report, sparse_of, summarise
from torch import nn

DEFERRED_ABOVE_BYTES = 1 << 30


def main(arguments: list[str] | None = None) -> list[Epoch]:
    """Train as the command line says; return the epochs' figures (on rank 0; NaNs elsewhere)."""
    args = read_command_line(arguments)
    ranks = Ranks(alone=args.plain)
    train, test = split(load_criteo(args.data) if args.data else make_synthetic(args.samples, args.rows, args.seed))
    model = build_model(args)
    if args.plain and args.deferred:
        train, test = keep_used_rows(model, train, test)
    model.to(args.device)
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # the order of samples must not depend on what building the model drew
    loaders = Loaders(args, model, optimizer)
    train_loader, test_loader = loaders.training(train), loaders.shared(test)

    epochs = []
    for number in loaders.epochs():
        meter = Meter(train_loader, number, show=ranks.rank == 0)
        train_epoch(meter, model, optimizer, args.device)
        scores = evaluate(test_loader, model, ranks, args.device)
        epochs.append(summarise(number, ranks.gather(meter.sums()[None]), scores))
        if ranks.rank == 0:
            print(epochs[-1], flush=True)
    memory = measure_memory(ranks, stats_of(train_loader))
    report(args, ranks, f"{args.model}, {args.rows:,} x {args.dim}", epochs, **memory)
    if args.save:
        save(args, model, ranks)
    return epochs


def build_model(args: argparse.Namespace) -> nn.Module:
    """Build the model; under `deferred_init` where the table is declared rather than built."""
    torch.manual_seed(args.seed)
    context = contextlib.nullcontext()
    if args.deferred:
        import adaloader

        min_rows = {} if args.min_rows is None else {"min_rows": args.min_rows}
        context = adaloader.deferred_init(seed=args.seed, **min_rows)
    with context:
        return MODELS[args.model](args.rows, args.dim, dropout=args.dropout, sparse=sparse_of(args))


def train_epoch(batches: Meter, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Train one epoch."""
    loss_fn = nn.BCEWithLogitsLoss()
    model.train()
    for batch in batches:
        batch = moved(batch, device)
        loss = loss_fn(model(batch["dense"], batch["sparse"]), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        batches.add(loss, len(batch["label"]))


@torch.no_grad()
def evaluate(loader: Iterable, model: nn.Module, ranks: Ranks, device: torch.device) -> dict[str, float]:
    """Collective: return the scores of the test set (on rank 0; none elsewhere)."""
    model.eval()
    found = []
    for batch in loader:
        batch = moved(batch, device)
        scores = model(batch["dense"], batch["sparse"])
        found.append(torch.stack([batch["label"], scores], dim=1).double().cpu())
    scores = ranks.gather(torch.cat(found).numpy() if found else np.empty((0, 2)))
    if ranks.rank != 0:
        return {}
    return {"test_log_loss": log_loss(scores[:, 0], scores[:, 1]), "test_auc": roc_auc(scores[:, 0], scores[:, 1])}


def measure_memory(ranks: Ranks, stats: Mapping[str, float]) -> dict[str, list[int]]:
    """Collective: return each rank's memory in bytes, in all and of rows, and print it on rank 0."""
    memory = ranks.gather(np.array([[peak_memory_bytes(), stats["memory_bytes"]]]))
    for rank, (peak, rows) in enumerate(memory):
        print(f"rank {rank}: peak memory {peak / 2**20:,.0f} MiB, of which rows {rows / 2**20:,.0f} MiB")
    return {
        "peak_memory_bytes": memory[:, 0].astype(int).tolist(),
        "row_memory_bytes": memory[:, 1].astype(int).tolist(),
    }


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
    from adaloader.deferred.context import program_of

    used, name = torch.cat([train.sparse, test.sparse]).unique(), "embedding.weight"
    program = program_of(model.embedding.weight)
    rows = np.empty((len(used), model.embedding.embedding_dim), dtype=np.float32)
    program.fill(used.numpy(), rows, seed=program.seed, name=name)
    model.embedding = nn.Embedding.from_pretrained(torch.from_numpy(rows), freeze=False, sparse=model.embedding.sparse)
    return tuple(clicks.with_ids(torch.searchsorted(used, clicks.sparse)) for clicks in (train, test))


def read_command_line(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line, and fill in what depends on other options."""
    parser = make_parser(__doc__)
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
    add("--dropout", type=float, default=0.0, help="in the dense part (%(default)s)")
    add(
        "--deferred",
        action=argparse.BooleanOptionalAction,
        help="declare the table (default: if above 1 GiB)",
    )
    add("--save", metavar="PATH", help="write the model's tensors for plain PyTorch")
    options = {"has_dtype": False, "has_device": True}
    args = parse(parser, arguments, batch_size=1024, epochs=3, lr=0.003, smaller_batch_size=128, **options)
    if args.rows is None:
        args.rows = CRITEO_ROWS if args.data else 2_600_000
    if args.deferred is None:
        args.deferred = args.rows * args.dim * 4 > DEFERRED_ABOVE_BYTES
    if args.save and args.plain and args.deferred:
        parser.error("--save with --plain needs --no-deferred: a declared table is trained with renumbered rows")
    return args


if __name__ == "__main__":
    main()
