"""The graph example: its sampling, its graphs, its partitions, and figures equal to plain PyTorch on 1 and 2 ranks."""

import json
from importlib.util import find_spec

import gcn
import numpy as np
import pytest
import torch
from gcn_data import Neighbourhoods, chosen_share, load_graph, make_graph, make_synthetic
from gcn_model import GCN
from gcn_sampling import Sampler
from partition import PartBatches, cut_share, partition

from tests.launch import ROOT, launch, mpirun

PROGRAM = ROOT / "examples" / "gcn.py"
GRAPHS = ROOT.parent / "shared" / "data" / "graphs"
TINY = ["--nodes", "901", "--dim", "6", "--hidden", "5", "--fan-out", "3", "--epochs", "2", "--dtype", "float64"]
SCORES = ("train_loss", "validation_accuracy", "test_accuracy")
needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None or mpirun() is None, reason="no mpi4py or no mpirun")


def train(ranks: int, folder, *options: str) -> dict:
    """Run the example on `ranks` ranks; return the figures that it wrote."""
    path = folder / "figures.json"
    result = launch(ranks, PROGRAM, *options, "--json", str(path))
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


def train_here(*options: str) -> list[dict]:
    return [epoch.figures() for epoch in gcn.main(list(options))]


def assert_same_curve(ours: list[dict], plain: list[dict], tolerance: float = 1e-9) -> None:
    assert len(ours) == len(plain) > 0
    for mine, theirs in zip(ours, plain, strict=True):
        for name in SCORES:
            assert mine[name] == pytest.approx(theirs[name], abs=tolerance), f"{name} of epoch {mine['epoch']}"
        assert mine["intent_coverage"] >= 0.99


def random_graph(seed: int, num_nodes: int = 40):
    rng = np.random.default_rng(seed)
    edges = np.minimum(rng.integers(0, num_nodes, (2, 200)), rng.integers(0, num_nodes, (2, 200)))
    return make_graph(edges, rng.integers(0, 3, num_nodes))


def dense_adjacency(graph) -> np.ndarray:
    """The normalised adjacency with loops, as a matrix, by its definition."""
    adjacency = np.eye(graph.num_nodes)
    for v in range(graph.num_nodes):
        adjacency[v, graph.neighbours[graph.offsets[v] : graph.offsets[v + 1]]] = 1.0
    root = 1.0 / np.sqrt(adjacency.sum(1))
    return root[:, None] * adjacency * root[None, :]


@pytest.mark.parametrize("optimizer", sorted(gcn.OPTIMIZERS))
def test_one_rank_equals_plain_with_dropout(optimizer):
    options = [*TINY, "--optimizer", optimizer, "--dropout", "0.3", "--batch-size", "50"]
    assert_same_curve(train_here(*options, "--min-rows", "1"), train_here("--plain", *options))


def test_plain_learns_communities_from_structure_alone():
    epochs = train_here("--plain", "--nodes", "4000", "--dim", "16", "--hidden", "16", "--epochs", "3")
    assert epochs[-1]["test_accuracy"] > 0.75
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


@needs_mpi
@pytest.mark.parametrize("options", [[], ["--partition"]], ids=["shared", "partition"])
def test_two_ranks_equal_plain_with_the_global_batch(tmp_path, options):
    options = [*TINY, *options, "--batch-size", "37"]  # does not divide: the last batch is uneven
    figures = train(2, tmp_path, *options, "--min-rows", "1")
    assert figures["ranks"] == 2
    assert_same_curve(figures["epochs"], train_here("--plain", "--plain-ranks", "2", *options))


