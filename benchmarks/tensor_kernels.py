"""What `kernels.py` measures on tensors: all functions on a GPU, and on the CPU those that take tensors alone there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import cuda_ops
from cuda_ops.init import fill_uniform

BETAS, EPS = (0.9, 0.999), 1e-8
ADDED_ON_CPU = (
    "sparse_adam",
    "rowwise_adagrad",
    "adam",
    "half_sgd",
    "half_adagrad",
    "half_adagrad_random",
    "narrow_rows",
    "reduce_bags",
    "bags_backward",
)
"""The functions that are measured here on the CPU too."""


def missing_device(device: str) -> str | None:
    """Say why nothing can be measured on a device; None if it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    if device == "cuda":
        try:
            from cuda_ops.cuda.launch import missing_compiler
        except ImportError as error:
            return f"Numba has no CUDA target here ({error}); pip install 'adaloader[cuda]'"
        return missing_compiler()
    return None


@dataclass
class TensorCase:
    """One function: calls by the number of a set, as `kernels.Case`.

    Args:
        kernel, torch: the contestants (None: PyTorch has nothing for it).
        rows: per set, how many rows it is given.
        moved_bytes: bytes a row that any such function reads and writes.
        words: floats of a record that it reads; the random-row copy copies as many.
        stride: floats from one record to the next.
    """

    kernel: Callable[[int], object]
    torch: Callable[[int], object] | None
    rows: list[int]
    moved_bytes: float
    words: int
    stride: int


