"""The knowledge-graph example: graphs, model, ranking, and figures equal to plain PyTorch on 1 and 2 ranks."""

import kge
import numpy as np
import pytest
import torch
from kge_data import GROUP, Triples, load_graph, make_synthetic
from kge_model import ComplEx
from kge_ranking import Ranking, scores_of

from tests.examples.running import (
    DATA,
    assert_options_are_refused,
    assert_same_curve,
    needs_data,
    needs_mpi,
    run_here,
    run_on,
)

TINY = "--entities 120 --relations 4 --triples 900 --dim 3 --negatives 3 --epochs 2 --dtype float64".split()


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_one_rank_equals_plain(optimizer):
    options = [*TINY, "--optimizer", optimizer, "--lr", "0.05", "--batch-size", "50"]
    assert_same_curve(run_here(kge, *options, "--min-rows", 1), run_here(kge, "--plain", *options))


@pytest.mark.parametrize("staleness", ["none", "2"])
def test_one_rank_is_behind_nobody_and_equals_plain(staleness):
    options = [*TINY, "--batch-size", "50"]
    ours = run_here(kge, *options, "--min-rows", 1, "--staleness", staleness, "--techniques", "all")
    assert_same_curve(ours, run_here(kge, "--plain", *options))


@needs_mpi
def test_two_ranks_equal_plain_with_the_global_batch(tmp_path):
    options = [*TINY, "--batch-size", "37"]  # does not divide: the last batch is uneven
    figures = run_on(2, kge, tmp_path, *options, "--min-rows", 1)
    assert_same_curve(figures, run_here(kge, "--plain", "--plain-ranks", 2, *options))


def test_planted_structure_is_found():
    options = ["--plain", "--entities", 1000, "--relations", 10, "--triples", 20_000, "--dim", 32, "--held-out", 500]
    untrained = run_here(kge, *options, "--epochs", 1, "--lr", 0)[-1]
    epochs = run_here(kge, *options, "--epochs", 6)
    assert untrained["test_mrr"] < 0.03
    assert epochs[-1]["test_mrr"] > 0.2 and epochs[-1]["test_hits_at_10"] > 0.4


def test_negatives_drawn_in_the_loop_are_known_ahead_and_train_as_well():
    options = [*TINY, "--batch-size", "20", "--lr", "0.1", "--epochs", "4"]
    in_loop = run_here(kge, *options, "--min-rows", 1, "--negatives-in-loop")
    in_data = run_here(kge, *options, "--min-rows", 1)
    assert in_loop[-1]["intent_coverage"] >= 0.99
    assert in_loop[-1]["train_loss"] == pytest.approx(in_data[-1]["train_loss"], rel=0.1)
    assert in_loop[-1]["train_loss"] < in_loop[0]["train_loss"]


@needs_data("kge-toy")
def test_the_toy_graph_is_read_and_learned():
    graph = load_graph(DATA / "kge-toy")
    assert (graph.num_entities, graph.num_relations) == (280, 112)
    assert (len(graph.train), len(graph.held_out)) == (4565, 152)
    options = ["--data", DATA / "kge-toy", "--batch-size", 128, "--dim", 32]
    plain = run_here(kge, "--plain", *options, "--epochs", 3)
    assert plain[-1]["test_mrr"] > 0.4 and plain[-1]["test_hits_at_10"] > 0.7
    assert run_here(kge, "--plain", *options, "--epochs", 1, "--lr", 0)[-1]["test_mrr"] < 0.1


@needs_mpi
@needs_data("fb15k-237")
def test_fb15k_237_on_two_ranks_equals_plain(tmp_path):
    graph = load_graph(DATA / "fb15k-237")
    assert (graph.num_entities, graph.num_relations) == (14_541, 237)
    assert (len(graph.train), len(graph.held_out), len(graph.known)) == (17_535, 20_466, 38_001)
    options = ["--data", DATA / "fb15k-237", "--dim", 8, "--epochs", 1, "--dtype", "float64", "--held-out", 500]
    assert_same_curve(run_on(2, kge, tmp_path, *options), run_here(kge, "--plain", "--plain-ranks", 2, *options))


