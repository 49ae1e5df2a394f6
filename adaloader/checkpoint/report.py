"""What a load returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Restored(dict):
    """What was saved as `extra`, by name, and beside it how the load went.

    Args:
        extra: this rank's, or rank 0's where it was saved by another number of ranks.
        path: of the checkpoint that was loaded.
        steps: optimizer steps that it had seen.
        report: a line for each thing that was not loaded, with `strict=False`.
    """

    def __init__(self, extra: Mapping[str, Any], path: Path | None, steps: int, report: list[str]):
        super().__init__(extra)
        self.path, self.steps, self.report = path, steps, report
