"""The matrix example: its matrices, and figures equal to plain PyTorch on 1 and 2 ranks."""

import mf
import numpy as np
import pytest
import torch
from mf_data import load_matrix, make_synthetic, split

from tests.examples.running import assert_options_are_refused, assert_same_curve, needs_mpi, run_here, run_on

TINY = "--rows 300 --columns 90 --entries 3000 --dim 5 --epochs 2 --batch-size 37 --dtype float64".split()


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_one_rank_equals_plain(optimizer):
    options = [*TINY, "--optimizer", optimizer, "--lr", "0.05"]
    assert_same_curve(run_here(mf, *options, "--min-rows", 1), run_here(mf, "--plain", *options))


@pytest.mark.parametrize("staleness", ["none", "2"])
def test_one_rank_is_behind_nobody_and_equals_plain(staleness):
    options = TINY
    ours = run_here(mf, *options, "--min-rows", 1, "--staleness", staleness, "--techniques", "all")
    assert_same_curve(ours, run_here(mf, "--plain", *options))


@needs_mpi
def test_two_ranks_equal_plain_with_the_global_batch(tmp_path):
    figures = run_on(2, mf, tmp_path, *TINY, "--min-rows", 1)
    assert_same_curve(figures, run_here(mf, "--plain", "--plain-ranks", 2, *TINY))


@needs_mpi
def test_two_ranks_without_a_bound_on_staleness_learn_as_well(tmp_path):
    options = ["--rows", 1000, "--columns", 100, "--entries", 60_000, "--epochs", 4, "--batch-size", 64]
    asynchronous = run_on(2, mf, tmp_path, *options, "--min-rows", 1, "--staleness", "none")
    plain = run_here(mf, "--plain", *options)
    assert asynchronous[-1]["test_rmse"] < 1.1 * plain[-1]["test_rmse"] < 0.5


def test_planted_factors_are_found():
    options = ["--plain", "--rows", 2000, "--columns", 200, "--entries", 200_000]
    untrained = run_here(mf, *options, "--epochs", 1, "--lr", 0)[-1]["test_rmse"]
    epochs = run_here(mf, *options, "--epochs", 4)
    assert 0.1 < epochs[-1]["test_rmse"] < 0.4 < 0.9 < untrained
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


@pytest.mark.parametrize("seed", range(2))
def test_made_entries_are_distinct_follow_zipf_and_repeat(seed):
    entries = make_synthetic(1000, 500, 50_000, seed)
    again = make_synthetic(1000, 500, 50_000, seed)
    assert torch.equal(entries.row, again.row) and torch.equal(entries.value, again.value)
    pairs = entries.row * 500 + entries.column
    assert len(pairs.unique()) == len(pairs) < 50_000
    counts = entries.row.bincount(minlength=1000).sort(descending=True).values.double()
    assert counts[0] > 3 * counts[30] > 3 * counts[500]
    assert 0.5 < entries.value.std() < 1.5


def test_split_keeps_every_entry_once():
    entries = make_synthetic(50, 40, 900, seed=1)
    train, held_out = split(entries, seed=3)
    assert len(held_out) == len(entries) // 10
    both = torch.cat([part.row * 40 + part.column for part in (train, held_out)])
    assert torch.equal(both.sort().values, entries.row * 40 + entries.column)


def test_matrix_files_are_read_and_bad_ones_named(tmp_path):
    path = tmp_path / "matrix.npz"
    np.savez(path, row=np.array([3, 0], np.int32), column=np.array([1, 2]), value=np.array([0.5, 2.0], np.float32))
    entries = load_matrix(path)
    assert entries.shape == (4, 3) and entries.value.tolist() == [0.5, 2.0] and entries.row.dtype == torch.int64
    for arrays, message in (
        (dict(row=[0], column=[1, 2], value=[1.0, 2.0]), "shapes"),
        (dict(row=[0, -1], column=[1, 2], value=[1.0, 2.0]), "row has int64 from -1"),
        (dict(row=[0, 1], column=[1.5, 2.0], value=[1.0, 2.0]), "column has float64"),
        (dict(row=[0, 1], column=[1, 2], value=[1.0, np.nan]), "not finite"),
        (dict(row=[], column=[], value=[]), "n at least 1"),
    ):
        np.savez(path, **{name: np.array(values) for name, values in arrays.items()})
        with pytest.raises(ValueError, match=f"matrix.npz.*{message}"):
            load_matrix(path)
    np.savez(path, row=np.array([0]))
    with pytest.raises(KeyError, match="column.*value"):
        load_matrix(path)


def test_a_matrix_from_a_file_is_factorised(tmp_path):
    entries = make_synthetic(300, 60, 6000, seed=0)
    path = tmp_path / "matrix.npz"
    np.savez(path, row=entries.row.numpy(), column=entries.column.numpy(), value=entries.value.numpy())
    options = ["--data", path, "--epochs", 2, "--batch-size", 64]
    assert_same_curve(run_here(mf, *options, "--min-rows", 1), run_here(mf, "--plain", *options), 1e-4)


def test_bad_options_are_named(capsys):
    with pytest.raises(ValueError, match="rows; got 0"):
        mf.main(["--plain", "--rows", "0"])
    assert_options_are_refused(
        mf, capsys, ["--epochs", "0"], ["--dim", "0"], ["--staleness", "-1"], ["--staleness", "some"]
    )