@pytest.mark.parametrize("seed", range(3))
def test_both_queries_give_the_score_by_its_definition(seed):
    rng = np.random.default_rng(seed)
    model = ComplEx(9, 4, 5).double()
    triples = np.stack([rng.integers(9, size=7), rng.integers(4, size=7), rng.integers(9, size=7)], axis=1)
    heads, tails, tail_queries, head_queries = model(Triples(triples, 9, 0, 0).__getitems__(range(7)))
    entity, relation = (torch.complex(*t.weight.detach().chunk(2, dim=1)) for t in (model.entity, model.relation))
    expected = (entity[triples[:, 0]] * relation[triples[:, 1]] * entity[triples[:, 2]].conj()).sum(1).real
    torch.testing.assert_close((tail_queries * tails).sum(1).detach(), expected)
    torch.testing.assert_close((head_queries * heads).sum(1).detach(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_filtered_ranks_equal_counting_one_by_one(seed):
    """Scores with many ties, and entities in pieces of any order."""
    rng = np.random.default_rng(seed)
    known = np.unique(
        np.stack([rng.integers(12, size=60), rng.integers(3, size=60), rng.integers(12, size=60)], 1), axis=0
    )
    triples = known[rng.permutation(len(known))[:9]]
    queries = torch.from_numpy(rng.integers(-2, 3, (18, 2)).astype(float))
    vectors = torch.from_numpy(rng.integers(-2, 3, (12, 2)).astype(float))
    answers = np.concatenate([triples[:, 2], triples[:, 0]])
    answer_scores = (queries * vectors[answers]).sum(1)
    ranking = Ranking(triples, known, 12)
    for piece in np.array_split(rng.permutation(12), 5):
        ranking.count(queries, answer_scores, piece, vectors[piece])
    true = {tuple(triple) for triple in known.tolist()}
    for query in range(18):
        head, relation, tail = triples[query % 9].tolist()
        others = [
            float(queries[query] @ vectors[entity])
            for entity in range(12)
            if ((head, relation, entity) if query < 9 else (entity, relation, tail)) not in true
        ]
        assert ranking.above[query] == sum(score > float(answer_scores[query]) for score in others)
        assert ranking.equal[query] == sum(score == float(answer_scores[query]) for score in others)


def test_ranks_become_scores():
    scores = scores_of(np.array([0, 1, 9, 9]), np.array([0, 2, 0, 1]))
    assert scores["test_mrr"] == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 10.5) / 4)
    assert scores["test_hits_at_10"] == 0.75


@pytest.mark.parametrize("seed", range(2))
def test_negatives_do_not_depend_on_the_batch(seed):
    triples = np.stack([np.arange(30), np.zeros(30, np.int64), np.arange(30)[::-1]], 1)
    dataset = Triples(triples, 50, 6, seed)
    dataset.set_epoch(2)
    order = np.random.default_rng(seed).permutation(30)
    whole = dataset.__getitems__(order)
    for name in ("head", "tail", "other_heads", "other_tails"):
        parts = [dataset.__getitems__(part)[name] for part in np.array_split(order, 4)]
        assert torch.equal(torch.cat(parts), whole[name])
    assert not torch.equal(whole["other_heads"], whole["other_tails"])
    dataset.set_epoch(3)
    assert not torch.equal(dataset.__getitems__(order)["other_tails"], whole["other_tails"])


@pytest.mark.parametrize("seed", range(2))
def test_made_graphs_repeat_and_hold_out_triples_that_are_not_trained_on(seed):
    graph, again = (make_synthetic(10 * GROUP, 3, 4000, seed) for _ in range(2))
    assert np.array_equal(graph.train, again.train) and np.array_equal(graph.held_out, again.held_out)
    train, held_out = ({tuple(triple) for triple in part.tolist()} for part in (graph.train, graph.held_out))
    assert not train & held_out and len(train) + len(held_out) == len(graph.known) < 4000
    assert graph.known[:, [0, 2]].max() < 10 * GROUP and graph.known[:, 1].max() < 3
    for relation in range(3):  # of 200 entities, those that a head is related to are of one group
        of = graph.known[(graph.known[:, 0] == graph.known[0, 0]) & (graph.known[:, 1] == relation)]
        assert len(of) <= GROUP


def test_graph_files_are_read_and_bad_ones_named(tmp_path):
    (tmp_path / "train.txt").write_text("a\tlikes\tb\nb\tlikes\ta\n")
    (tmp_path / "test.txt").write_text("a\tlikes\ta\n")
    (tmp_path / "entities.dict").write_text("1\tb\n0\ta\n")
    (tmp_path / "relations.dict").write_text("0\tlikes\n")
    graph = load_graph(tmp_path)
    assert graph.train.tolist() == [[0, 0, 1], [1, 0, 0]] and graph.held_out.tolist() == [[0, 0, 0]]
    assert (graph.num_entities, graph.num_relations) == (2, 1)
    (tmp_path / "valid.txt").write_text("a\thates\tb\n")
    with pytest.raises(ValueError, match="valid.txt: 'hates'"):
        load_graph(tmp_path)
    (tmp_path / "valid.txt").write_text("a\tlikes\n")
    with pytest.raises(ValueError, match="valid.txt: line 1 has 2 fields"):
        load_graph(tmp_path)
    (tmp_path / "valid.txt").unlink()
    (tmp_path / "entities.dict").write_text("0\ta\n2\tb\n")
    with pytest.raises(ValueError, match="entities.dict: expected lines of number, tab, name"):
        load_graph(tmp_path)
    (tmp_path / "test.txt").unlink()
    (tmp_path / "entities.dict").write_text("0\ta\n1\tb\n")
    with pytest.raises(FileNotFoundError, match="needs a file test.txt"):
        load_graph(tmp_path)


def test_bad_options_are_named(capsys):
    with pytest.raises(ValueError, match="--entities 39"):
        kge.main(["--plain", "--entities", "39"])
    with pytest.raises(ValueError, match="--triples 39"):
        kge.main(["--plain", "--triples", "39"])
    assert_options_are_refused(
        kge, capsys, ["--negatives", "0"], ["--held-out", "0"], ["--batch-size", "-1"], ["--staleness", "1.5"]
    )
