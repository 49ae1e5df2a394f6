"""The examples' `--checkpoint-dir` and `--resume`: a run that was cut short comes to the same figures."""

from __future__ import annotations

import ctr
import gcn
import kge
import pytest

from tests.examples.running import assert_options_are_refused, run_here

CTR = ["--rows", 2600, "--dim", 4, "--samples", 1003, "--lr", 0.05, "--batch-size", 64, "--min-rows", 1]
GCN = ["--nodes", 901, "--dim", 6, "--hidden", 5, "--fan-out", 3, "--dtype", "float64", "--batch-size", 50]
FIGURES = ("train_loss", "test_auc", "test_log_loss", "validation_accuracy", "test_accuracy")


@pytest.mark.parametrize("example, options", [(ctr, [*CTR, "--dropout", 0.2]), (gcn, [*GCN, "--min-rows", 1])])
def test_resumed_run_comes_to_the_figures_of_the_whole(tmp_path, example, options, capsys):
    folder = tmp_path / "run"
    kept = ["--checkpoint-dir", folder, "--checkpoint-steps", 4, "--resume"]
    whole = run_here(example, *options, "--epochs", 2)
    assert "resumed" not in capsys.readouterr().out
    run_here(example, *options, "--epochs", 1, *kept)
    assert "resumed" not in capsys.readouterr().out
    resumed = run_here(example, *options, "--epochs", 2, *kept)
    assert f"resumed from {folder}" in capsys.readouterr().out
    assert [epoch["epoch"] for epoch in resumed] == [1, 2]
    compared = [name for name in FIGURES if name in whole[1]]
    assert len(compared) == 3
    assert {name: resumed[1][name] for name in compared} == {name: whole[1][name] for name in compared}


def test_options_that_cannot_be(capsys):
    for example in (ctr, gcn, kge):
        assert_options_are_refused(example, capsys, ["--checkpoint-dir", "run"], ["--resume"])
