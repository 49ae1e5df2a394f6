"""Random chains of operations between a batch and a lookup."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from intents import ReplayError
from tests.intents.harness import Tables, assert_replays, record

# Each takes a 2-D tensor of ids and the batch, and gives a 2-D tensor. Sizes are Python numbers, as in users' code.
OPERATIONS = [
    lambda x, batch: x + 1,
    lambda x, batch: x * 31 % 1009,
    lambda x, batch: x.t(),
    lambda x, batch: x[:, : max(1, x.shape[1] - 1)],
    lambda x, batch: torch.cat([x[1:], x]),
    lambda x, batch: x.reshape(x.shape[1], x.shape[0]),
    lambda x, batch: x.contiguous().view(x.shape[0] * x.shape[1], 1),
    lambda x, batch: x.reshape(1, -1),
    lambda x, batch: x.flatten().unsqueeze(0).expand(2, x.numel()),
    lambda x, batch: x.repeat(1, 2),
    lambda x, batch: torch.cat([x, x.flip(0)], dim=0),
    lambda x, batch: x.sort(dim=1).values,
    lambda x, batch: x + torch.arange(x.shape[0])[:, None],
    lambda x, batch: x + torch.arange(x.shape[1]),
    lambda x, batch: torch.cat([torch.zeros(x.shape[0], 1, dtype=x.dtype), x], dim=1),
    lambda x, batch: x.clone().add_(3),
    lambda x, batch: x.clone().masked_fill_(x > 50, 7),
    lambda x, batch: torch.where(x > 20, x, x.new_full((x.shape[0], x.shape[1]), 4)),
    lambda x, batch: x.roll(1, 0).to(torch.int32).long(),
    lambda x, batch: x.cumsum(1) % 997,
    lambda x, batch: batch["other"][x % batch["other"].shape[0]],
    lambda x, batch: x[x > 10].unsqueeze(1),
]

RESHAPES = {5, 6, 7, 8}  # they copy, another operation, only where sizes and strides are such that they must


@settings(deadline=None, max_examples=60)
@example(chain=[0, 21, 12], columns=1, size=2, seed=29767)
@given(
    chain=st.lists(st.integers(0, len(OPERATIONS) - 1), min_size=1, max_size=5),
    columns=st.integers(1, 9),
    size=st.integers(2, 20),
    seed=st.integers(0, 10**6),
)
def test_any_chain_is_derived_or_refined(chain, columns, size, seed):
    """The first program is right for batches of the recorded size; with a second recording, for a third size too."""
    generator = torch.Generator().manual_seed(seed)

    def make(rows: int) -> dict:
        return {
            "ids": torch.randint(0, 100, (rows, columns), generator=generator),
            "other": torch.randint(0, 100, (rows + 3,), generator=generator),
        }

    def step(batch, tables):
        x = batch["ids"]
        for position in chain:
            x = OPERATIONS[position](x, batch)
        tables("t", x)

    tables = Tables()
    first = record(step, make(size), tables).program(0)
    if not mentions_data(chain):
        assert_replays(first, step, make(size), tables)
    for other_size in (size + 9, size + 4):
        refined = first.refine(record(step, make(other_size), tables).program(0))
        if refined is None:  # PyTorch makes an alias of what happens to be the whole, or reshapes without a copy
            assert any("alias" in line for line in first.describe()) or RESHAPES.intersection(chain)
            return
        first = refined
    assert [site.reason for site in first.sites] == [None], first.describe()
    for later in (size, size + 13, size + 4):
        batch = make(later)
        try:
            assert_replays(first, step, batch, tables)
        except ReplayError:  # a mask that kept all in every recording so far looks like none: another one tells
            assert mentions_data(chain)
            first = first.refine(record(step, batch, tables).program(0))
            assert first is not None
            assert_replays(first, step, batch, tables)


def mentions_data(chain: list[int]) -> bool:
    """Whether sizes depend on the data (the mask), so that a single recording may be misled by equal numbers."""
    return len(OPERATIONS) - 1 in chain


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), fields=st.integers(1, 12), later=st.integers(0, 40), seed=st.integers(0, 10**6))
def test_a_wrong_guess_is_an_error_or_other_ids_never_a_crash(size, fields, later, seed):
    generator = torch.Generator().manual_seed(seed)

    def make(rows: int) -> torch.Tensor:
        return torch.randint(0, 100, (rows, fields), generator=generator)

    def step(batch, tables):
        rows, columns = batch.shape
        tables("t", batch.view(rows * columns).view(columns, rows))
        tables("u", torch.arange(rows * columns).view(rows, columns) + batch)

    tables = Tables()
    program = record(step, make(size), tables).program(0)
    batch = make(later)
    try:
        replayed = program.replay(batch)
    except ReplayError:
        assert later != size
        return
    assert all(ids.dtype == np.int64 and ids.ndim == 1 for _, ids in replayed)
    if later == size:
        assert_replays(program, step, batch, tables)
