"""The click-through benchmark runs, and its two sides end with equal weights; its speed is no matter here."""

import json

import pytest

from tests.launch import ROOT, launch

SMALL = ["--rows", "31200", "--dim", "4", "--batch", "64", "--steps", "6", "--block", "3", "--warmup", "4"]


@pytest.mark.parametrize("tables", [1, 26])
def test_both_sides_end_with_equal_weights(tables):
    result = launch(0, ROOT / "benchmarks" / "ctr_step.py", *SMALL, "--tables", str(tables))
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    step = figures["wall_milliseconds"]
    assert figures["largest_difference"] <= 1e-4
    assert figures["wall"]["to_dense_gradients"] == pytest.approx(step["AdaLoader"] / step["plain, dense gradients"])


def test_blocks_too_short_to_measure_are_refused():
    result = launch(0, ROOT / "benchmarks" / "ctr_step.py", "--steps", "6", "--block", "2")
    assert result.returncode == 2
    assert "--steps 6 --block 2" in result.stderr
