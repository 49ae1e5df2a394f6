"""The word-vector example: its pairs and texts, and figures equal to plain PyTorch on 1 and 2 ranks."""

import numpy as np
import pytest
import torch
import word2vec
from word2vec_data import SENTENCE, SYNONYMS, Positions, load_text, make_synthetic

from tests.examples.running import (
    DATA,
    assert_options_are_refused,
    assert_same_curve,
    needs_data,
    needs_mpi,
    run_here,
    run_on,
)

TINY = "--words 90 --length 800 --dim 4 --negatives 3 --epochs 2 --subsample 0.02 --dtype float64".split()


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_one_rank_equals_plain(optimizer):
    options = [*TINY, "--optimizer", optimizer, "--batch-size", "50"]
    assert_same_curve(run_here(word2vec, *options, "--min-rows", 1), run_here(word2vec, "--plain", *options))


@pytest.mark.parametrize("staleness", ["none", "2"])
def test_one_rank_is_behind_nobody_and_equals_plain(staleness):
    options = [*TINY, "--batch-size", "50"]
    ours = run_here(word2vec, *options, "--min-rows", 1, "--staleness", staleness, "--techniques", "all")
    assert_same_curve(ours, run_here(word2vec, "--plain", *options))


@needs_mpi
@pytest.mark.parametrize(
    "options", [[], ["--window", "1", "--batch-size", "1", "--length", "200"]], ids=["ragged", "no pairs at times"]
)
def test_two_ranks_equal_plain_with_the_global_batch(tmp_path, options):
    options = [*TINY, "--batch-size", "37", *options]
    figures = run_on(2, word2vec, tmp_path, *options, "--min-rows", 1)
    assert_same_curve(figures, run_here(word2vec, "--plain", "--plain-ranks", 2, *options))


def test_planted_synonyms_are_found():
    options = ["--plain", "--words", 600, "--length", 60_000, "--dim", 32, "--batch-size", 256]
    untrained = run_here(word2vec, *options, "--epochs", 1, "--lr", 0)[-1]
    epochs = run_here(word2vec, *options, "--epochs", 3)
    assert untrained["synonyms_found"] < 0.03
    assert epochs[-1]["synonyms_found"] > 0.6
    assert epochs[-1]["test_loss"] < 0.7 * untrained["test_loss"]


def test_negatives_drawn_in_the_loop_are_known_ahead_and_train_as_well():
    options = [*TINY, "--batch-size", "20", "--epochs", "3"]
    in_loop = run_here(word2vec, *options, "--min-rows", 1, "--negatives-in-loop")
    in_data = run_here(word2vec, *options, "--min-rows", 1)
    assert in_loop[-1]["intent_coverage"] >= 0.99
    assert in_loop[-1]["test_loss"] == pytest.approx(in_data[-1]["test_loss"], rel=0.05)
    assert in_loop[-1]["train_loss"] < in_loop[0]["train_loss"]


@needs_mpi
@needs_data("text-toy")
def test_the_toy_text_on_two_ranks_equals_plain(tmp_path):
    options = ["--data", DATA / "text-toy" / "small.txt", "--dim", 8, "--epochs", 1, "--dtype", "float64"]
    plain = run_here(word2vec, "--plain", "--plain-ranks", 2, *options)
    assert_same_curve(run_on(2, word2vec, tmp_path, *options), plain)
    assert plain[-1]["test_loss"] < 0.8 * 6 * np.log(2)  # what 1 pair and 5 negatives cost a model that knows nothing


