"""Each kernel alone: nanoseconds a row and GB/s, against copies of as many bytes and against PyTorch's own.

    python benchmarks/kernels.py                          dims 1 to 128, tables larger than the caches and small ones
    python benchmarks/kernels.py --dims 16 --only gather
    python benchmarks/kernels.py --rows 2000000 --dtype float64    one table of that many records
    python benchmarks/kernels.py --device cuda            the CUDA bodies, where there is a GPU

Per kernel and dim the contestants run in turns, in one process bound to one core. A turn goes through `--sets` sets of
rows of the same table, drawn beforehand, so that each set has left the caches (of a large table) when it comes again:

- `kernel`: the function of `cuda_ops`, into memory that it used before, as in a training step;
- `copy`: a plain copy of as many bytes as the kernel must move, from warm memory to warm memory;
- `rows`: the same records copied to a slab, in the fastest of three ways (NumPy's `take`, PyTorch's `index_select`, and
  a loop with prefetch): what the access pattern itself costs. Where a row is a lookup, as many rows of the slab;
- `torch`: what PyTorch offers for the same work.

"cold" is a table of `--cold` MiB, which no cache holds, with ids that Zipf's law draws (`--zipf`; 0 for uniform) and
that are then made unique, as a batch's are; "warm" one of `--warm` records and uniform ids; `--rows` makes one like
"cold". Figures are lower quartiles, on the CPU of processor time, for machines are shared. A row is a unique one,
except for expand, segment_sum, dedup and bags: there, a lookup. "whole step" is dedup, gather, expand, segment sum and
Adagrad, against FBGEMM's table-batched embedding where that is installed. On a GPU, times are the device's own; `rows`
copies as many floats of a record as the function reads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensor_kernels
import torch

import cuda_ops
from cuda_ops.init import fill_uniform


@dataclass
class Case:
    """One kernel at one dim and size: functions of the number of a set, and what they have to do.

    Args:
        kernel, torch: the contestants (None: PyTorch has nothing for it).
        rows: per set, how many rows it is given.
        moved_bytes: bytes a row that any such kernel reads and writes.
    """

    kernel: Callable[[int], object]
    torch: Callable[[int], object] | None
    rows: list[int]
    moved_bytes: float


class Table:
    """Records of value and Adagrad state, and sets of rows to work on.

    Args:
        dim: floats in a row.
        count: records.
        lookups: ids in a set.
        zipf: exponent; 0 for uniform.
        sets: how many sets.
        dtype: float32 or float64.
    """

    def __init__(
        self, dim: int, count: int, lookups: int, zipf: float, sets: int, rng: np.random.Generator, dtype: str
    ):
        self.dim = dim
        self.stride = 2 * dim + 8 // np.dtype(dtype).itemsize
        self.count = count
        self.words = np.full(self.count * self.stride, 0.5, dtype)
        self.steps = self.words.view(np.int64)
        self.records = self.words.reshape(self.count, self.stride)
        self.tensor = torch.from_numpy(self.records)
        cumulative = np.cumsum(np.arange(1, self.count + 1) ** -zipf)
        row_of = rng.permutation(self.count)
        drawn = [np.searchsorted(cumulative, rng.random(lookups) * cumulative[-1]) for _ in range(sets)]
        self.ids = [row_of[np.minimum(ids, self.count - 1)] for ids in drawn]
        self.unique, self.inverse = zip(*(cuda_ops.dedup(ids) for ids in self.ids), strict=True)
        most = max(map(len, self.unique))
        self.slab = np.full((most, dim), 0.5, dtype)
        self.record_slab = np.empty((most, self.stride), dtype)
        self.grad = rng.standard_normal((most, dim)).astype(dtype)
        self.lookups = rng.standard_normal((lookups, dim)).astype(dtype)

    def rows(self, number: int) -> int:
        return len(self.unique[number])


def make_cases(t: Table) -> dict[str, Case]:
    """Return the cases of a table by name of kernel."""
    unique = [torch.from_numpy(rows) for rows in t.unique]
    inverse = [torch.from_numpy(positions) for positions in t.inverse]
    ids = [torch.from_numpy(some) for some in t.ids]
    values, slab, grad, lookups = t.tensor[:, : t.dim], *map(torch.from_numpy, (t.slab, t.grad, t.lookups))
    plain = torch.full((t.count, t.dim), 0.5, dtype=values.dtype)
    parameter = torch.nn.Parameter(plain)
    sgd = torch.optim.SGD([parameter], lr=0.01)
    adagrad = torch.optim.Adagrad([parameter], lr=0.01)
    index, scratch = cuda_ops.KeyIndex(t.count), cuda_ops.DedupScratch()
    index.add(np.arange(t.count) * 977, np.arange(t.count))
    found = np.empty(len(t.slab), np.int64)
    summed = np.empty_like(t.slab)
    item, dim, a_lookup = t.words.itemsize, t.dim, [len(t.lookups)] * len(ids)
    a_row = [len(rows) for rows in t.unique]

    def step(optimizer):
        def run(k):
            parameter.grad = torch.sparse_coo_tensor(ids[k][None], lookups, plain.shape, check_invariants=False)
            optimizer.step()

        return run

    def update(function, *numbers):
        return lambda k: function(t.words, t.stride, dim, t.steps, t.unique[k], t.grad[: a_row[k]], *numbers, 1.0, 7)

    return {
        "gather": Case(
            lambda k: cuda_ops.gather(t.words, t.stride, t.unique[k], t.slab[: a_row[k]]),
            lambda k: torch.index_select(plain, 0, unique[k], out=slab[: a_row[k]]),
            a_row,
            2 * item * dim + 8,
        ),
        "scatter": Case(
            lambda k: cuda_ops.scatter(t.words, t.stride, t.unique[k], t.slab[: a_row[k]]),
            lambda k: values.index_copy_(0, unique[k], slab[: a_row[k]]),
            a_row,
            2 * item * dim + 8,
        ),
        "merge": Case(
            lambda k: cuda_ops.merge(t.words, t.stride, t.unique[k], t.grad[: a_row[k]]),
            lambda k: plain.index_add_(0, unique[k], grad[: a_row[k]]),
            a_row,
            3 * item * dim + 8,
        ),
        "expand": Case(
            lambda k: cuda_ops.expand(t.slab[: a_row[k]], t.inverse[k], t.lookups),
            lambda k: torch.index_select(slab, 0, inverse[k], out=lookups),
            a_lookup,
            2 * item * dim + 8,
        ),
        "segment_sum": Case(
            lambda k: cuda_ops.segment_sum(t.lookups, t.inverse[k], summed[: a_row[k]]),
            lambda k: torch.ops.aten.embedding_dense_backward(lookups, inverse[k], a_row[k], -1, False),
            a_lookup,
            item * dim * (1 + 2 * sum(a_row) / sum(a_lookup)) + 8,
        ),
        "sgd_update": Case(update(cuda_ops.sgd_update, 0.01), step(sgd), a_row, 3 * item * dim + 16),
        "adagrad_update": Case(update(cuda_ops.adagrad_update, 0.01, 1e-10), step(adagrad), a_row, 5 * item * dim + 16),
        "dedup": Case(
            lambda k: cuda_ops.dedup(t.ids[k], scratch),
            lambda k: torch.unique(ids[k], return_inverse=True),
            a_lookup,
            16 + 24 * sum(a_row) / sum(a_lookup),
        ),
        "find": Case(lambda k: index.find(t.unique[k] * 977, found[: a_row[k]]), None, a_row, 32),
        "fill_uniform": Case(
            lambda k: fill_uniform(t.slab[: a_row[k]], t.unique[k], 1, 2, -1.0, 1.0),
            lambda k: slab[: a_row[k]].uniform_(-1, 1),
            a_row,
            item * dim,
        ),
    }


def row_copies(t: Table) -> list[Callable[[int], object]]:
    """Ways to copy the records of a set to a slab."""
    unique = [torch.from_numpy(rows) for rows in t.unique]
    slab = torch.from_numpy(t.record_slab)
    return [
        lambda k: np.take(t.records, t.unique[k], axis=0, out=t.record_slab[: t.rows(k)], mode="clip"),
        lambda k: torch.index_select(t.tensor, 0, unique[k], out=slab[: t.rows(k)]),
        lambda k: cuda_ops.gather(t.words, t.stride, t.unique[k], t.record_slab[: t.rows(k)]),
    ]


def lookup_copies(t: Table) -> list[Callable[[int], object]]:
    """Ways to copy the row of each lookup from a slab."""
    inverse = [torch.from_numpy(positions) for positions in t.inverse]
    slab, out = torch.from_numpy(t.slab), torch.from_numpy(np.empty_like(t.lookups))
    return [
        lambda k: np.take(t.slab, t.inverse[k], axis=0, out=out.numpy(), mode="clip"),
        lambda k: torch.index_select(slab, 0, inverse[k], out=out),
        lambda k: cuda_ops.gather(t.slab.reshape(-1), t.dim, t.inverse[k], out.numpy()),
    ]


def byte_copy(case: Case) -> Callable[[int], object]:
    """A copy that moves as many bytes as the kernel does (half of them read, half written)."""
    sizes = [max(1, int(rows * case.moved_bytes / 2)) for rows in case.rows]
    source, target = (np.ones(max(sizes), np.uint8) for _ in range(2))
    return lambda k: np.copyto(target[: sizes[k]], source[: sizes[k]])


def nanoseconds_per_row(functions: list[Callable[[int], object]], rows: list[int], repeats: int) -> list[float]:
    """Run the functions in turns, each over all sets; return the lower quartile of each one's times a row."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            for k in range(len(rows) if repeat else 1):
                started = time.thread_time_ns()
                function(k)
                if repeat:  # the first round compiles
                    taken.append((time.thread_time_ns() - started) / rows[k])
    return [float(np.quantile(taken, 0.25)) for taken in times]


