"""The benchmark of kernels runs, and gives figures for each function; what they are is no matter here."""

import json
import math

import pytest
import torch

from tests.launch import ROOT, launch

SMALL = ["--dims", "3", "--cold", "1", "--warm", "50", "--lookups", "300", "--sets", "2", "--repeats", "1"]


def test_each_function_has_its_figures(tmp_path):
    path = tmp_path / "figures.json"
    result = launch(0, ROOT / "benchmarks" / "kernels.py", *SMALL, "--json", str(path))
    assert result.returncode == 0, result.stderr
    cold, warm = json.loads(path.read_text())["results"]
    assert cold["table"] == "cold" and warm["records"] == 50
    for results in (cold, warm):
        figures = results["kernels"]
        assert {"gather", "adagrad_update", "adam", "half_adagrad_random", "reduce_bags", "bags_backward"} <= set(
            figures
        )
        for name, figure in figures.items():
            assert figure["kernel_ns"] > 0 and figure["copy_ns"] > 0 and figure["rows_ns"] > 0, name
            assert figure["to_rows"] == pytest.approx(figure["kernel_ns"] / figure["rows_ns"])
            assert figure["torch_ns"] > 0 or math.isnan(figure["torch_ns"]), name
        assert results["steps_ns_per_lookup"]["ours"] > 0


def test_one_table_of_a_number_of_rows_in_double_precision(tmp_path):
    path = tmp_path / "figures.json"
    options = ["--rows", "70", "--dtype", "float64", "--only", "gather", "adagrad_update", "expand"]
    result = launch(0, ROOT / "benchmarks" / "kernels.py", *SMALL, *options, "--json", str(path))
    assert result.returncode == 0, result.stderr
    (results,) = json.loads(path.read_text())["results"]
    assert results["records"] == 70 and set(results["kernels"]) == {"gather", "adagrad_update", "expand"}
    assert all(figure["kernel_ns"] > 0 for figure in results["kernels"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_reason_is_said():
    result = launch(0, ROOT / "benchmarks" / "kernels.py", "--device", "cuda")
    assert result.returncode == 0, result.stderr
    assert "nothing is measured on cuda: torch finds no CUDA device here" in result.stdout
