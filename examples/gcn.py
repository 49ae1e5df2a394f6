"""Node classification with a two-layer graph convolutional network over learned node embeddings.

    python examples/gcn.py                      one process
    mpirun -n 2 python examples/gcn.py          two ranks, each with half of every global batch
    python examples/gcn.py --plain              the same in plain PyTorch, on one process

It makes a graph of communities with power-law degrees, or reads one from `--data PATH.npz` (`gcn_data.load_graph`
names the arrays). Training samples `--fan-out` neighbours per node and layer; scores are over all neighbours, so that
they are exact.
`--plain --plain-ranks N` uses the global batch of N ranks, so that its numbers can be compared with theirs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from counters import intended_lookups, stats_of
from gcn_data import Neighbourhoods, Task, as_is, load_graph, make_synthetic
from gcn_model import GCN
from gcn_sampling import Sampler
from partition import PartBatches, cut_share, partition
from ranks import Ranks
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

LAYERS = 2
OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to, over all ranks. The last two are None in plain PyTorch."""

    epoch: int
    train_loss: float
    validation_accuracy: float
    test_accuracy: float
    nodes_per_second: float
    intent_coverage: float | None
    waiting_share: float | None

    def __str__(self) -> str:
        line = (
            f"epoch {self.epoch}: train loss {self.train_loss:.5f}, validation accuracy "
            f"{self.validation_accuracy:.4f}, test accuracy {self.test_accuracy:.4f}, "
            f"{self.nodes_per_second:,.0f} nodes/s"
        )
        if self.intent_coverage is None:
            return line
        return f"{line}, intent coverage {self.intent_coverage:.4f}, waiting {self.waiting_share:.1%}"


@dataclass(frozen=True)
class Loaders:
    """The loaders of a run; call `begin_epoch(number)` before iterating over `train`."""

    train: Iterable
    validation: Iterable
    test: Iterable
    begin_epoch: Callable[[int], None]


def main(arguments: list[str] | None = None) -> list[Epoch]:
    """Train as the command line says; return the epochs' figures (on rank 0; NaNs elsewhere)."""
    args = parse(arguments)
    ranks = Ranks(alone=args.plain)
    task = load_graph(args.data, args.seed) if args.data else make_synthetic(args.nodes, args.seed)
    torch.manual_seed(args.seed)
    graph = task.graph
    model = GCN(graph.num_nodes, args.dim, args.hidden, graph.num_classes, args.dropout).to(dtype_of(args))
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # the order of nodes must not depend on what building the model drew
    loaders = make_loaders(args, task, model, optimizer, ranks)

    epochs = []
    for number in range(1, args.epochs + 1):
        loaders.begin_epoch(number)
        sums = train_epoch(loaders.train, model, optimizer, number, show=ranks.rank == 0)
        right = [evaluate(loader, model) for loader in (loaders.validation, loaders.test)]
        totals = ranks.gather(np.concatenate([sums, *right])[None])
        epochs.append(summarise(number, totals))
        if ranks.rank == 0:
            print(epochs[-1], flush=True)
    report(args, ranks, task, epochs)
    return epochs