@needs_mpi
@pytest.mark.skipif(not GRAPHS.exists(), reason="the graphs are not beside the repository, in ../shared/data/graphs")
def test_pubmed_on_two_ranks_equals_plain(tmp_path):
    options = ["--data", str(GRAPHS / "pubmed.npz"), "--epochs", "1", "--dim", "16", "--dtype", "float64"]
    figures = train(2, tmp_path, *options)
    plain = train_here("--plain", "--plain-ranks", "2", *options)
    assert_same_curve(figures["epochs"], plain)
    assert plain[-1]["test_accuracy"] > 0.75
    assert figures["nodes"]["test"] == 1000


@pytest.mark.parametrize("seed", range(3))
def test_samples_do_not_depend_on_the_batch(seed):
    """Shares of a batch hold the edges of the whole batch, by node numbers: what 1, 2 and 4 ranks see is the same."""
    graph = random_graph(seed)
    targets = np.random.default_rng(seed).permutation(graph.num_nodes)[:12]

    def inner_edges(shares):
        found = {}
        for share in shares:
            nodes, hops = Sampler(graph, 2, 2, seed=5).sample(share)
            for of, to, weight in zip(hops[1].of, hops[1].to, hops[1].weight, strict=True):
                found[nodes[of], nodes[to]] = weight
        return found

    whole = inner_edges([targets])
    assert inner_edges(np.array_split(targets, 2)) == whole
    assert inner_edges(np.array_split(targets[::-1], 4)) == whole


@pytest.mark.parametrize("seed", range(3))
def test_all_neighbours_give_the_normalised_adjacency(seed):
    graph = random_graph(seed)
    targets = np.random.default_rng(seed).permutation(graph.num_nodes)[:7]
    nodes, hops = Sampler(graph, 2, None, seed=0).sample(targets)
    expected = (dense_adjacency(graph) @ dense_adjacency(graph))[targets]
    sums = np.zeros((7, graph.num_nodes))
    outer = np.zeros((hops[0].num_targets, len(nodes)))
    np.add.at(outer, (hops[0].to, hops[0].of), hops[0].weight)
    inner = np.zeros((7, hops[0].num_targets))
    np.add.at(inner, (hops[1].to, hops[1].of), hops[1].weight)
    np.add.at(sums, (slice(None), nodes), inner @ outer)
    np.testing.assert_allclose(sums, expected, atol=1e-14)


def test_the_mean_over_samples_is_the_sum_over_all_neighbours():
    graph = random_graph(1)
    hub = int(np.diff(graph.offsets).argmax())
    sampler, counts = Sampler(graph, 1, 2, seed=3), np.zeros(graph.num_nodes)
    for epoch in range(20_000):
        sampler.epoch = epoch
        nodes, (hop,) = sampler.sample(np.array([hub]))
        assert len(np.unique(nodes)) == len(nodes) == 3
        counts[nodes[hop.of]] += hop.weight
    np.testing.assert_allclose(counts / 20_000, dense_adjacency(graph)[hub], rtol=0.1, atol=1e-12)


def test_epochs_and_seeds_sample_otherwise_and_repeat():
    graph = random_graph(2)

    def nodes(seed, epoch):
        sampler = Sampler(graph, 2, 1, seed)
        sampler.epoch = epoch
        return sampler.sample(np.arange(10))[0].tolist()

    assert nodes(0, 1) == nodes(0, 1)
    assert len({tuple(nodes(seed, epoch)) for seed in (0, 1, -1) for epoch in (1, 2)}) == 6


def test_a_node_without_neighbours_and_no_nodes_at_all():
    graph = make_graph(np.array([[0, 1], [1, 1]]), np.array([0, 1, 1]))
    batches = Neighbourhoods(graph, np.arange(3), Sampler(graph, 2, 4, seed=0), torch.float64)
    model = GCN(3, 4, 4, 2).double()
    assert model(batches[2]).shape == (1, 2)
    assert batches[2]["nodes"].tolist() == [2]
    assert model(batches.__getitems__([])).shape == (0, 2)
    with pytest.raises(ValueError, match="fan_out must be at least 1 neighbour.*got 0"):
        Sampler(graph, 2, 0, seed=0)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_balanced_and_cut_few_edges(parts):
    task = make_synthetic(3000, seed=parts, mixing=0.05)
    part_of = partition(task.graph, task.train, parts)
    sizes = np.bincount(part_of[task.train], minlength=parts)
    assert part_of.min() >= 0 and sizes.max() - sizes.min() <= 1
    at_random = np.random.default_rng(0).integers(0, parts, len(part_of))
    if parts > 1:
        assert cut_share(task.graph, part_of) < 0.75 * cut_share(task.graph, at_random)


