"""Graphs for the example: one with communities and power-law degrees that it makes itself, or one from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gcn_sampling import Graph, Sampler
from torch.utils.data import Dataset

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.1


@dataclass(frozen=True)
class Task:
    """A graph, and which of its labelled nodes are for training, validation and test (int64, ascending, disjoint)."""

    graph: Graph
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Neighbourhoods(Dataset):
    """Nodes to classify; a batch of them comes with the sampled neighbourhood that two layers need.

    A batch is a dict: `nodes` int64 [n] are the nodes whose embeddings are needed; `hops`, from the outermost in, have
    `of`, `to` int64 [E] and `weight` [E] (see `gcn_sampling.Hop`) and `num_targets`; `label` is int64 [B].
    """

    def __init__(self, graph: Graph, nodes: np.ndarray, sampler: Sampler, dtype: torch.dtype):
        self.graph, self.nodes, self.sampler, self.dtype = graph, nodes, sampler, dtype

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, index: int) -> dict[str, object]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, object]:
        """Return a whole batch; `runs.as_is` is the collate function that goes with it."""
        targets = self.nodes[np.asarray(indices, dtype=np.int64)]
        nodes, hops = self.sampler.sample(targets)
        return {
            "nodes": torch.from_numpy(nodes),
            "hops": [
                {
                    "of": torch.from_numpy(hop.of),
                    "to": torch.from_numpy(hop.to),
                    "weight": torch.from_numpy(hop.weight).to(self.dtype),
                    "num_targets": hop.num_targets,
                }
                for hop in hops
            ],
            "label": torch.from_numpy(self.graph.label[targets]),
        }

    def set_epoch(self, epoch: int) -> None:
        """Sample other neighbours than in other epochs; call it before iterating over the loader."""
        self.sampler.epoch = epoch


def load_graph(path: str | Path, seed: int) -> Task:
    """Read a graph from an `.npz`: `edge_index` int64 [2, E], `label` int64 [N] (-1: none), `test_index` int64.

    A tenth of the labelled nodes that are not for the test validate, chosen by `seed`.
    Raises FileNotFoundError, KeyError or ValueError, naming the file.
    """
    with np.load(path, allow_pickle=False) as file:
        missing = {"edge_index", "label", "test_index"} - set(file.files)
        if missing:
            raise KeyError(f"{path} has no array {sorted(missing)}; it has {sorted(file.files)}")
        edges, label, test = (file[name].astype(np.int64) for name in ("edge_index", "label", "test_index"))
    for name, nodes in (("edge_index", edges), ("test_index", test)):
        if nodes.size and not 0 <= nodes.min() <= nodes.max() < len(label):
            raise ValueError(
                f"{path}: {name} has nodes {nodes.min()} to {nodes.max()}; label says there are {len(label)}"
            )
    graph = make_graph(edges, label)
    labelled = np.setdiff1d(np.flatnonzero(label >= 0), test)
    validation = chosen_share(labelled, VALIDATION_SHARE, seed)
    return Task(graph, np.setdiff1d(labelled, validation), validation, np.unique(test))


def make_synthetic(num_nodes: int, seed: int, degree: float = 10.0, classes: int = 8, mixing: float = 0.2) -> Task:
    """Make a graph of communities whose degrees follow a power law; a node's label is its community.

    A degree-corrected block model (Karrer & Newman 2011): the ends of an edge are drawn by weights of Pareto's law
    with exponent 2.5, the second one within the community of the first except for a share `mixing`. Features there
    are none: labels can be learned from the structure alone.
    """
    if num_nodes < 10 * classes:
        raise ValueError(f"--nodes {num_nodes} is too few for {classes} communities; give at least {10 * classes}")
    rng = np.random.default_rng(seed)
    weight = np.minimum(rng.pareto(1.5, num_nodes) + 1.0, num_nodes**0.5)
    label = rng.integers(0, classes, num_nodes)
    edges = int(num_nodes * degree / 2)
    first = _drawn(weight, np.arange(num_nodes), edges, rng)
    second = _drawn(weight, np.arange(num_nodes), edges, rng)
    inside = rng.random(edges) >= mixing
    for community in range(classes):
        chosen = np.flatnonzero(inside & (label[first] == community))
        second[chosen] = _drawn(weight, np.flatnonzero(label == community), len(chosen), rng)
    held_out = chosen_share(np.arange(num_nodes), VALIDATION_SHARE + TEST_SHARE, seed)
    validation = chosen_share(held_out, VALIDATION_SHARE / (VALIDATION_SHARE + TEST_SHARE), seed + 1)
    train = np.setdiff1d(np.arange(num_nodes), held_out)
    return Task(make_graph(np.stack([first, second]), label), train, validation, np.setdiff1d(held_out, validation))


def make_graph(edges: np.ndarray, label: np.ndarray) -> Graph:
    """Return the undirected graph of `edges` (int64 `[2, E]`), each counted once, loops left out."""
    num_nodes = len(label)
    first, second = np.concatenate([edges, edges[::-1]], axis=1)
    pairs = np.unique(first[first != second] * num_nodes + second[first != second])
    offsets = np.zeros(num_nodes + 1, dtype=np.int64)
    np.cumsum(np.bincount(pairs // num_nodes, minlength=num_nodes), out=offsets[1:])
    return Graph(offsets, pairs % num_nodes, np.asarray(label, dtype=np.int64))


def chosen_share(nodes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return a random `share` of `nodes`, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(nodes)[: round(len(nodes) * share)])


def _drawn(weight: np.ndarray, among: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` of the nodes `among`, by weight."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    cumulative = np.cumsum(weight[among])
    return among[np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right").clip(max=len(among) - 1)]
