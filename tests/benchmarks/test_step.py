"""The step benchmark runs, checks its own result and writes its figures; its speed is no matter here."""

import json
from importlib.util import find_spec

import pytest

from tests.launch import ROOT, launch, mpirun

SMALL = ["--rows", "3000", "--dim", "4", "--batch", "32", "--fields", "3", "--steps", "8", "--block", "4"]
needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None or mpirun() is None, reason="no mpi4py or no mpirun")


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=needs_mpi)])
@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
def test_both_sides_end_with_equal_tables(tmp_path, ranks, optimizer):
    path, options = tmp_path / "figures.json", [*SMALL, "--warmup", "3", "--optimizer", optimizer]
    result = launch(ranks, ROOT / "benchmarks" / "step.py", *options, "--json", str(path))
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())
    assert json.loads(result.stdout.splitlines()[-1]) == figures
    assert figures["ranks"] == max(ranks, 1)
    assert figures["largest_difference"] <= 1e-5
    assert figures["ratio"] == pytest.approx(
        figures["step_milliseconds"]["adaloader"] / figures["step_milliseconds"]["plain"]
    )
    assert {"keys", "exchange", "gather", "backward", "update", "waiting"} <= set(figures["part_milliseconds"])


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_many_tables_are_compared_with_one(optimizer):
    options = [*SMALL, "--warmup", "3", "--tables", "3", "--optimizer", optimizer]
    result = launch(0, ROOT / "benchmarks" / "step.py", *options)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    step = figures["step_milliseconds"]
    assert figures["ratio_to_one_table"] == pytest.approx(step["adaloader"] / step["one_table"])


def test_tables_that_are_not_as_many_as_fields_are_refused():
    result = launch(0, ROOT / "benchmarks" / "step.py", "--tables", "5")
    assert result.returncode == 2
    assert "as many as --fields (26)" in result.stderr


def test_blocks_too_short_to_measure_are_refused():
    result = launch(0, ROOT / "benchmarks" / "step.py", "--steps", "8", "--block", "2")
    assert result.returncode == 2
    assert "--steps 8 --block 2" in result.stderr
