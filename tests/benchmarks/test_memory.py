"""The benchmark of memory runs, and looks each row up; how much memory that takes is no matter here."""

import json

import pytest

from benchmarks.memory import IDS_IN_SAMPLE, EveryRow
from tests.launch import ROOT, launch


@pytest.mark.parametrize("rows", [1, 2, 97, IDS_IN_SAMPLE, 3 * IDS_IN_SAMPLE + 5])
def test_the_samples_hold_every_row(rows):
    samples = EveryRow(rows)
    assert {int(row) for number in range(len(samples)) for row in samples[number]} == set(range(rows))


def test_a_row_is_counted_with_its_record(tmp_path):
    path = tmp_path / "figures.json"
    result = launch(0, ROOT / "benchmarks" / "memory.py", "--rows", "300000", "--dim", "4", "--json", str(path))
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())
    assert figures["record_bytes"] == 40
    assert figures["counted_bytes_per_row"] >= 40
    assert {"bytes_per_row", "peak_bytes_per_row", "seconds"} <= set(figures)