class TensorTable:
    """Records of a value, two parts of state and two words of steps on a device, and sets of rows to work on.

    Args:
        dim: floats in a row.
        megabytes: of records, or with `count` that many records.
        lookups: ids in a set.
        zipf: exponent; 0 for uniform.
        sets: how many sets.
    """

    def __init__(self, device: str, dim: int, count: int, lookups: int, zipf: float, sets: int, rng):
        self.device, self.dim, self.count = device, dim, count
        self.stride = -(-(3 * dim + 4) // 4) * 4  # of the widest record, under Adam
        # NumPy asks for large pages, as stores do.
        self.words = torch.from_numpy(np.full(count * self.stride, 0.5, np.float32)).to(device)
        self.steps = self.words.view(torch.int64)
        self.records = self.words.view(count, self.stride)
        cumulative = np.cumsum(np.arange(1, count + 1) ** -zipf)
        row_of = rng.permutation(count)
        drawn = [np.searchsorted(cumulative, rng.random(lookups) * cumulative[-1]) for _ in range(sets)]
        ids = [row_of[np.minimum(some, count - 1)] for some in drawn]
        unique, inverse = zip(*(cuda_ops.dedup(some) for some in ids), strict=True)
        self.ids, self.unique, self.inverse = (
            [torch.from_numpy(part).to(device) for part in parts] for parts in (ids, unique, inverse)
        )
        self.a_row, self.a_lookup = [len(rows) for rows in unique], [lookups] * sets
        most = max(self.a_row)
        self.slab = torch.full((most, dim), 0.5, device=device)
        self.copied = torch.empty(most * self.stride, device=device)
        self.grad = torch.from_numpy(rng.standard_normal((most, dim)).astype(np.float32)).to(device)
        self.of_lookups = torch.from_numpy(rng.standard_normal((lookups, dim)).astype(np.float32)).to(device)
        self.offsets = torch.from_numpy(np.sort(np.r_[0, rng.integers(0, lookups, lookups // 8 - 1)])).to(device)

    def cases(self) -> dict[str, Callable[[], TensorCase]]:
        """Return what makes the case of each function, by its name; each begins with fresh records."""
        return {**self._copies(), **self._updates(), **self._halves(), **self._others()}

    def _case(self, kernel, reference, rows, moved_bytes, words=None):
        return lambda: TensorCase(kernel, reference, rows, moved_bytes, words or self.dim, self.stride)

    def _store(self, value_words, state_words, step_words=1):
        """Return (words, stride, steps) of as many records, of no more than an optimizer needs, 16-byte aligned."""
        stride = -(-(value_words + state_words + 2 * step_words) // 4) * 4
        words = self.words[: self.count * stride]
        return words, stride, words.view(torch.int64)

    def _copies(self):
        dim, stride, words, unique, a_row = self.dim, self.stride, self.words, self.unique, self.a_row
        values, slab, grad = self.records[:, :dim], self.slab, self.grad
        return {
            "gather": self._case(
                lambda k: cuda_ops.gather(words, stride, unique[k], slab[: a_row[k]]),
                lambda k: torch.index_select(values, 0, unique[k], out=slab[: a_row[k]]),
                a_row,
                8 * dim + 8,
            ),
            "scatter": self._case(
                lambda k: cuda_ops.scatter(words, stride, unique[k], slab[: a_row[k]], distinct=True),
                lambda k: values.index_copy_(0, unique[k], slab[: a_row[k]]),
                a_row,
                8 * dim + 8,
            ),
            "merge": self._case(
                lambda k: cuda_ops.merge(words, stride, unique[k], grad[: a_row[k]], distinct=True),
                lambda k: values.index_add_(0, unique[k], grad[: a_row[k]]),
                a_row,
                12 * dim + 8,
            ),
            "expand": self._case(
                lambda k: cuda_ops.expand(slab[: a_row[k]], self.inverse[k], self.of_lookups),
                lambda k: torch.index_select(slab, 0, self.inverse[k], out=self.of_lookups),
                self.a_lookup,
                8 * dim + 8,
            ),
            "segment_sum": self._case(
                lambda k: cuda_ops.segment_sum(self.of_lookups, self.inverse[k], slab[: a_row[k]]),
                lambda k: torch.ops.aten.embedding_dense_backward(
                    self.of_lookups, self.inverse[k], a_row[k], -1, False
                ),
                self.a_lookup,
                4 * dim * (1 + 2 * sum(a_row) / sum(self.a_lookup)) + 8,
            ),
        }

    def _updates(self):
        dim = self.dim
        history = torch.zeros(1, cuda_ops.history_columns("adam")[1], dtype=torch.float64)
        history[0, :8] = torch.tensor([0.1, 0.999, 1e-3, EPS, 0.0, 1.0, -1e-3, 1.0])
        bounds = torch.tensor([[torch.inf, 0.0, 1.0, 0.0]], dtype=torch.float64)
        scalars = history.to(self.device), bounds.to(self.device)

        def update(function, *numbers):
            return lambda store, rows: function(*store, *rows, *numbers, 1.0, 7)

        def adam(store, rows):
            cuda_ops.advance("adam", *store, *rows, *scalars, 1.0, 7)

        cases = {
            "sgd": (update(cuda_ops.sgd_update, 0.01), torch.optim.SGD, 0, 1),
            "adagrad": (update(cuda_ops.adagrad_update, 0.01, EPS), torch.optim.Adagrad, dim, 1),
            "sparse_adam": (update(cuda_ops.sparse_adam_update, BETAS, 1e-3, EPS), torch.optim.SparseAdam, 2 * dim, 1),
            "rowwise_adagrad": (update(cuda_ops.rowwise_adagrad_update, 0.01, EPS), None, 1, 1),
            "adam": (adam, None, 2 * dim, 2),  # of rows that missed no step
        }

        def make(run, optimizer, state_words, step_words):
            words, stride, steps = self._store(dim, state_words, step_words)
            kernel = self._run_on((words, stride, dim, steps), run)
            reference = self._sparse_step(optimizer) if optimizer else None
            moved_bytes = 4 * (3 * dim + 2 * state_words) + 8 * (step_words + 1)
            return TensorCase(kernel, reference, self.a_row, moved_bytes, stride, stride)

        return {name: lambda arguments=arguments: make(*arguments) for name, arguments in cases.items()}

    def _run_on(self, store, run):
        return lambda k: run(store, (self.unique[k], self.grad[: self.a_row[k]]))

    def _sparse_step(self, optimizer):
        """PyTorch's step with sparse gradients, which it sums first: of lookups, where ours gets rows."""
        parameter = torch.nn.Parameter(torch.full((self.count, self.dim), 0.5, device=self.device))
        under_torch = optimizer([parameter], lr=0.01)

        def run(k):
            parameter.grad = torch.sparse_coo_tensor(
                self.ids[k][None], self.of_lookups, parameter.shape, check_invariants=False
            )
            under_torch.step()

        return run

    def _halves(self):
        dim, a_row = self.dim, self.a_row
        narrow = torch.empty(len(self.grad), dim, dtype=torch.bfloat16, device=self.device)

        def update(function, *numbers, state_words=0, seed=None):
            words, stride, steps = self._store((dim + 1) // 2, state_words)
            store = (words.view(torch.bfloat16), words, stride, dim, steps)
            kernel = self._run_on(store, lambda store, rows: function(*store, *rows, *numbers, 1.0, 7, seed=seed))
            return lambda: TensorCase(kernel, None, a_row, 8 * dim + 8 * state_words + 16, stride, stride)

        return {
            "half_sgd": update(cuda_ops.half_sgd_update, 0.01),
            "half_adagrad": update(cuda_ops.half_adagrad_update, 0.01, EPS, state_words=dim),
            "half_adagrad_random": update(cuda_ops.half_adagrad_update, 0.01, EPS, state_words=dim, seed=5),
            "narrow_rows": self._case(
                lambda k: cuda_ops.narrow_rows(self.grad[: a_row[k]], narrow[: a_row[k]]),
                lambda k: self.grad[: a_row[k]].to(torch.bfloat16),
                a_row,
                6 * dim,
                (dim + 1) // 2,
            ),
        }

    def _others(self):
        dim, a_row, slab = self.dim, self.a_row, self.slab
        bags = len(self.offsets)
        reduced = torch.empty(bags, dim, device=self.device)
        leaf = slab.clone().requires_grad_()
        share = bags / len(self.of_lookups)

        def pooled(k):
            return F.embedding_bag(self.inverse[k], leaf[: a_row[k]], self.offsets, mode="sum")

        def backward_case():
            graphs = [pooled(k) for k in range(len(a_row))]
            return TensorCase(
                lambda k: cuda_ops.bags_backward(reduced, self.inverse[k], self.offsets, slab[: a_row[k]]),
                lambda k: torch.autograd.grad(graphs[k], leaf, reduced, retain_graph=True),
                self.a_lookup,
                4 * dim * (share + 2) + 8,
                dim,
                self.stride,
            )

        def found(k):
            return index.find(self.unique[k], room[: a_row[k]])

        index, room = self._index(), torch.empty(len(slab), dtype=torch.int64, device=self.device)
        return {
            "reduce_bags": self._case(
                lambda k: cuda_ops.reduce_bags(slab[: a_row[k]], self.inverse[k], self.offsets, out=reduced),
                pooled,
                self.a_lookup,
                4 * dim * (share + 1) + 8,
            ),
            "bags_backward": backward_case,
            "dedup": self._case(
                lambda k: cuda_ops.dedup(self.ids[k]),
                lambda k: torch.unique(self.ids[k], return_inverse=True),
                self.a_lookup,
                16 + 24 * sum(a_row) / sum(self.a_lookup),
                2,
            ),
            "find": self._case(found, None, a_row, 32, 4),
            "fill_uniform": self._case(
                lambda k: fill_uniform(slab[: a_row[k]], self.unique[k], 1, 2, -1.0, 1.0),
                lambda k: slab[: a_row[k]].uniform_(-1, 1),
                a_row,
                4 * dim,
            ),
        }

    def _index(self):
        keys = torch.arange(self.count, device=self.device)
        if self.device == "cpu":
            index = cuda_ops.KeyIndex(self.count)
            index.add(keys.numpy(), keys.numpy())
            return _OnTensors(index)
        from cuda_ops.cuda.index import DeviceKeyIndex

        index = DeviceKeyIndex(self.count, self.device)
        index.add(keys, keys)
        return index

    def row_copies(self, words: int, stride: int) -> list[Callable[[int], object]]:
        """Ways to copy the first `words` floats of the records of a set, which are `stride` floats apart, to a slab."""
        slabs = [self.copied[: rows * words].view(rows, words) for rows in self.a_row]
        store = self.words[: self.count * stride]
        records = store.view(self.count, stride)[:, :words]
        return [
            lambda k: torch.index_select(records, 0, self.unique[k], out=slabs[k]),
            lambda k: cuda_ops.gather(store, stride, self.unique[k], slabs[k]),
            lambda k: slabs[k].copy_(records[self.unique[k]]),
        ]

    def lookup_copies(self) -> list[Callable[[int], object]]:
        """Ways to copy the row of each lookup from a slab."""
        flat, out = self.slab.view(-1), torch.empty_like(self.of_lookups)
        return [
            lambda k: torch.index_select(self.slab, 0, self.inverse[k], out=out),
            lambda k: cuda_ops.gather(flat, self.dim, self.inverse[k], out),
            lambda k: out.copy_(self.slab[self.inverse[k]]),
        ]

    def byte_copy(self, case: TensorCase) -> Callable[[int], object]:
        """A copy that moves as many bytes as the function does (half of them read, half written)."""
        sizes = [max(1, int(rows * case.moved_bytes / 2)) for rows in case.rows]
        source, target = (torch.ones(max(sizes), dtype=torch.uint8, device=self.device) for _ in range(2))
        return lambda k: target[: sizes[k]].copy_(source[: sizes[k]])

    def nanoseconds(self, function: Callable[[int], object], k: int) -> float:
        """Time one call: by the thread's clock, or between two events where the device is a GPU."""
        if self.device == "cpu":
            started = time.thread_time_ns()
            function(k)
            return time.thread_time_ns() - started
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # some 0.1 ms, in which the host gets ahead: what is timed is then the device's work
        begun.record()
        with cuda_ops.trusted():
            function(k)
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) * 1e6

    def fbgemm_step(self) -> Callable[[int], object] | None:
        """FBGEMM's lookup, backward and Adagrad in one table-batched operator; None where it is not installed."""
        try:
            import fbgemm_gpu.split_table_batched_embeddings_ops_training as fbgemm
            from fbgemm_gpu.split_embedding_configs import EmbOptimType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        except (ImportError, OSError):
            return None
        there = EmbeddingLocation.HOST if self.device == "cpu" else EmbeddingLocation.DEVICE
        device = fbgemm.ComputeDevice.CPU if self.device == "cpu" else fbgemm.ComputeDevice.CUDA
        table = fbgemm.SplitTableBatchedEmbeddingBagsCodegen(
            [(self.count, -(-self.dim // 4) * 4, there, device)],
            optimizer=EmbOptimType.EXACT_ADAGRAD,
            learning_rate=0.01,
            eps=EPS,
            pooling_mode=PoolingMode.NONE,
        )
        ends = torch.arange(len(self.of_lookups) + 1, device=self.device)
        grad = torch.ones(len(self.of_lookups), -(-self.dim // 4) * 4, device=self.device)
        return lambda k: table(self.ids[k], ends).backward(grad)

    def whole_step(self) -> Callable[[int], object]:
        """The same by functions of ours: dedup, gather, expand, sum per row, Adagrad."""
        scratch = () if self.device != "cpu" else (cuda_ops.DedupScratch(),)

        def run(k):
            unique, inverse = cuda_ops.dedup(self.ids[k], *scratch)
            slab, summed = self.slab[: len(unique)], self.copied[: len(unique) * self.dim].view(-1, self.dim)
            cuda_ops.gather(self.words, self.stride, unique, slab)
            cuda_ops.expand(slab, inverse, self.of_lookups)
            cuda_ops.segment_sum(self.of_lookups, inverse, summed)
            where = (self.words, self.stride, self.dim, self.steps, unique, summed)
            cuda_ops.adagrad_update(*where, 0.01, EPS, 1.0, 7)

        return run


class _OnTensors:
    """The host's index, given tensors."""

    def __init__(self, index):
        self._index = index

    def find(self, keys, out):
        return self._index.find(keys.numpy(), out.numpy())


def measure(table: TensorTable, names: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Return the figures of each function of `names` (all, if there are none)."""
    figures = {}
    for name, make in table.cases().items():
        if names and name not in names:
            continue
        table.words.fill_(0.5)
        case = make()
        copies = table.lookup_copies() if case.rows is table.a_lookup else table.row_copies(case.words, case.stride)
        functions = [case.kernel, table.byte_copy(case), *copies, *([case.torch] if case.torch else [])]
        kernel, copy, *rest = in_turns(table, functions, case.rows, repeats)
        rows = min(rest[: len(copies)])
        figures[name] = {
            "kernel_ns": kernel,
            "gb_per_s": case.moved_bytes / kernel,
            "copy_ns": copy,
            "rows_ns": rows,
            "torch_ns": rest[len(copies)] if case.torch else float("nan"),
            "to_copy": kernel / copy,
            "to_rows": kernel / rows,
            "unique_rows_per_row": sum(table.a_row) / sum(case.rows),
        }
    return figures


def measure_steps(table: TensorTable, repeats: int) -> dict[str, float]:
    """Return nanoseconds a lookup of a whole Adagrad step: of ours, and FBGEMM's where it is installed."""
    table.words.fill_(0.5)
    functions = {"ours": table.whole_step(), "fbgemm": table.fbgemm_step()}
    there = {name: function for name, function in functions.items() if function}
    times = in_turns(table, list(there.values()), table.a_lookup, repeats)
    return dict(zip(there, times, strict=True))


def in_turns(table, functions, rows, repeats) -> list[float]:
    """Run the functions in turns, each over all sets; return the lower quartile of each one's nanoseconds a row."""
    times = [[] for _ in functions]
    for k in (0, 1 % len(table.a_row)):  # compiles, and makes what is made once
        for function in functions:
            table.nanoseconds(function, k)
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            for k in range(len(table.a_row)):
                taken.append(table.nanoseconds(function, k) / rows[k])
    return [float(np.quantile(taken, 0.25)) for taken in times]