def measure(t: Table, names: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Return the figures of each kernel of `names` on one table."""
    figures = {}
    for name, case in make_cases(t).items():
        if names and name not in names:
            continue
        copies = lookup_copies(t) if case.rows[0] == len(t.lookups) else row_copies(t)
        functions = [case.kernel, byte_copy(case), *copies, *([case.torch] if case.torch else [])]
        kernel, copy, *rest = nanoseconds_per_row(functions, case.rows, repeats)
        unique_share = sum(map(len, t.unique)) / sum(case.rows)
        figures[name] = {
            "kernel_ns": kernel,
            "gb_per_s": case.moved_bytes / kernel,
            "copy_ns": copy,
            "rows_ns": min(rest[: len(copies)]),
            "torch_ns": rest[len(copies)] if case.torch else math.nan,
            "to_copy": kernel / copy,
            "to_rows": kernel / min(rest[: len(copies)]),
            "unique_rows_per_row": unique_share,
        }
    return figures


def report(dim: int, kind: str, count: int, figures: dict[str, dict[str, float]]) -> None:
    """Print the table of one dim and size."""
    print(f"\ndim {dim}, {kind}: {count:,} records")
    print(f"{'':<16}{'ns/row':>9}{'GB/s':>8}{'copy':>9}{'rows':>9}{'torch':>10}{'/copy':>8}{'/rows':>8}{'/torch':>8}")
    for name, f in figures.items():
        print(
            f"{name:<16}{f['kernel_ns']:>9.2f}{f['gb_per_s']:>8.1f}{f['copy_ns']:>9.2f}{f['rows_ns']:>9.2f}"
            f"{f['torch_ns']:>10.2f}{f['to_copy']:>8.2f}{f['to_rows']:>8.2f}{f['kernel_ns'] / f['torch_ns']:>8.3f}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    args = parse(arguments)
    why_not = tensor_kernels.missing_device(args.device)
    if why_not:
        print(f"nothing is measured on {args.device}: {why_not}")
        return
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    results = []
    for dim in args.dims:
        for kind, count in tables(args, dim):
            sets = (count, args.lookups, 0.0 if kind == "warm" else args.zipf, args.sets, rng)
            figures = measure(Table(dim, *sets, args.dtype), args.only, args.repeats) if args.device == "cpu" else {}
            of_tensors = [name for name in tensor_kernels.ADDED_ON_CPU if not args.only or name in args.only]
            if args.dtype == "float64":  # the rest is float32's
                report(dim, kind, count, figures)
                results.append({"dim": dim, "table": kind, "records": count, "kernels": figures})
                continue
            tensors = tensor_kernels.TensorTable(args.device, dim, *sets)
            if args.device == "cuda":
                figures = tensor_kernels.measure(tensors, args.only, args.repeats)
            elif of_tensors:
                figures |= tensor_kernels.measure(tensors, of_tensors, args.repeats)
            report(dim, kind, count, figures)
            results.append({"dim": dim, "table": kind, "records": count, "kernels": figures})
            if not args.only or "step" in args.only:
                steps = tensor_kernels.measure_steps(tensors, args.repeats)
                results[-1]["steps_ns_per_lookup"] = steps
                print("whole step, ns a lookup:", ", ".join(f"{name} {ns:.1f}" for name, ns in steps.items()))
    text = json.dumps({"arguments": vars(args), "results": results})
    print("\n" + text)
    if args.json:
        Path(args.json).write_text(text + "\n")


def tables(args: argparse.Namespace, dim: int) -> list[tuple[str, int]]:
    """Return the kinds of tables to measure, and how many records each has."""
    if args.rows:
        return [("rows", args.rows)]
    return [("cold", (args.cold << 20) // (4 * (2 * dim + 2))), ("warm", args.warm)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dims", type=int, nargs="+", default=[1, 16, 64, 128], help="floats in a row (%(default)s)")
    add("--cold", type=int, default=512, help="MiB of the large table (%(default)s)")
    add("--warm", type=int, default=8192, help="records of the small table (%(default)s)")
    add("--rows", type=int, help="records of one table, in place of the large and the small")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of the CPU's tables (%(default)s)")
    add("--lookups", type=int, default=26 * 1024, help="ids in a set (%(default)s)")
    add("--zipf", type=float, default=1.05, help="exponent of Zipf's law (%(default)s)")
    add("--sets", type=int, default=48, help="sets of rows to take in turns (%(default)s)")
    add("--repeats", type=int, default=3, help="times through the sets (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    add("--only", nargs="+", default=[], metavar="KERNEL", help="leave out the others")
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH", help="write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
