"""A whole step of click-through training on one rank: AdaLoader against plain PyTorch, in turns, in one run.

    python benchmarks/ctr_step.py                       synthetic clicks, one table of 2,600,000 rows
    python benchmarks/ctr_step.py --data PATH           the Criteo sample (see examples/ctr.py), ids renumbered
    python benchmarks/ctr_step.py --tables 26           a table for each field

Five sides take turns of `--block` steps with the same batches, made beforehand: Wide & Deep of examples/ctr_models.py
under AdaLoader, with sparse and with dense gradients in plain PyTorch, its dense part alone (rows that are there
already, and get a gradient), and its embedding alone under AdaLoader. Adagrad throughout. "Outside the dense part" is a
side's step less that of the dense part alone. The first two must end with equal weights, or the program fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from step import Tables, pin
from torch import nn

import adaloader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from ctr_data import FIELDS, Clicks, load_criteo, make_synthetic
from ctr_models import WideAndDeep

UNCOUNTED = 2
TOLERANCE = 1e-4
# From a sum of zero the first step has the size lr whatever its gradient, so that a rounding can turn it round.
OPTIONS = {"lr": 0.01, "initial_accumulator_value": 0.1, "foreach": False}


class Side:
    """A model in training: `seconds` and `cpu_seconds` of its counted steps."""

    def __init__(self, model: nn.Module, batches: Iterator, optimizer: torch.optim.Optimizer, loss_of: Callable):
        self.model, self.batches, self.optimizer, self.loss_of = model, batches, optimizer, loss_of
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def run(self, steps: int, uncounted: int) -> None:
        for number in range(steps):
            started, cpu_started = time.perf_counter(), time.process_time()
            batch = next(self.batches)
            self.optimizer.zero_grad()
            self.loss_of(self.model, batch).backward()
            self.optimizer.step()
            if number >= uncounted:
                self.seconds.append(time.perf_counter() - started)
                self.cpu_seconds.append(time.process_time() - cpu_started)


class Rows(nn.Module):
    """In place of an embedding: rows that are there already, and get a gradient."""

    def __init__(self, batch: int, dim: int):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(batch, FIELDS, dim) * 0.01)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows * 1.0


def click_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(model(batch["dense"], batch["sparse"]), batch["label"])


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison that the command line asks for; exit with an error where the weights differ."""
    args = parse(arguments)
    pin(0)
    batches = make_batches(args)
    sides = make_sides(args, batches)
    for side in sides.values():
        side.run(args.warmup, uncounted=args.warmup)
    for _ in range(args.steps // args.block):
        for side in sides.values():
            side.run(args.block, UNCOUNTED)
    figures = collect(args, sides)
    report(figures)
    if args.json:
        Path(args.json).write_text(json.dumps(figures) + "\n")
    if not figures["largest_difference"] <= TOLERANCE:
        raise SystemExit(f"the weights differ by {figures['largest_difference']}; expected at most {TOLERANCE}")


def make_sides(args: argparse.Namespace, batches: list[dict]) -> dict[str, Side]:
    """Return the sides by name; all models begin with the same values."""

    def model(*, sparse: bool = False) -> WideAndDeep:
        torch.manual_seed(args.seed)
        made = WideAndDeep(1, args.dim)
        made.embedding = embedding(args, sparse)
        return made

    def plain(made: nn.Module) -> Side:
        embeddings = list(made.embedding.parameters())
        others = [parameter for name, parameter in made.named_parameters() if not name.startswith("embedding.")]
        groups = [{"params": embeddings}, {"params": others}]
        return Side(made, iter(batches), torch.optim.Adagrad(groups, **OPTIONS), click_loss)

    def managed(made: nn.Module, loss_of: Callable) -> Side:
        optimizer = torch.optim.Adagrad(made.parameters(), **OPTIONS)
        loader = adaloader.AdaLoader.wrap(batches, model=made, optimizer=optimizer, min_rows=1000)
        return Side(made, iter(loader), optimizer, loss_of)

    dense_part = model()
    dense_part.embedding = Rows(args.batch, args.dim)
    optimizer = torch.optim.Adagrad([p for n, p in dense_part.named_parameters() if "rows" not in n], **OPTIONS)
    torch.manual_seed(args.seed)
    gradient = torch.randn(args.batch, FIELDS, args.dim) / args.batch
    return {
        "AdaLoader": managed(model(), click_loss),
        "plain, sparse gradients": plain(model(sparse=True)),
        "plain, dense gradients": plain(model()),
        "dense part alone": Side(dense_part, iter(batches), optimizer, click_loss),
        "embedding alone": managed(embedding(args, False), lambda e, batch: (e(batch["sparse"]) * gradient).sum()),
    }


def embedding(args: argparse.Namespace, sparse: bool) -> nn.Module:
    """All fields' rows, in one table or in as many as there are fields."""
    if args.tables == 1:
        made = nn.Embedding(args.rows, args.dim, sparse=sparse)
    else:
        made = Tables(args.tables, args.rows // args.tables, args.dim, sparse=sparse)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.01)
    return made


def make_batches(args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Return batches for all steps; the data is repeated in order."""
    per_field = args.rows // FIELDS
    clicks = load_criteo(args.data) if args.data else make_synthetic(8 * args.batch, args.rows, args.seed)
    ids = renumbered(clicks, per_field, args.seed)
    if args.tables == 1:
        ids = ids + torch.arange(FIELDS) * per_field
    made = []
    for at in range(args.warmup + args.steps):
        chosen = torch.arange(at * args.batch, (at + 1) * args.batch) % len(clicks)
        made.append({"dense": clicks.dense[chosen], "sparse": ids[chosen], "label": clicks.label[chosen]})
    return made


def renumbered(clicks: Clicks, per_field: int, seed: int) -> torch.Tensor:
    """Return ids int64 [n, 26] below `per_field`: each field's distinct ids scattered over its rows."""
    rng = np.random.default_rng(seed)
    columns = []
    for field in range(FIELDS):
        distinct, inverse = np.unique(clicks.sparse[:, field].numpy(), return_inverse=True)
        if len(distinct) > per_field:
            raise SystemExit(f"field {field} has {len(distinct)} ids; give --rows {FIELDS * len(distinct)} or more")
        columns.append(rng.permutation(per_field)[inverse])
    return torch.from_numpy(np.stack(columns, 1))


def collect(args: argparse.Namespace, sides: dict[str, Side]) -> dict[str, object]:
    """Return the figures: milliseconds a step, wall and processor time, and what is made of them."""
    wall = {name: 1e3 * float(np.median(side.seconds)) for name, side in sides.items()}
    cpu = {name: 1e3 * float(np.mean(side.cpu_seconds)) for name, side in sides.items()}
    ours = adaloader.full_state_dict(sides["AdaLoader"].model)
    theirs = sides["plain, sparse gradients"].model.state_dict()
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    return {
        "arguments": vars(args),
        "wall_milliseconds": wall,
        "cpu_milliseconds": cpu,
        "wall": ratios(wall),
        "cpu": ratios(cpu),
        "largest_difference": difference,
    }


def ratios(step: dict[str, float]) -> dict[str, float]:
    """Return what `report` explains, of milliseconds a step by side."""
    dense, ours = step["dense part alone"], step["AdaLoader"]
    return {
        "outside_dense_part": (ours - dense) / (step["plain, sparse gradients"] - dense),
        "whole_to_parts": ours / (dense + step["embedding alone"]),
        "to_dense_gradients": ours / step["plain, dense gradients"],
    }


def report(figures: dict) -> None:
    args, wall, cpu = figures["arguments"], figures["wall_milliseconds"], figures["cpu_milliseconds"]
    print(f"{args['tables']} table(s), {args['rows']:,} x {args['dim']}, batch {args['batch']}, {args['steps']} steps")
    print(f"{'ms a step':<26}{'median':>10}{'CPU':>10}")
    for name in wall:
        print(f"{name:<26}{wall[name]:>10.3f}{cpu[name]:>10.3f}")
    for text, key in (
        ("time outside the dense part, to plain PyTorch's with sparse gradients", "outside_dense_part"),
        ("whole step, to dense part + embedding by themselves", "whole_to_parts"),
        ("whole step, to plain PyTorch with dense gradients", "to_dense_gradients"),
    ):
        print(f"{text}: {figures['wall'][key]:.3f}, of processor time {figures['cpu'][key]:.3f}")
    print(f"largest difference of weights {figures['largest_difference']:.1e}")
    print(json.dumps(figures), flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder of the Criteo sample")
    add("--rows", type=int, default=2_600_000, help="rows of all tables together (%(default)s)")
    add("--tables", type=int, default=1, choices=(1, FIELDS), help="one table, or one for each field (%(default)s)")
    add("--dim", type=int, default=16, help="floats in a row (%(default)s)")
    add("--batch", type=int, default=1024, help="samples a step (%(default)s)")
    add("--steps", type=int, default=100, help="measured steps of each side (%(default)s)")
    add("--block", type=int, default=10, help="steps in a turn (%(default)s)")
    add("--warmup", type=int, default=15, help="steps of each side before measuring (%(default)s)")
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH", help="write the figures")
    args = parser.parse_args(arguments)
    if args.block <= UNCOUNTED or args.steps % args.block:
        parser.error(
            f"--steps {args.steps} --block {args.block}: give blocks above {UNCOUNTED}, and a multiple of them"
        )
    return args


if __name__ == "__main__":
    main()
