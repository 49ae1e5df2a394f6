"""Columns of a matrix that are looked up one by one: taken out together where nothing tells the difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intents import ReplayError
from tests.intents.harness import Tables, assert_replays, record


def taken_together(program) -> bool:
    """Whether the source of the replay takes columns together."""
    return any(name.startswith("columns") for name in program._run.__code__.co_varnames)


def matrix(rng, rows: int, columns: int, dtype: torch.dtype, layout: int) -> torch.Tensor:
    """Ids `[rows, columns]` that lie in memory in one of four ways."""
    shapes = [(rows, columns), (columns, rows), (2 * rows, columns), (rows, columns + 2)]
    ids = torch.from_numpy(rng.integers(0, 5000, shapes[layout])).to(dtype)
    return [ids, ids.t(), ids[::2], ids[:, 1:-1]][layout]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    looked_up=st.lists(st.integers(-3, 8), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    layout=st.integers(0, 3),
)
def test_columns_are_what_is_looked_up(seed, looked_up, dtype, layout):
    rng, tables = np.random.default_rng(seed), Tables()

    def step(batch, tables):
        for number, column in enumerate(looked_up):
            tables(f"t{number % 5}", batch["ids"][:, column])
        tables("shifted", batch["ids"][:, looked_up[0]] // 2)

    recording = record(step, {"ids": matrix(rng, 6, 9, dtype, layout)}, tables)
    program = recording.program(0)
    assert taken_together(program) == (len(looked_up) >= 4)
    for size in (6, 1, 0, 13):
        batch = {"ids": matrix(rng, size, 9, dtype, int(rng.integers(4)))}
        assert_replays(program, step, batch, tables)


def test_a_batch_that_lacks_a_column_is_no_batch_of_the_program():
    tables = Tables()

    def step(batch, tables):
        for column in range(5):
            tables("t", batch[:, column])

    program = record(step, torch.arange(30).reshape(6, 5), tables).program(0)
    assert taken_together(program)
    with pytest.raises(ReplayError, match="out of bounds"):
        program.replay(torch.arange(12).reshape(3, 4))


def test_what_is_written_between_lookups_counts():
    tables = Tables()

    def step(batch, tables):
        ids = batch.clone()
        for column in range(6):
            tables("t", batch[:, column])
            ids[:, column] += 1
            tables("u", ids[:, column])

    program = record(step, torch.arange(30).reshape(5, 6), tables).program(0)
    assert not taken_together(program)
    assert_replays(program, step, torch.arange(7, 49).reshape(7, 6), tables)


def test_the_result_is_a_copy():
    tables = Tables()

    def step(batch, tables):
        for column in range(4):
            tables("t", batch[:, column])

    batch = torch.arange(12).reshape(3, 4)
    program = record(step, batch.clone(), tables).program(0)
    replayed = [ids.copy() for _, ids in program.replay(batch)]
    later = program.replay(batch)
    batch.fill_(99)
    assert all((ids == before).all() for (_, ids), before in zip(later, replayed, strict=True))