def positions_of(seed: int, **settings) -> tuple[np.ndarray, Positions]:
    text = np.minimum(np.random.default_rng(seed).geometric(0.15, 300), 20) - 1
    counts = np.bincount(text, minlength=20)
    settings = {"window": 3, "negatives": 2, "subsample": 0.02, "seed": seed, **settings}
    return text, Positions(text, counts, **settings)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_do_not_depend_on_the_batch(seed):
    _, dataset = positions_of(seed)
    dataset.set_epoch(1)
    order = np.random.default_rng(seed).permutation(300)
    whole = dataset.__getitems__(order)
    parts = [dataset.__getitems__(part) for part in np.array_split(order, 7)]
    for name in ("centre", "context", "negatives"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert sum(part["positions"] for part in parts) == whole["positions"] == 300
    dataset.set_epoch(2)
    assert not torch.equal(dataset.__getitems__(order)["negatives"][:10], whole["negatives"][:10])


@pytest.mark.parametrize("seed", range(3))
def test_pairs_lie_in_their_windows_and_none_is_missing(seed):
    """Without subsampling, a pair of a distance d is seen in (window - d + 1) / window of the epochs."""
    text, dataset = positions_of(seed, subsample=0, negatives=0)
    seen = np.zeros((300, 300))
    for epoch in range(200):
        dataset.set_epoch(epoch)
        centres, contexts = dataset._pairs(np.arange(300))
        assert len(set(zip(centres.tolist(), contexts.tolist(), strict=True))) == len(centres)
        seen[centres, contexts] += 1 / 200
    distance = np.abs(np.subtract.outer(np.arange(300), np.arange(300)))
    assert seen[(distance == 0) | (distance > 3)].sum() == 0
    for apart in (1, 2, 3):
        assert seen[distance == apart].mean() == pytest.approx((4 - apart) / 3, abs=0.02)
    batch = dataset.__getitems__([5])
    assert set(batch["centre"].tolist()) <= {text[5]} and "negatives" not in batch


def test_frequent_words_are_left_out_as_often_as_stated():
    text, dataset = positions_of(0, subsample=0.02)
    kept = np.zeros(300)
    for epoch in range(400):
        dataset.set_epoch(epoch)
        kept += dataset._is_kept(np.arange(300)) / 400
    frequency = np.bincount(text)[text] / 300
    np.testing.assert_allclose(kept, np.minimum(1, np.sqrt(0.02 / frequency)), atol=0.17)  # 6.8 standard deviations
    assert kept.mean() == pytest.approx(np.minimum(1, np.sqrt(0.02 / frequency)).mean(), abs=0.01)


def test_negatives_follow_the_power_of_the_frequency():
    text, dataset = positions_of(1, negatives=50, subsample=0)
    drawn = dataset.__getitems__(np.arange(300))["negatives"].numpy().ravel()
    expected = np.bincount(text, minlength=20) ** 0.75
    share = np.bincount(drawn, minlength=20) / len(drawn)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.01)


@pytest.mark.parametrize("seed", range(2))
def test_made_texts_repeat_and_use_synonyms_alike(seed):
    text, again = (make_synthetic(60, 20_000, seed) for _ in range(2))
    assert np.array_equal(text.train, again.train) and np.array_equal(text.held_out, again.held_out)
    assert len(text.train) + len(text.held_out) == 20_000 // SENTENCE * SENTENCE
    assert np.bincount(text.meaning).tolist() == [SYNONYMS] * (60 // SYNONYMS)
    counts = np.bincount(text.train, minlength=60).astype(float)
    for meaning in range(60 // SYNONYMS):
        of = counts[text.meaning == meaning]
        assert np.abs(of - of.mean()).max() <= 6 * np.sqrt(of.mean() + 1)


def test_texts_are_read_and_rare_words_left_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat the dog\nthe cat once " * 20 + "never")
    text = load_text(path, min_count=2)
    assert text.words == ["the", "cat", "dog", "once"] and text.meaning is None
    assert (len(text.train), len(text.held_out)) == (133, 7)
    assert np.concatenate([text.train, text.held_out])[:7].tolist() == [0, 1, 0, 2, 0, 1, 3]
    with pytest.raises(ValueError, match="text.txt has 1 words that occur 60 times or more"):
        load_text(path, min_count=60)


def test_bad_options_are_named(capsys):
    with pytest.raises(ValueError, match="--words 14"):
        word2vec.main(["--plain", "--words", "14"])
    with pytest.raises(ValueError, match="--length 39"):
        word2vec.main(["--plain", "--length", "39"])
    assert_options_are_refused(word2vec, capsys, ["--window", "0"], ["--subsample", "-1"], ["--dim", "0"])
