"""Word vectors: skip-gram with negative sampling and subsampling of frequent words.

    python examples/word2vec.py                      one process
    mpirun -n 2 python examples/word2vec.py          two ranks, each with half of every global batch
    python examples/word2vec.py --plain              the same in plain PyTorch, on one process

It makes a text with planted synonyms, or reads one from `--data PATH`. The score is the mean loss per pair on the last
part of the text, held out, and for the text that it makes the share of words whose nearest neighbour is a synonym.
Negatives are drawn with each pair, the same whatever the number of ranks; `--negatives-in-loop` draws them in the
loop by `adaloader.random_ids`, which the loader knows ahead, and which differ between numbers of ranks.
`--plain --plain-ranks N` uses the global batch of N ranks, so that its numbers can be compared with theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np
import torch
from ranks import Ranks
from runs import OPTIMIZERS, Epoch, Loaders, Meter, dtype_of, make_parser, parse, report, sparse_of, summarise
from word2vec_data import Positions, Text, Words, load_text, make_synthetic
from word2vec_model import SkipGram

EVALUATION_BATCH = 1024


def main(arguments: list[str] | None = None) -> list[Epoch]:
    """Train as the command line says; return the epochs' figures (on rank 0; NaNs elsewhere)."""
    args = read_command_line(arguments)
    ranks = Ranks(alone=args.plain)
    text = load_text(args.data, args.min_count) if args.data else make_synthetic(args.words, args.length, args.seed)
    num_words, counts = len(text.words), np.bincount(text.train, minlength=len(text.words))
    torch.manual_seed(args.seed)
    model = SkipGram(num_words, args.dim, sparse=sparse_of(args)).to(dtype_of(args))
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    torch.manual_seed(args.seed)  # the order of samples must not depend on what building the model drew
    drawn = 0 if args.negatives_in_loop else args.negatives
    train = Positions(text.train, counts, args.window, drawn, args.subsample, args.seed)
    held_out = Positions(text.held_out, counts, args.window, args.negatives, 0, args.seed)
    loaders = Loaders(args, model, optimizer)
    train_loader = loaders.training(train)
    held_out_loader = loaders.shared(held_out, EVALUATION_BATCH)
    word_loader = loaders.shared(Words(num_words), EVALUATION_BATCH)

    epochs = []
    for number in loaders.epochs():
        train.set_epoch(number)
        meter = Meter(train_loader, number, show=ranks.rank == 0)
        train_epoch(meter, model, optimizer, args, torch.from_numpy(counts**0.75))
        scores = held_out_loss(held_out_loader, model, ranks)
        if text.meaning is not None:
            scores |= synonyms_found(word_loader, model, text, ranks)
        epochs.append(summarise(number, ranks.gather(meter.sums()[None]), scores))
        if ranks.rank == 0:
            print(epochs[-1], flush=True)
    report(args, ranks, f"word2vec, {num_words:,} words x {args.dim}, {len(text.train):,} positions", epochs)
    return epochs


def train_epoch(
    batches: Meter,
    model: SkipGram,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    popularity: torch.Tensor,
) -> None:
    """Train one epoch.

    The loss is the pairs' sum over positions: a mean over samples, so that it does not matter how the pairs of a batch
    are spread over ranks. Divided by the mean number of words in a window, it is about the loss of a pair.
    """
    model.train()
    for batch in batches:
        if args.negatives_in_loop:
            batch["negatives"] = draw_negatives(batch, popularity, args.negatives)
        loss = model(batch).sum() / (batch["positions"] * (args.window + 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        batches.add(loss, batch["positions"])


def draw_negatives(batch: dict[str, object], popularity: torch.Tensor, count: int) -> torch.Tensor:
    """Draw `count` words for each pair, by popularity (float64 [words])."""
    from adaloader import random_ids

    return random_ids(None, (len(batch["centre"]), count), weights=popularity)


@torch.no_grad()
def held_out_loss(loader: Iterable, model: SkipGram, ranks: Ranks) -> dict[str, float]:
    """Collective: return the mean loss of the held-out pairs, with the same negatives every time."""
    model.eval()
    total, pairs = 0.0, 0
    for batch in loader:
        losses = model(batch)
        total += float(losses.double().sum())
        pairs += len(losses)
    total, pairs = ranks.gather(np.array([[total, pairs]])).sum(0)
    return {"test_loss": float(total / pairs) if pairs else float("nan")}


@torch.no_grad()
def synonyms_found(loader: Iterable, model: SkipGram, text: Text, ranks: Ranks) -> dict[str, float]:
    """Collective: return the share of the words in the text to train on whose nearest neighbour means the same.

    The nearest is by cosine, among all words of that text.
    """
    model.eval()
    found = [np.column_stack([batch["word"].numpy(), model.centre(batch["word"]).numpy()]) for batch in loader]
    rows = ranks.gather(np.concatenate(found) if found else np.empty((0, 1 + model.centre.embedding_dim)))
    occurs = np.unique(text.train)
    if ranks.rank != 0 or len(occurs) < 2:
        return {}
    vectors = rows[np.argsort(rows[:, 0]), 1:][occurs]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    meaning, right = text.meaning[occurs], 0
    for start in range(0, len(occurs), EVALUATION_BATCH):
        chosen = np.arange(start, min(start + EVALUATION_BATCH, len(occurs)))
        cosines = vectors[chosen] @ vectors.T
        cosines[np.arange(len(chosen)), chosen] = -np.inf
        right += int((meaning[cosines.argmax(1)] == meaning[chosen]).sum())
    return {"synonyms_found": right / len(occurs)}


def read_command_line(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="PATH", help="a text to read; default: one that the program makes")
    add("--min-count", type=int, default=5, help="with --data: leave out words that occur less often (%(default)s)")
    add("--words", type=int, default=3_000, help="words of the text that it makes (%(default)s)")
    add("--length", type=int, default=200_000, help="its length in words (%(default)s)")
    add("--dim", type=int, default=64, help="numbers in a vector (%(default)s)")
    add("--window", type=int, default=5, help="the largest distance of words that make a pair (%(default)s)")
    add("--negatives", type=int, default=5, help="negatives per pair (%(default)s)")
    add("--negatives-in-loop", action="store_true", help="draw them by adaloader.random_ids")
    add("--subsample", type=float, default=1e-3, help="frequency above which words are left out at times (%(default)s)")
    at_least_1 = ("dim", "window", "negatives", "min_count")
    args = parse(parser, arguments, batch_size=512, epochs=5, lr=0.05, at_least_1=at_least_1)
    if args.subsample < 0:
        parser.error(f"--subsample {args.subsample}: give a frequency, or 0 to leave out nothing")
    return args


if __name__ == "__main__":
    main()