def make_loaders(
    args: argparse.Namespace, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Loaders:
    """Build the three loaders; AdaLoader's first one takes over the model's table."""

    def nodes(of: np.ndarray, fan_out: int | None) -> Neighbourhoods:
        return Neighbourhoods(task.graph, of, Sampler(task.graph, LAYERS, fan_out, args.seed), dtype_of(args))

    make: Callable[..., Iterable] = DataLoader
    batch_size = args.batch_size * (args.plain_ranks if args.plain else 1)
    if not args.plain:
        from adaloader import AdaLoader

        settings = {} if args.min_rows is None else {"min_rows": args.min_rows}
        make = partial(AdaLoader, model=model, **settings)
    make = partial(make, collate_fn=as_is, num_workers=args.num_workers)

    train, order = nodes(task.train, args.fan_out), part_batches(args, task, ranks)
    training = {} if args.plain else {"optimizer": optimizer}
    if order is None:
        train_loader = make(train, batch_size=batch_size, shuffle=True, **training)
    else:
        if not args.plain:
            training["batch_weight"] = count_nodes
        train_loader = make(train, batch_sampler=order, **training)
    # A generator of their own, so that evaluating does not draw from the one that shuffles the training nodes.
    rest = [
        make(nodes(of, None), batch_size=batch_size, generator=torch.Generator()) for of in (task.validation, task.test)
    ]

    def begin_epoch(number: int) -> None:
        train.set_epoch(number)
        if order is not None:
            order.set_epoch(number)

    return Loaders(train_loader, *rest, begin_epoch)


def part_batches(args: argparse.Namespace, task: Task, ranks: Ranks) -> PartBatches | None:
    """With `--partition`, the order in which each rank trains the nodes of its part."""
    if not args.partition:
        return None
    parts = args.plain_ranks if args.plain else ranks.size
    part_of = partition(task.graph, task.train, parts)
    if ranks.rank == 0:
        print(f"partition: {parts} part(s), {cut_share(task.graph, part_of):.1%} of the edges are cut", flush=True)
    rank = None if args.plain else ranks.rank
    return PartBatches(part_of[task.train], args.batch_size, args.seed, parts, rank)


def count_nodes(batch: dict[str, object]) -> float:
    """What a batch counts in the average over ranks."""
    return float(len(batch["label"]))


def train_epoch(
    loader: Iterable, model: nn.Module, optimizer: torch.optim.Optimizer, number: int, show: bool
) -> np.ndarray:
    """Train one epoch; return this rank's sums, float64 [6].

    They are the loss over nodes, nodes, lookups, those of them that had been intended, seconds of waiting, and
    seconds. The first step of the run, in which keys are learned, is left out of the lookups.
    """
    model.train()
    counted_from, started = stats_of(loader), time.perf_counter()
    waited_before = counted_from["wait_seconds"]
    loss_sum, nodes = 0.0, 0
    for batch in tqdm(loader, desc=f"epoch {number}", disable=not show, leave=False, mininterval=0.5):
        loss = nn.functional.cross_entropy(model(batch), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 1 and nodes == 0:
            counted_from = stats_of(loader)
        loss_sum += loss.item() * len(batch["label"])
        nodes += len(batch["label"])
    seconds, after = time.perf_counter() - started, stats_of(loader)
    lookups = after["lookups"] - counted_from["lookups"]
    intended = intended_lookups(after) - intended_lookups(counted_from)
    return np.array([loss_sum, nodes, lookups, intended, after["wait_seconds"] - waited_before, seconds])


@torch.no_grad()
def evaluate(loader: Iterable, model: nn.Module) -> np.ndarray:
    """Return this rank's (nodes classified right, nodes), float64 [2]."""
    model.eval()
    right = nodes = 0
    for batch in loader:
        right += int((model(batch).argmax(1) == batch["label"]).sum())
        nodes += len(batch["label"])
    return np.array([right, nodes], dtype=np.float64)


def summarise(number: int, totals: np.ndarray) -> Epoch:
    """The epoch's figures from the ranks' sums [ranks, 10]; NaNs where there are none."""
    if len(totals) == 0:
        return Epoch(number, *[float("nan")] * 6)
    loss, nodes, lookups, intended, waited, _, *right = (float(total) for total in totals.sum(0))
    return Epoch(
        epoch=number,
        train_loss=loss / nodes,
        validation_accuracy=right[0] / right[1] if right[1] else float("nan"),
        test_accuracy=right[2] / right[3] if right[3] else float("nan"),
        nodes_per_second=nodes / float(totals[:, 5].max()),
        intent_coverage=intended / lookups if lookups else None,
        waiting_share=waited / float(totals[:, 5].sum()) if lookups else None,
    )


def report(args: argparse.Namespace, ranks: Ranks, task: Task, epochs: list[Epoch]) -> None:
    """Print the last line of figures, and write `--json`, on rank 0."""
    if ranks.rank != 0:
        return
    graph = task.graph
    print(
        f"gcn, {args.optimizer}, {graph.num_nodes:,} nodes x {args.dim}, {len(graph.neighbours) // 2:,} edges, "
        f"{ranks.size} rank(s), {epochs[-1]}",
        flush=True,
    )
    if args.json:
        figures = {
            "arguments": vars(args),
            "ranks": ranks.size,
            "epochs": [asdict(epoch) for epoch in epochs],
            "nodes": {name: len(getattr(task, name)) for name in ("train", "validation", "test")},
        }
        Path(args.json).write_text(json.dumps(figures, indent=2, default=str) + "\n")


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """The floating type of the model and of edge weights."""
    return torch.float64 if args.dtype == "float64" else torch.float32


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="PATH.npz", help="a graph to read; default: one that the program makes")
    add("--nodes", type=int, default=50_000, help="nodes of the graph that it makes (%(default)s)")
    add("--dim", type=int, default=64, help="floats in a node's embedding (%(default)s)")
    add("--hidden", type=int, default=64, help="width of the hidden layer (%(default)s)")
    add("--fan-out", type=int, default=10, help="neighbours sampled per node and layer (%(default)s)")
    add("--batch-size", type=int, default=256, help="nodes per rank and step (%(default)s)")
    add("--epochs", type=int, default=5)
    add("--lr", type=float, default=0.05)
    add("--optimizer", choices=sorted(OPTIMIZERS), default="adagrad")
    add("--dropout", type=float, default=0.0, help="after the first layer (%(default)s)")
    add("--partition", action="store_true", help="each rank trains the nodes of its own part of the graph")
    add("--dtype", choices=("float32", "float64"), default="float32", help="(%(default)s)")
    add("--num-workers", type=int, default=0, help="worker processes of each loader (%(default)s)")
    add("--min-rows", type=int, help="manage tables with at least so many rows (the loader's default)")
    add("--plain", action="store_true", help="plain PyTorch, one process")
    add("--plain-ranks", type=int, default=1, help="with --plain: the global batch of so many ranks")
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH", help="write the figures")
    args = parser.parse_args(arguments)
    for name in ("epochs", "fan_out", "batch_size", "plain_ranks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")
    return args


if __name__ == "__main__":
    main()
