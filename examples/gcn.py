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
from collections.abc import Iterable

import numpy as np
import torch
from gcn_data import Neighbourhoods, Task, load_graph, make_synthetic
from gcn_model import GCN
from gcn_sampling import Sampler
from partition import PartBatches, cut_share, partition
from ranks import Ranks
from runs import OPTIMIZERS, Epoch, Loaders, Meter, dtype_of, make_parser, moved, parse, report, summarise
from torch import nn

LAYERS = 2


def main(arguments: list[str] | None = None) -> list[Epoch]:
    """Train as the command line says; return the epochs' figures (on rank 0; NaNs elsewhere)."""
    args = read_command_line(arguments)
    ranks = Ranks(alone=args.plain)
    task = load_graph(args.data, args.seed) if args.data else make_synthetic(args.nodes, args.seed)
    torch.manual_seed(args.seed)
    graph = task.graph
    model = GCN(graph.num_nodes, args.dim, args.hidden, graph.num_classes, args.dropout).to(args.device, dtype_of(args))
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # the order of nodes must not depend on what building the model drew
    train, validation, test = (
        Neighbourhoods(graph, of, Sampler(graph, LAYERS, fan_out, args.seed), dtype_of(args))
        for of, fan_out in ((task.train, args.fan_out), (task.validation, None), (task.test, None))
    )
    loaders, order = Loaders(args, model, optimizer), part_batches(args, task, ranks)
    if order is None:
        train_loader = loaders.training(train)
    else:
        train_loader = loaders.training_in_order(train, order, count_nodes)
    validation_loader, test_loader = loaders.shared(validation), loaders.shared(test)

    epochs = []
    for number in loaders.epochs():
        train.set_epoch(number)
        if order is not None:
            order.set_epoch(number)
        meter = Meter(train_loader, number, show=ranks.rank == 0)
        train_epoch(meter, model, optimizer, args.device)
        scores = {
            "validation_accuracy": accuracy(validation_loader, model, ranks, args.device),
            "test_accuracy": accuracy(test_loader, model, ranks, args.device),
        }
        epochs.append(summarise(number, ranks.gather(meter.sums()[None]), scores))
        if ranks.rank == 0:
            print(epochs[-1], flush=True)
    nodes = {name: len(getattr(task, name)) for name in ("train", "validation", "test")}
    what = f"gcn, {graph.num_nodes:,} nodes x {args.dim}, {len(graph.neighbours) // 2:,} edges"
    report(args, ranks, what, epochs, nodes=nodes)
    return epochs


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


def train_epoch(batches: Meter, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Train one epoch."""
    model.train()
    for batch in batches:
        batch = moved(batch, device)
        loss = nn.functional.cross_entropy(model(batch), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        batches.add(loss, len(batch["label"]))


@torch.no_grad()
def accuracy(loader: Iterable, model: nn.Module, ranks: Ranks, device: torch.device) -> float:
    """Collective: return the share of nodes that are classified right; NaN where there are none."""
    model.eval()
    right = nodes = 0
    for batch in loader:
        batch = moved(batch, device)
        right += int((model(batch).argmax(1) == batch["label"]).sum())
        nodes += len(batch["label"])
    right, nodes = ranks.gather(np.array([[right, nodes]])).sum(0)
    return float(right / nodes) if nodes else float("nan")


def read_command_line(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="PATH.npz", help="a graph to read; default: one that the program makes")
    add("--nodes", type=int, default=50_000, help="nodes of the graph that it makes (%(default)s)")
    add("--dim", type=int, default=64, help="floats in a node's embedding (%(default)s)")
    add("--hidden", type=int, default=64, help="width of the hidden layer (%(default)s)")
    add("--fan-out", type=int, default=10, help="neighbours sampled per node and layer (%(default)s)")
    add("--dropout", type=float, default=0.0, help="after the first layer (%(default)s)")
    add("--partition", action="store_true", help="each rank trains the nodes of its own part of the graph")
    return parse(parser, arguments, batch_size=256, epochs=5, lr=0.05, at_least_1=("fan_out",), has_device=True)


if __name__ == "__main__":
    main()
