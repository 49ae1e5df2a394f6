"""The benchmark of deriving keys runs, and times each of its parts; how long they take is no matter here."""

import json

from tests.launch import ROOT, launch

SMALL = ["--rows", "3000", "--dim", "4", "--batch", "32", "--steps", "12", "--warmup", "4"]


def test_every_part_is_timed():
    result = launch(0, ROOT / "benchmarks" / "derivation.py", *SMALL)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["arguments"]["steps"] == 12
    assert all(figures["milliseconds"][name] > 0 for name in ("derive", "plan", "check", "wait", "cpu"))
    assert figures["milliseconds"]["derive"] < figures["milliseconds"]["plan"]
    assert figures["intent_coverage"] > 0.5
