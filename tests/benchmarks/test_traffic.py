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


def test_a_warm_up_as_long_as_the_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--steps", "5", "--warmup", "5"])
    assert "--steps 5 --warmup 5" in capsys.readouterr().err


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
def test_exact_ranks_send_their_gradients_and_new_values_at_least(tmp_path):
    path = tmp_path / "exact.json"
    size = ["--rows", "40000", "--samples", "16", "--steps", "20", "--width", "16", "--step-seconds", "0.001"]
    options = [*size, "--workloads", "uniform", "--techniques", "replication", "none", "--staleness", "0"]
    result = launch(2, ROOT / "benchmarks" / "traffic.py", "--mpi", *options, "--json", str(path))
    assert result.returncode == 0, result.stderr
    (real,) = json.loads(path.read_text())["results"]
    rows = 2 * 16 * 26 / 2  # about half of the rows of both ranks' batches are at home on the other
    for way in ("replication", "none"):
        assert rows * (4 + 2 * 8 * 4) * 0.9 < real["ways"][way]["bytes_per_step"] < rows * (4 + 2 * 8 * 4) * 1.6
    kinds = {way: real["ways"][way]["bytes_per_step_by_kind"] for way in ("replication", "none")}
    assert kinds["replication"].get("pulled", 0) < kinds["none"]["pulled"] / 4, "only until keys are derived"


def test_exact_traffic_without_real_ranks_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--staleness", "0"])
    assert "--mpi" in capsys.readouterr().err
