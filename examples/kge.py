"""Knowledge-graph embeddings: ComplEx with negative sampling.

    python examples/kge.py                      one process
    mpirun -n 2 python examples/kge.py          two ranks, each with half of every global batch
    python examples/kge.py --plain              the same in plain PyTorch, on one process

It makes a graph with planted structure, or reads one from `--data DIR` (`kge_data.load_graph` names the files; where
there is no `train` file, as in the sample of FB15k-237, it trains on `valid`). The scores are the filtered mean
reciprocal rank and Hits@10 on held-out triples, heads and tails, against all entities.
Negatives are drawn with each triple, the same whatever the number of ranks; `--negatives-in-loop` draws them in the
loop by `adaloader.random_ids`, which the loader knows ahead, and which differ between numbers of ranks.
`--plain --plain-ranks N` uses the global batch of N ranks, so that its numbers can be compared with theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np
import torch
from kge_data import Entities, Graph, Triples, load_graph, make_synthetic
from kge_model import ComplEx
from kge_ranking import Ranking, scores_of
from ranks import Ranks
from runs import OPTIMIZERS, Epoch, Loaders, Meter, dtype_of, make_parser, parse, report, sparse_of, summarise

EVALUATION_BATCH = 1024


def main(arguments: list[str] | None = None) -> list[Epoch]:
    """Train as the command line says; return the epochs' figures (on rank 0; NaNs elsewhere)."""
    args = read_command_line(arguments)
    ranks = Ranks(alone=args.plain)
    graph = read_graph(args)
    torch.manual_seed(args.seed)
    model = ComplEx(graph.num_entities, graph.num_relations, args.dim, args.penalty, sparse=sparse_of(args))
    model = model.to(dtype_of(args))
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # the order of samples must not depend on what building the model drew
    train = Triples(graph.train, graph.num_entities, 0 if args.negatives_in_loop else args.negatives, args.seed)
    loaders = Loaders(args, model, optimizer)
    train_loader = loaders.training(train)
    evaluation = evaluation_loaders(loaders, graph)

    epochs = []
    for number in loaders.epochs():
        train.set_epoch(number)
        meter = Meter(train_loader, number, show=ranks.rank == 0)
        train_epoch(meter, model, optimizer, args)
        scores = evaluate(*evaluation, model, graph, ranks)
        epochs.append(summarise(number, ranks.gather(meter.sums()[None]), scores))
        if ranks.rank == 0:
            print(epochs[-1], flush=True)
    what = f"kge, {graph.num_entities:,} entities x {args.dim}, {len(graph.train):,} triples"
    report(args, ranks, what, epochs)
    return epochs


def train_epoch(batches: Meter, model: ComplEx, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> None:
    """Train one epoch."""
    model.train()
    for batch in batches:
        if args.negatives_in_loop:
            batch |= draw_negatives(batch, model, args.negatives)
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        batches.add(loss, len(batch["head"]))


def draw_negatives(batch: dict[str, torch.Tensor], model: ComplEx, count: int) -> dict[str, torch.Tensor]:
    """Draw `count` entities to put in the place of each head, and of each tail."""
    from adaloader import random_ids

    size, num_entities = (len(batch["head"]), count), model.entity.num_embeddings
    return {"other_heads": random_ids(num_entities, size), "other_tails": random_ids(num_entities, size)}


def evaluation_loaders(loaders: Loaders, graph: Graph) -> tuple[Iterable, Iterable]:
    """Loaders of the held-out triples, all of them on every rank, and of the entities, which the ranks share."""
    held_out = Triples(graph.held_out, graph.num_entities, negatives=0, seed=0)
    numbers = range(len(held_out))
    batches = [
        held_out.__getitems__(numbers[start : start + EVALUATION_BATCH]) for start in numbers[::EVALUATION_BATCH]
    ]
    return loaders.repeated(batches), loaders.shared(Entities(graph.num_entities), EVALUATION_BATCH)


@torch.no_grad()
def evaluate(
    held_out_loader: Iterable, entity_loader: Iterable, model: ComplEx, graph: Graph, ranks: Ranks
) -> dict[str, float]:
    """Collective: return the filtered ranking's scores; each rank compares the answers with its share of entities."""
    model.eval()
    found = [model(batch) for batch in held_out_loader]
    heads, tails, tail_queries, head_queries = (torch.cat(parts) for parts in zip(*found, strict=True))
    queries = torch.cat([tail_queries, head_queries])
    answer_scores = (queries * torch.cat([tails, heads])).sum(1)
    ranking = Ranking(graph.held_out, graph.known, graph.num_entities)
    for batch in entity_loader:
        ranking.count(queries, answer_scores, batch["entity"].numpy(), model.entity(batch["entity"]))
    counts = ranks.gather(np.stack([ranking.above, ranking.equal])[None]).sum(0)
    return scores_of(*counts) if ranks.rank == 0 else {}


def read_graph(args: argparse.Namespace) -> Graph:
    """Read the graph, or make it; with `--held-out` only so many triples are asked about."""
    if args.data:
        graph = load_graph(args.data)
    else:
        graph = make_synthetic(args.entities, args.relations, args.triples, args.seed)
    if args.held_out is None:
        return graph
    return Graph(graph.num_entities, graph.num_relations, graph.train, graph.held_out[: args.held_out], graph.known)


def read_command_line(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder with a graph; default: one that the program makes")
    add("--entities", type=int, default=4_000, help="entities of the graph that it makes (%(default)s)")
    add("--relations", type=int, default=20, help="relations of it (%(default)s)")
    add("--triples", type=int, default=100_000, help="triples drawn; those drawn twice count once (%(default)s)")
    add("--dim", type=int, default=64, help="complex numbers in a vector (%(default)s)")
    add("--negatives", type=int, default=10, help="negatives per triple, for the head and for the tail (%(default)s)")
    add("--negatives-in-loop", action="store_true", help="draw them by adaloader.random_ids")
    add("--penalty", type=float, default=0.05, help="of cubed moduli, per triple (%(default)s)")
    add("--held-out", type=int, metavar="N", help="score only the first N of the held-out triples")
    at_least_1 = ("dim", "negatives", "held_out")
    return parse(parser, arguments, batch_size=512, epochs=5, lr=0.1, at_least_1=at_least_1)


if __name__ == "__main__":
    main()
