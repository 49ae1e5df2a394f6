"""Which rank trains which nodes: parts of a graph with few edges between them, and batches drawn from the parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gcn_sampling import Graph
from numba import njit
from torch.utils.data import Sampler

PASSES = 10


def partition(graph: Graph, counted: np.ndarray, parts: int) -> np.ndarray:
    """Return the part of every node, int64 `[N]`; of the nodes `counted` (int64) each part has as many, give or take
    one.

    Nodes come one by one, in breadth-first order, and go where most of their neighbours are, less the fuller that part
    is (linear deterministic greedy, Stanton & Kliot 2012); later passes know where all neighbours were before
    (restreaming, Nishimura & Ugander 2013).
    """
    if parts < 1:
        raise ValueError(f"a graph is cut into at least 1 part; got {parts}")
    counts = np.zeros(graph.num_nodes, dtype=np.int64)
    counts[counted] = 1
    room = np.full(parts, len(counted) // parts, dtype=np.int64)
    room[: len(counted) % parts] += 1
    order = _breadth_first(graph.offsets, graph.neighbours)
    part_of = np.full(graph.num_nodes, -1, dtype=np.int64)
    for _ in range(PASSES):
        _stream(graph.offsets, graph.neighbours, order, counts, room, part_of)
    return part_of


def cut_share(graph: Graph, part_of: np.ndarray) -> float:
    """Return the share of edges whose ends are in different parts."""
    ends = np.repeat(part_of, np.diff(graph.offsets))
    return float(np.mean(ends != part_of[graph.neighbours])) if len(ends) else 0.0


class PartBatches(Sampler):
    """A batch sampler: each rank's batches are of its own part, shuffled anew each epoch.

    Args:
        part_of: the part of each sample, int64 `[n]`.
        batch_size: samples per rank.
        seed: of the order.
        parts: number of parts.
        rank: whose batches to give; None for those of one process that trains all parts' batches together.
    """

    def __init__(self, part_of: np.ndarray, batch_size: int, seed: int, parts: int, rank: int | None):
        self.samples = [np.flatnonzero(part_of == part) for part in range(parts)]
        self.batch_size, self.seed, self.rank, self.epoch = batch_size, seed, rank, 0

    def __len__(self) -> int:
        chosen = self.samples if self.rank is None else [self.samples[self.rank]]
        return max(-(-len(samples) // self.batch_size) for samples in chosen)

    def __iter__(self) -> Iterator[list[int]]:
        ordered = [
            np.random.default_rng([self.seed, self.epoch, part]).permutation(samples)
            for part, samples in enumerate(self.samples)
        ]
        chosen = ordered if self.rank is None else [ordered[self.rank]]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield np.concatenate([samples[start : start + self.batch_size] for samples in chosen]).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Shuffle otherwise than in other epochs; call it before iterating over the loader."""
        self.epoch = epoch


@njit(cache=True)
def _breadth_first(offsets, neighbours):
    """Return all nodes in breadth-first order, component by component."""
    num_nodes = len(offsets) - 1
    order, seen, end = np.empty(num_nodes, np.int64), np.zeros(num_nodes, np.bool_), 0
    for start in range(num_nodes):
        if seen[start]:
            continue
        seen[start], order[end] = True, start
        at, end = end, end + 1
        while at < end:
            v = order[at]
            at += 1
            for u in neighbours[offsets[v] : offsets[v + 1]]:
                if not seen[u]:
                    seen[u], order[end] = True, u
                    end += 1
    return order


@njit(cache=True)
def _stream(offsets, neighbours, order, counts, room, part_of):
    """Place every node anew; `part_of` says where nodes were (-1: nowhere yet), and is changed."""
    parts = len(room)
    load = np.zeros(parts, np.int64)
    near = np.empty(parts, np.int64)
    for v in order:
        near[:] = 0
        for u in neighbours[offsets[v] : offsets[v + 1]]:
            if part_of[u] >= 0:
                near[part_of[u]] += 1
        best, best_score, best_free = -1, -1.0, -1.0
        for part in range(parts):
            if counts[v] and load[part] >= room[part]:
                continue
            free = 1.0 - load[part] / max(1, room[part])
            score = near[part] * free
            if score > best_score or (score == best_score and free > best_free):
                best, best_score, best_free = part, score, free
        part_of[v] = best
        load[best] += counts[v]
