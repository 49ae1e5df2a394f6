"""A model's tables for the tests of derivation: every lookup is noted, and told to a recorder while one is there."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from intents import Program, Recorder, Recording, leaves


class Tables:
    """Tables by name. ``used`` holds (table, ids) of every lookup since :meth:`take_used`."""

    def __init__(self, rows: int = 5000, dim: int = 4) -> None:
        self.weight = nn.Parameter(torch.randn(rows, dim))
        self.recorder: Recorder | None = None
        self.used: list[tuple[str, np.ndarray]] = []

    def __call__(self, table: str, ids: torch.Tensor, operation: str = "embedding") -> torch.Tensor:
        if self.recorder is not None:
            self.recorder.lookup(table, ids, operation)
            with self.recorder.paused():
                return self._look_up(table, ids)
        return self._look_up(table, ids)

    def _look_up(self, table: str, ids: torch.Tensor) -> torch.Tensor:
        self.used.append((table, ids.detach().to(torch.int64).reshape(-1).numpy().copy()))
        return nn.functional.embedding(ids.long(), self.weight)

    def take_used(self) -> list[tuple[str, np.ndarray]]:
        used, self.used = self.used, []
        return used


def record(step, batch, tables: Tables) -> Recording:
    """Run ``step(batch, tables)`` under a recorder that knows ``batch`` as number 0."""
    tables.recorder = Recorder()
    tables.recorder.start()
    try:
        tables.recorder.add_batch(0, batch)
        step(batch, tables)
        return tables.recorder.stop()
    finally:
        tables.recorder.abandon()
        tables.recorder = None
        tables.take_used()


def snapshot(batch) -> list[torch.Tensor]:
    return [leaf.clone() for _, leaf in leaves(batch)]


def assert_unchanged(batch, before: list[torch.Tensor]) -> None:
    for (path, leaf), old in zip(leaves(batch), before, strict=True):
        assert torch.equal(leaf.to_dense(), old.to_dense()), f"replay changed batch{path}"


def assert_replays(program: Program, step, batch, tables: Tables) -> None:
    """Replaying ``batch`` gives, in order, what ``step`` then looks up, and leaves no trace."""
    before, random_state = snapshot(batch), torch.get_rng_state()
    replayed = program.replay(batch)
    assert_unchanged(batch, before)
    assert torch.equal(random_state, torch.get_rng_state()), "replay drew random numbers"
    step(batch, tables)
    used = tables.take_used()
    lines = "\n".join(program.describe())
    assert [site.table for site, _ in replayed] == [table for table, _ in used], lines
    for (site, ids), (_, expected) in zip(replayed, used, strict=True):
        assert ids.dtype == np.int64 and ids.ndim == 1 and ids.flags.c_contiguous
        assert np.array_equal(ids, expected), f"{site}: {ids} but used {expected}\n{lines}"
