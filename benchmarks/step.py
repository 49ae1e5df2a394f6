"""The step of an embedding alone: AdaLoader against plain PyTorch, in turns, in one run.

    python benchmarks/step.py               1 rank; plain is nn.Embedding(sparse=True)
    mpirun -n 2 python benchmarks/step.py   2 ranks; plain is the same under DistributedDataParallel (gloo)
    python benchmarks/step.py --tables 26   26 tables of a 26th of the rows, and beside them one table of all rows

A step is: fetch the next batch, look it up, `out.backward(gradient)` with a fixed gradient,
`optimizer.step()`, `zero_grad()`. Both sides get the same batches, made beforehand: plain from a list,
AdaLoader from `AdaLoader.wrap` of that list, so deriving keys and reading ahead are part of its steps. Each
rank is pinned to one core with all its threads. The sides run in turns of `--block` steps. Not counted are
the first steps of a turn, when the other side's data fills the caches, and the warm-up, when keys are learned
and kernels load. At the end both tables must be equal, to rounding, or the program fails (with `--staleness`
they differ, and by how much is reported).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import adaloader
from pm.decision import TECHNIQUES

OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}
UNCOUNTED = 2
TOLERANCE = 1e-5


class Tables(nn.Module):
    """Tables of equal size, one after the other for the ids `[batch, fields]` of as many fields."""

    def __init__(self, tables: int, rows: int, dim: int, *, sparse: bool):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, dim, sparse=sparse) for _ in range(tables))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([table(ids[:, field]) for field, table in enumerate(self.tables)], 1)


class Side:
    """One of those that are compared: a table, its optimizer, and the batches still to come.

    `step_seconds` holds the counted steps; `cpu_seconds` the processor time of all threads in them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict]):
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.step_seconds: list[float] = []
        self.cpu_seconds = 0.0

    def run(self, steps: int, gradient: torch.Tensor, uncounted: int) -> None:
        """Make `steps` steps, of which the first `uncounted` leave no trace in the figures."""
        own_gradient = gradient.clone()
        for number in range(steps):
            own_gradient.copy_(gradient)  # DistributedDataParallel scales a sparse gradient in place, and with it this
            started, cpu_started = time.perf_counter(), time.process_time()
            batch = next(self.batches)
            out = self.model(batch["ids"])
            out.backward(own_gradient)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if number >= uncounted:
                self.step_seconds.append(time.perf_counter() - started)
                self.cpu_seconds += time.process_time() - cpu_started


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison that the command line asks for; exit with an error where the tables differ."""
    args = parse(arguments)
    comm = world()
    rank, size = (comm.rank, comm.size) if comm else (0, 1)
    pin(rank)
    batches = make_batches(args, rank)
    gradient = torch.randn(args.batch, args.fields, args.dim, generator=torch.Generator().manual_seed(rank))

    torch.manual_seed(args.seed)
    managed_table, plain_table = make_model(args, args.tables), make_model(args, args.tables, sparse=True)
    plain_table.load_state_dict(managed_table.state_dict())
    ours, loader = managed_side(args, managed_table, batches)
    plain_optimizer = OPTIMIZERS[args.optimizer](plain_table.parameters(), lr=args.lr)
    plain = Side(distributed(plain_table, comm), plain_optimizer, iter(batches))
    one = [managed_side(args, make_model(args, 1), in_one_table(args, batches))[0]] if args.tables > 1 else []

    before = run_in_turns(args, [ours, plain, *one], loader, gradient, size)
    parts = {name: (seconds - before[name]) / args.steps for name, seconds in loader.stats()["seconds"].items()}
    figures = collect(args, [ours, plain, *one], parts, size)
    figures["largest_difference"] = difference(managed_table, plain_table, rank)
    if rank == 0:
        report(args, figures)
    # The gradient of a hot row is a sum of almost as many terms as there are ids, in an order of either side's.
    tolerance = max(TOLERANCE, np.finfo(np.float32).eps * (args.batch * args.fields * size) ** 0.5)
    if args.staleness == 0 and not figures["largest_difference"] <= tolerance:
        raise SystemExit(f"the tables differ by {figures['largest_difference']}; expected at most {tolerance:.1e}")


def make_model(args: argparse.Namespace, tables: int, *, sparse: bool = False) -> nn.Module:
    """`--rows` rows in so many tables; `sparse` for plain PyTorch, but for Adam, which takes dense gradients alone."""
    sparse = sparse and args.optimizer != "adam"
    if tables == 1:
        return nn.Embedding(args.rows, args.dim, sparse=sparse)
    return Tables(tables, args.rows // tables, args.dim, sparse=sparse)


def managed_side(args: argparse.Namespace, model: nn.Module, batches: list[dict]) -> tuple[Side, object]:
    """Collective: the side that AdaLoader manages, and its loader."""
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    loader = adaloader.AdaLoader.wrap(
        batches,
        model=model,
        optimizer=optimizer,
        min_rows=1,
        staleness=args.staleness,
        techniques=args.techniques,
        shared_memory=not args.apart,
        **lookahead_of(args),
    )
    return Side(model, optimizer, iter(loader)), loader


def run_in_turns(
    args: argparse.Namespace, sides: list[Side], loader: object, gradient: torch.Tensor, size: int
) -> dict[str, float]:
    """Warm up and measure; return the loader's seconds by part as they were after the warm-up."""
    for side in sides:
        side.run(args.warmup, gradient, uncounted=args.warmup)
    before = dict(loader.stats()["seconds"])
    for _ in range(args.steps // args.block):
        for side in sides:
            if size > 1:
                dist.barrier()
            side.run(args.block, gradient, uncounted=UNCOUNTED)
    return before


def collect(args: argparse.Namespace, sides: list[Side], parts: dict[str, float], size: int) -> dict[str, object]:
    """Collective: the figures in milliseconds a step, each the mean over ranks of a rank's median or mean."""
    names = sorted(parts)
    rows = [
        *(1e3 * np.median(side.step_seconds) for side in sides),
        *(1e3 * np.quantile(side.step_seconds, 0.9) for side in sides),
        *(1e3 * side.cpu_seconds / len(side.step_seconds) for side in sides),
        *(1e3 * parts[name] for name in names),
    ]
    values = torch.tensor(rows, dtype=torch.float64)
    if size > 1:
        dist.all_reduce(values)
        values /= size
    labels = [
        f"{side}{what}" for what in ("", "_p90", "_cpu") for side in ("adaloader", "plain", "one_table")[: len(sides)]
    ]
    milliseconds = dict(zip(labels + names, values.tolist(), strict=True))
    ratios = {f"ratio{what}": milliseconds[f"adaloader{what}"] / milliseconds[f"plain{what}"] for what in ("", "_cpu")}
    if len(sides) > 2:
        for what in ("", "_cpu"):
            ratios[f"ratio_to_one_table{what}"] = milliseconds[f"adaloader{what}"] / milliseconds[f"one_table{what}"]
    return {
        "ranks": size,
        "arguments": vars(args),
        "step_milliseconds": {label: milliseconds[label] for label in labels},
        **ratios,
        "part_milliseconds": {name: milliseconds[name] for name in names},
    }


def report(args: argparse.Namespace, figures: dict) -> None:
    """Print the table and the JSON, and write the latter where `--json` says."""
    step, plain = figures["step_milliseconds"], "DDP, sparse" if figures["ranks"] > 1 else "plain, sparse"
    print(
        f"{figures['ranks']} rank(s), {args.tables} table(s), {args.rows:,} x {args.dim}, "
        f"{args.batch} x {args.fields} ids a rank, Zipf {args.zipf}, {args.optimizer}, {args.steps} steps"
    )
    print(f"{'ms a step':<16}{'median':>10}{'90 %':>10}{'CPU':>10}")
    for label, key in (("AdaLoader", "adaloader"), (plain, "plain"), ("in one table", "one_table")):
        if key not in step:
            continue
        print(f"{label:<16}{step[key]:>10.3f}{step[key + '_p90']:>10.3f}{step[key + '_cpu']:>10.3f}")
    print(
        f"ratio of medians {figures['ratio']:.3f}, of processor time {figures['ratio_cpu']:.3f}; "
        f"largest difference {figures['largest_difference']:.1e}"
    )
    if args.tables > 1:
        print(
            f"{args.tables} tables to one: {figures['ratio_to_one_table']:.2f}, "
            f"of processor time {figures['ratio_to_one_table_cpu']:.2f}"
        )
    print("where AdaLoader's time goes, mean ms a step (parts on its background thread overlap the others):")
    for name, milliseconds in figures["part_milliseconds"].items():
        print(f"  {name:<14}{milliseconds:>10.3f}")
    text = json.dumps(figures)
    print(text, flush=True)
    if args.json:
        Path(args.json).write_text(text + "\n")


def difference(managed_table: nn.Module, plain_table: nn.Module, rank: int) -> float:
    """Collective: the largest difference between the two models' tables, relative to the largest value of a row where
    that is above 1 (SGD moves hot rows far, as every step has the same gradient); 0 on ranks other than 0.
    """
    state = adaloader.full_state_dict(managed_table)
    if rank:
        return 0.0
    plain = plain_table.state_dict()
    sizes = {name: values.abs().amax(1, keepdim=True).clamp(min=1.0) for name, values in plain.items()}
    return max(float(((state[name] - plain[name]).abs() / size).max()) for name, size in sizes.items())


def make_batches(args: argparse.Namespace, rank: int) -> list[dict[str, torch.Tensor]]:
    """This rank's batches: ids int64 [batch, fields] by Zipf's law over a table's rows, popular rows scattered."""
    rows = args.rows // args.tables
    cumulative = np.cumsum(np.arange(1, rows + 1) ** -args.zipf)
    cumulative /= cumulative[-1]
    row_of = np.random.default_rng(args.seed).permutation(rows)
    rng = np.random.default_rng([args.seed, rank])
    shape = (args.batch, args.fields)
    return [
        {"ids": torch.from_numpy(row_of[np.searchsorted(cumulative, rng.random(shape), side="right")])}
        for _ in range(args.warmup + args.steps)
    ]


def in_one_table(args: argparse.Namespace, batches: list[dict]) -> list[dict[str, torch.Tensor]]:
    """The same batches for one table that has the rows of all tables, one table after the other."""
    first_rows = torch.arange(args.tables) * (args.rows // args.tables)
    return [{"ids": batch["ids"] + first_rows} for batch in batches]


def distributed(table: nn.Module, comm: object) -> nn.Module:
    """The table as plain PyTorch trains it on several ranks: under DistributedDataParallel with gloo."""
    if comm is None or comm.size == 1:
        return table
    from adaloader.dense.process_group import process_group

    return nn.parallel.DistributedDataParallel(table, process_group=process_group(comm))


def pin(rank: int) -> None:
    """Bind this process, with the threads that it will start, to one core, and PyTorch to one thread."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)


def world() -> object | None:
    """MPI's world, or None without mpi4py."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD


def lookahead_of(args: argparse.Namespace) -> dict[str, int]:
    """The keyword `lookahead`, where it was given."""
    return {} if args.lookahead is None else {"lookahead": args.lookahead}


def staleness(text: str) -> int | None:
    """Read `--staleness`."""
    return None if text == "none" else int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=2_000_000, help="rows of the tables together (%(default)s)")
    add("--tables", type=int, default=1, help="tables that share the rows; as many as --fields, or one (%(default)s)")
    add("--dim", type=int, default=16, help="floats in a row (%(default)s)")
    add("--batch", type=int, default=1024, help="samples per rank and step (%(default)s)")
    add("--fields", type=int, default=26, help="ids per sample (%(default)s)")
    add("--zipf", type=float, default=1.05, help="exponent of Zipf's law (%(default)s)")
    add("--steps", type=int, default=200, help="measured steps of each side (%(default)s)")
    add("--block", type=int, default=20, help="steps in a turn (%(default)s)")
    add("--warmup", type=int, default=20, help="steps of each side before measuring (%(default)s)")
    add("--optimizer", choices=sorted(OPTIMIZERS), default="adagrad")
    add("--lr", type=float, default=0.01)
    add("--lookahead", type=int, help="batches to read ahead (the loader's default)")
    add("--staleness", type=staleness, default=0, help="0 (exact), a number of steps, or none (no bound) (%(default)s)")
    add("--techniques", choices=TECHNIQUES, default="all", help="how rows get where they are needed (%(default)s)")
    add("--apart", action="store_true", help="each rank as on a machine of its own (shared_memory=False)")
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH", help="write the figures")
    args = parser.parse_args(arguments)
    if args.tables not in (1, args.fields) or args.rows < args.tables:
        parser.error(f"--tables {args.tables}: give 1, or as many as --fields ({args.fields}) and no more than --rows")
    if args.block <= UNCOUNTED or args.steps % args.block:
        parser.error(
            f"--steps {args.steps} --block {args.block}: give blocks of more than {UNCOUNTED} steps, "
            "and a multiple of them"
        )
    return args


if __name__ == "__main__":
    main()