def test_parts_outnumber_the_nodes_to_train():
    task = make_synthetic(100, seed=0)
    part_of = partition(task.graph, task.train[:2], 3)
    assert sorted(part_of[task.train[:2]].tolist()) == [0, 1]
    with pytest.raises(ValueError, match="at least 1 part; got 0"):
        partition(task.graph, task.train, 0)


def test_batches_of_the_parts_together_are_those_of_one_process():
    part_of = np.random.default_rng(0).integers(0, 3, 50)
    whole = PartBatches(part_of, 4, seed=1, parts=3, rank=None)
    ranks = [PartBatches(part_of, 4, seed=1, parts=3, rank=rank) for rank in range(3)]
    for epoch in (1, 2):
        for sampler in (whole, *ranks):
            sampler.set_epoch(epoch)
        own = [list(sampler) for sampler in ranks]
        together = [sum((batches[t] for batches in own if t < len(batches)), []) for t in range(len(whole))]
        assert list(whole) == together
        assert sorted(sum(together, [])) == list(range(50))
        assert all({part_of[at] for batch in batches for at in batch} == {rank} for rank, batches in enumerate(own))


@pytest.mark.parametrize("seed", range(2))
def test_degrees_follow_a_power_law_and_splits_are_disjoint(seed):
    task = make_synthetic(20_000, seed)
    degree = np.sort(np.diff(task.graph.offsets))[::-1]
    assert degree[0] > 10 * degree.mean() and np.median(degree) < degree.mean()
    splits = np.concatenate([task.train, task.validation, task.test])
    assert np.array_equal(np.sort(splits), np.arange(20_000))
    again = make_synthetic(20_000, seed)
    assert np.array_equal(again.graph.neighbours, task.graph.neighbours) and np.array_equal(again.test, task.test)


def test_graph_files_are_read_and_bad_ones_named(tmp_path):
    path = tmp_path / "graph.npz"
    label = np.array([0, 1, -1, 1, 0])
    np.savez(path, edge_index=np.array([[0, 1, 2, 2], [1, 2, 0, 2]]), label=label, test_index=np.array([4]))
    task = load_graph(path, seed=0)
    assert task.graph.offsets.tolist() == [0, 2, 4, 6, 6, 6]
    assert task.test.tolist() == [4] and task.train.tolist() == [0, 1, 3]
    np.savez(path, edge_index=np.array([[0], [5]]), label=label, test_index=np.array([4]))
    with pytest.raises(ValueError, match="graph.npz: edge_index has nodes 0 to 5; label says there are 5"):
        load_graph(path, seed=0)
    np.savez(path, edge_index=np.array([[0], [1]]), label=label)
    with pytest.raises(KeyError, match="test_index"):
        load_graph(path, seed=0)


def test_bad_options_are_named(capsys):
    with pytest.raises(ValueError, match="--nodes 79"):
        gcn.main(["--plain", "--nodes", "79"])
    for option in (["--epochs", "0"], ["--fan-out", "0"], ["--batch-size", "-1"]):
        with pytest.raises(SystemExit):
            gcn.main(["--plain", *option])
        assert option[0] in capsys.readouterr().err


def test_a_share_is_drawn_without_repeats():
    drawn = chosen_share(np.arange(10, 110), 0.3, seed=4)
    assert len(np.unique(drawn)) == 30 and set(drawn) <= set(range(10, 110))
