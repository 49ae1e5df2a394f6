"""Neighbour sampling for a graph convolution in mini-batches, in Numba.

Every draw is a hash of (seed, epoch, hop, node, draw), so what is sampled for a node depends neither on the batch that
it is in nor on the rank, the worker or the order of batches: shares of a global batch see what the whole batch sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from draws import mix
from numba import njit

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Graph:
    """An undirected graph without loops, as adjacency lists.

    Args:
        offsets: int64 `[N + 1]`; the neighbours of node v are `neighbours[offsets[v]:offsets[v + 1]]`, ascending.
        neighbours: int64 `[E]`, each edge in both directions.
        label: int64 `[N]`, -1 for a node without one.
    """

    offsets: np.ndarray
    neighbours: np.ndarray
    label: np.ndarray

    @property
    def num_nodes(self) -> int:
        return len(self.label)

    @property
    def num_classes(self) -> int:
        return int(self.label.max()) + 1


@dataclass(frozen=True)
class Hop:
    """The edges by which one layer gathers: target `to` (int64 `[E]`) sums `weight` (float64 `[E]`) times source `of`
    (int64 `[E]`).

    Nodes are numbered within the batch; the targets are the first `num_targets` of the sources.
    """

    of: np.ndarray
    to: np.ndarray
    weight: np.ndarray
    num_targets: int


class Sampler:
    """Samples what `layers` graph convolutions need for a set of nodes.

    Args:
        graph: the graph.
        layers: number of hops.
        fan_out: neighbours per node and hop; None takes all.
        seed: of the draws.
    """

    def __init__(self, graph: Graph, layers: int, fan_out: int | None, seed: int):
        if fan_out is not None and fan_out < 1:
            raise ValueError(f"fan_out must be at least 1 neighbour, or None for all; got {fan_out}")
        self.graph, self.layers, self.fan_out, self.seed = graph, layers, fan_out, seed
        self.epoch = 0
        self._place = np.full(graph.num_nodes, -1, dtype=np.int64)

    def sample(self, targets: np.ndarray) -> tuple[np.ndarray, list[Hop]]:
        """Return (nodes int64 `[n]`, hops from the outermost in) for distinct `targets` (int64 `[B]`).

        The first B of `nodes` are the targets, in their order.
        """
        nodes, hops = np.asarray(targets, dtype=np.int64), []
        for hop in range(self.layers):
            num_targets = len(nodes)
            limit = self.graph.num_nodes if self.fan_out is None else self.fan_out
            key = np.uint64(mix(np.uint64(self.seed & _MASK64))) ^ np.uint64(mix(np.uint64((self.epoch << 8) + hop)))
            nodes, of, to, weight = _gather_hop(
                self.graph.offsets, self.graph.neighbours, nodes, limit, key, self._place
            )
            hops.append(Hop(of, to, weight, num_targets))
        return nodes, hops[::-1]


@njit(cache=True)
def _draw_distinct(degree, count, key, chosen):
    """Fill `chosen[:count]` with distinct numbers below `degree`: Floyd's algorithm (Bentley & Floyd 1987)."""
    for at in range(count):
        last = degree - count + at
        drawn = np.int64(mix(key ^ mix(np.uint64(at))) % np.uint64(last + 1))
        for earlier in range(at):
            if chosen[earlier] == drawn:
                drawn = last
                break
        chosen[at] = drawn


@njit(cache=True)
def _gather_hop(offsets, neighbours, targets, limit, key, place):
    """Take each target and up to `limit` of its neighbours; return (nodes, of, to, weight).

    Weights are those of the normalised adjacency with loops (Kipf & Welling 2017), 1 / sqrt((d_u + 1)(d_v + 1)), times
    the share of neighbours taken turned over, so that the sum's expectation is the sum over all of them.
    `place` (int64 `[N]`, all -1) is scratch, and is left as it was.
    """
    edges = len(targets)
    for v in targets:
        edges += min(limit, offsets[v + 1] - offsets[v])
    nodes = np.empty(edges, np.int64)
    of, to, weight = np.empty(edges, np.int64), np.empty(edges, np.int64), np.empty(edges, np.float64)
    chosen = np.empty(max(1, edges), np.int64)
    for at, v in enumerate(targets):
        nodes[at] = v
        place[v] = at
    num_nodes, edge = len(targets), 0
    for at, v in enumerate(targets):
        degree = offsets[v + 1] - offsets[v]
        taken = min(limit, degree)
        of[edge], to[edge], weight[edge] = at, at, 1.0 / (degree + 1)
        edge += 1
        if taken < degree:
            _draw_distinct(degree, taken, key ^ mix(np.uint64(v)), chosen)
        for i in range(taken):
            u = neighbours[offsets[v] + (chosen[i] if taken < degree else i)]
            if place[u] < 0:
                place[u] = num_nodes
                nodes[num_nodes] = u
                num_nodes += 1
            scale = degree / taken
            of[edge], to[edge] = place[u], at
            weight[edge] = scale / np.sqrt((degree + 1.0) * (offsets[u + 1] - offsets[u] + 1.0))
            edge += 1
    for at in range(num_nodes):
        place[nodes[at]] = -1
    return nodes[:num_nodes].copy(), of, to, weight
