"""Run an example that `examples/runs.py` serves, here or under mpirun, and compare its figures with plain PyTorch's."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from tests.launch import ROOT, launch, mpirun

DATA = ROOT.parent / "shared" / "data"
needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None or mpirun() is None, reason="no mpi4py or no mpirun")


def needs_data(*names: str):
    """Skip a test where one of the data sets is absent."""
    missing = [name for name in names if not (DATA / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} are not beside the repository, in ../shared/data")


def run_here(example: ModuleType, *options: object) -> list[dict]:
    """Run the example in this process; return its epochs' figures."""
    return [epoch.figures() for epoch in example.main([str(option) for option in options])]


def run_on(ranks: int, example: ModuleType, folder: Path, *options: object) -> list[dict]:
    """Run the example under mpirun; return its epochs' figures."""
    path = folder / "figures.json"
    result = launch(ranks, Path(example.__file__), *map(str, options), "--json", str(path))
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())
    assert figures["ranks"] == ranks
    return figures["epochs"]


def assert_same_curve(ours: list[dict], plain: list[dict], tolerance: float = 1e-9) -> None:
    """Every figure but those of speed is the same, and rows were known ahead once the first pass is over."""
    assert len(ours) == len(plain) > 0
    for mine, theirs in zip(ours, plain, strict=True):
        names = [name for name in theirs if name == "train_loss" or "test" in name or "found" in name]
        assert len(names) >= 2 and mine.keys() == theirs.keys()
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], abs=tolerance), f"{name} of epoch {mine['epoch']}"
        assert mine["intent_coverage"] >= (0.99 if mine["epoch"] > 1 else 0.8) and theirs["intent_coverage"] is None


def assert_options_are_refused(example: ModuleType, capsys, *options: list[str]) -> None:
    """Each of `options` ends the program with a message that names its first word."""
    for option in options:
        with pytest.raises(SystemExit):
            example.main(["--plain", *option])
        assert option[0] in capsys.readouterr().err
