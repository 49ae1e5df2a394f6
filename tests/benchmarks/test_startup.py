"""The start-up benchmark runs both sides; its speed is no matter here."""

import json

from tests.launch import ROOT, launch


def test_both_sides_run(tmp_path):
    path = tmp_path / "figures.json"
    result = launch(0, ROOT / "benchmarks" / "startup.py", "--repeats", "1", "--json", str(path))
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())
    assert json.loads(result.stdout.splitlines()[-1]) == figures
    plain, later = figures["seconds"]["plain"], figures["seconds"]["AdaLoader, later runs"]
    assert figures["later_over_plain"] == later[0] - plain[0]


def test_no_repeats_are_refused():
    result = launch(0, ROOT / "benchmarks" / "startup.py", "--repeats", "0")
    assert result.returncode == 2
    assert "--repeats 0" in result.stderr
