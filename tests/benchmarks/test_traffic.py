"""The traffic benchmark counts what it says, on simulated ranks and on real ones alike."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from workloads import zipf

from benchmarks.traffic import main, parse, record
from tests.launch import ROOT, launch, mpirun

SMALL = ["--rows", "4000", "--samples", "12", "--steps", "12", "--width", "8"]
needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None or mpirun() is None, reason="no mpi4py or no mpirun")


def results_of(tmp_path, *options):
    path = tmp_path / "figures.json"
    main([*SMALL, "--json", str(path), *options])
    return json.loads(path.read_text())["results"]


def test_every_workload_is_counted_by_kind(tmp_path, capsys):
    results = results_of(tmp_path, "--ranks", "2")
    assert [result["workload"] for result in results] == ["ctr", "graph", "knowledge", "uniform"]
    for result in results:
        assert set(result["ways"]) == {"all", "relocation", "replication", "none", "full"}
        for way, run in result["ways"].items():
            if way != "full":
                kinds = sum(run["bytes_per_step_by_kind"].values())
                assert 0.9 * run["bytes_per_step"] <= kinds <= run["bytes_per_step"]
        assert "FETCH" in result["ways"]["none"]["bytes_per_step_by_kind"]
        assert "RECORDS" not in result["ways"]["replication"]["bytes_per_step_by_kind"]
    assert "all is" in capsys.readouterr().out


def test_full_replication_sends_every_changed_row_to_every_other_rank(tmp_path):
    (result,) = results_of(tmp_path, "--ranks", "3", "--workloads", "uniform", "--techniques", "none")
    args = parse([*SMALL, "--ranks", "3"])
    recording = record("uniform", args, 3)
    assert result["ways"]["full"]["bytes_per_step"] == len(recording.keys) * 2 * (4 + 8 * 4) / 12
    assert "ratio_to_best" not in result


def test_ids_follow_the_law_of_zipf():
    ids = zipf(np.random.default_rng(3), 1.05, 1000, (200_000,))
    counts = np.bincount(ids, minlength=1000)
    assert ids.min() == 0
    assert ids.max() == 999
    expected = np.arange(1, 1001) ** -1.05
    shares = counts / counts.sum()
    assert np.isclose(
        shares[10:20].sum() / shares[100:200].sum(), expected[10:20].sum() / expected[100:200].sum(), rtol=0.1
    )


@pytest.mark.parametrize("options", [["--steps", "0"], ["--warmup", "-1"]])
def test_numbers_of_steps_that_mean_nothing_are_refused(capsys, options):
    with pytest.raises(SystemExit):
        parse(options)
    assert " ".join(options) in capsys.readouterr().err


@pytest.mark.parametrize("staleness", ["none", "0"])
def test_steps_before_and_after_those_counted_do_not_count(tmp_path, staleness):
    """With as much done ahead at the beginning as at the end, rows used once cost the same whenever counting begins."""
    if staleness == "0" and find_spec("mpi4py") is None:
        pytest.skip("no mpi4py")
    size = ["--rows", "4000000", "--steps", "20", "--ranks", "3", "--staleness", staleness]
    options = [*size, "--workloads", "uniform", "--techniques", "all", "--lookahead", "6"]
    (whole,) = results_of(tmp_path, *options)
    (part,) = results_of(tmp_path, *options, "--warmup", "8")
    for way, tolerance in (("all", 0.1), ("full", 0.03)):
        expected = whole["ways"][way]["bytes_per_step"]
        assert part["ways"][way]["bytes_per_step"] == pytest.approx(expected, rel=tolerance)


@needs_mpi
def test_real_ranks_send_what_simulated_ones_do(tmp_path):
    path = tmp_path / "real.json"
    size = ["--rows", "40000", "--samples", "16", "--steps", "24", "--width", "16"]
    options = [*size, "--workloads", "uniform", "--techniques", "all", "none"]
    result = launch(2, ROOT / "benchmarks" / "traffic.py", "--mpi", *options, "--json", str(path))
    assert result.returncode == 0, result.stderr
    (real,) = json.loads(path.read_text())["results"]
    (simulated,) = results_of(tmp_path, "--ranks", "2", *options)
    for way in ("all", "none"):
        assert real["ways"][way]["bytes_per_step"] == pytest.approx(simulated["ways"][way]["bytes_per_step"], rel=0.1)


@needs_mpi
def test_exact_ranks_send_what_simulated_ones_do(tmp_path):
    path = tmp_path / "exact.json"
    size = ["--rows", "20000", "--samples", "16", "--width", "16", "--steps", "12", "--warmup", "16"]
    options = [*size, "--lookahead", "3", "--staleness", "0", "--workloads", "knowledge", "--techniques", "all", "none"]
    result = launch(2, ROOT / "benchmarks" / "traffic.py", "--mpi", *options, "--json", str(path))
    assert result.returncode == 0, result.stderr
    (real,) = json.loads(path.read_text())["results"]
    (simulated,) = results_of(tmp_path, "--ranks", "2", *options)
    for way in ("all", "none", "full"):  # what is sent early depends on timing, a little
        assert real["ways"][way]["bytes_per_step"] == pytest.approx(simulated["ways"][way]["bytes_per_step"], rel=0.1)


@needs_mpi
def test_exact_ranks_send_their_gradients_and_new_values_at_least(tmp_path):
    size = ["--rows", "40000", "--samples", "16", "--steps", "20", "--width", "16"]
    options = [*size, "--workloads", "uniform", "--techniques", "replication", "none", "--staleness", "0"]
    (result,) = results_of(tmp_path, "--ranks", "2", *options)
    rows = 2 * 16 * 26 / 2  # about half of the rows of both ranks' batches are at home on the other
    for way in ("replication", "none"):
        assert rows * (4 + 2 * 8 * 4) * 0.9 < result["ways"][way]["bytes_per_step"] < rows * (4 + 2 * 8 * 4) * 1.6
    kinds = {way: result["ways"][way]["bytes_per_step_by_kind"] for way in ("replication", "none")}
    assert kinds["none"]["pulled"] > 0 and "pulled" not in kinds["replication"]


@needs_mpi
def test_exact_ranks_learn_whose_rows_are_whose(tmp_path):
    """Of a partitioned graph most rows move to the rank that uses them, and the others, seldom used there, do not."""
    size = ["--ranks", "4", "--rows", "8000", "--samples", "32", "--width", "32", "--steps", "8", "--warmup", "40"]
    options = [*size, "--staleness", "0", "--workloads", "graph", "--techniques", "all", "relocation", "replication"]
    (result,) = results_of(tmp_path, *options)
    every, moving, copying = (result["ways"][way]["bytes_per_step"] for way in ("all", "relocation", "replication"))
    assert every < moving
    assert every < 0.4 * copying
