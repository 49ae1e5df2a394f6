"""Derived ids equal used ids: every pattern, on later batches, among them smaller ones."""

from __future__ import annotations

import pytest
import torch

from tests.intents.harness import Tables, assert_replays, record
from tests.intents.patterns import FIELDS, PATTERNS


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PATTERNS)
def test_replayed_equals_used(name, seed):
    torch.manual_seed(seed * 1000 + len(name))
    step, make = PATTERNS[name]
    tables = Tables()
    recording = record(step, make(64), tables)
    assert recording.abandoned is None
    program = recording.program(0)
    assert [site.reason for site in recording.sites] == [None] * len(recording.sites)
    for size in (64, 64, 50, 3):
        assert_replays(program, step, make(size), tables)


@pytest.mark.parametrize("name", PATTERNS)
def test_as_many_samples_as_fields(name):
    """The hardest size: the number of samples is the number of fields. A second recording may be needed, no more."""
    torch.manual_seed(len(name))
    step, make = PATTERNS[name]
    tables = Tables()
    program = record(step, make(FIELDS), tables).program(0)
    assert_replays(program, step, make(FIELDS), tables)
    refined = program.refine(record(step, make(11), tables).program(0))
    assert refined is not None, "\n".join(program.describe())
    for size in (FIELDS, 11, 5):
        assert_replays(refined, step, make(size), tables)


@pytest.mark.parametrize("name", PATTERNS)
def test_describe_names_every_lookup(name):
    torch.manual_seed(1)
    step, make = PATTERNS[name]
    recording = record(step, make(64), Tables())
    text = "\n".join(recording.program(0).describe())
    for site in recording.sites:
        assert f"{site.table} <- " in text and site.where in text
