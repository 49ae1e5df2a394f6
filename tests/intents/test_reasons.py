"""Ids that cannot be derived: found out, and said why in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.intents.harness import Tables, assert_replays, record
from tests.intents.patterns import FIELDS, fields, flat

LAYER = nn.Linear(3, 9)
FROZEN = nn.Linear(3, 9).requires_grad_(False)


def drawn(batch, tables):
    tables("t", torch.randint(0, 100, (batch["sparse"].shape[0],)))


def drawn_in_place(batch, tables):
    tables("t", torch.empty(4, dtype=torch.long).random_(0, 50))


def shuffled(batch, tables):
    tables("t", batch["sparse"][torch.randperm(batch["sparse"].shape[0])])


def negatives_among_derived(batch, tables):
    ids = batch["sparse"].clone()
    ids[:, 0] = torch.randint(0, 100, (ids.shape[0],))
    tables("t", ids)


def overwritten_at_random(batch, tables):
    batch["sparse"][:, :2].random_(0, 10)
    tables("t", batch["sparse"])


def dropped_out(batch, tables):
    tables("t", nn.functional.dropout(batch["dense"].abs(), 0.5).long())


def argmax_of_logits(batch, tables):
    tables("t", LAYER(batch["dense"]).argmax(-1))


def argmax_without_grad(batch, tables):
    with torch.no_grad():
        tables("t", LAYER(batch["dense"]).topk(2).indices.flatten())


def argmax_of_frozen(batch, tables):
    tables("t", FROZEN(batch["dense"]).argmax(-1))


def from_a_lookup(batch, tables):
    with torch.no_grad():
        rows = tables("t", batch["sparse"])
    tables("u", rows.sum(-1).abs().long())


def through_numpy(batch, tables):
    tables("t", torch.from_numpy(np.sort(batch["sparse"].numpy(), axis=1)))


def through_a_list(batch, tables):
    tables("t", torch.tensor([i + 1 for i in batch["sparse"][:, 0].tolist()]))


def numpy_negatives(batch, tables):
    size = batch["sparse"].shape[0]
    tables("t", torch.from_numpy(np.random.default_rng(0).integers(0, 9, (size, 5))))


def float_ids(batch, tables):
    tables("t", batch["label"])


COUNTER = torch.zeros(1, dtype=torch.long)


def counted_in_a_buffer(batch, tables):
    COUNTER.add_(1)
    tables("t", batch["sparse"] + COUNTER)


def reshaped_in_place(batch, tables):
    ids = batch["sparse"].clone()
    ids.t_()
    tables("t", ids)


REASONS = {
    drawn: "drawn at random by aten.randint",
    drawn_in_place: "drawn at random by aten.random_",
    shuffled: "drawn at random by aten.randperm",
    negatives_among_derived: "drawn at random by aten.randint",
    overwritten_at_random: "drawn at random by aten.random_",
    dropped_out: "drawn at random by aten.",
    argmax_of_logits: "depend on a parameter",
    argmax_without_grad: "depend on a parameter",
    argmax_of_frozen: "depend on a parameter",
    from_a_lookup: "depend on a parameter",
    through_numpy: "made by numpy, Python or compiled code",
    through_a_list: "made by numpy, Python or compiled code",
    numpy_negatives: "made by numpy, Python or compiled code",
    float_ids: "dtype torch.float32",
    counted_in_a_buffer: "outlives the step and is changed in place by aten.add_",
    reshaped_in_place: "changes the shape of a tensor in place",
}


@pytest.mark.parametrize("step", REASONS, ids=lambda step: step.__name__)
def test_reason(step):
    recording = record(step, fields(32), Tables())
    site = recording.sites[-1]
    assert REASONS[step] in (site.reason or "derived"), site.reason
    assert site.reason.startswith("the ids ")
    assert site.program is None
    program = recording.program(0)
    assert site in program.sites and site not in program.derived
    assert any("?" in line and site.reason in line for line in program.describe())


@pytest.mark.parametrize("step", [drawn, overwritten_at_random, counted_in_a_buffer], ids=lambda s: s.__name__)
def test_reason_names_the_line(step):
    site = record(step, fields(32), Tables()).sites[-1]
    first = step.__code__.co_firstlineno
    assert any(f"test_reasons.py:{first + line}" in site.reason for line in range(1, 5)), site.reason


def test_a_mixed_step_derives_what_it_can():
    def step(batch, tables):
        tables("derived", batch["sparse"])
        tables("random", torch.randint(0, 10, (5,)))
        tables("offset", batch["sparse"] + 1)

    program = record(step, fields(16), Tables()).program(0)
    assert [site.table for site in program.sites] == ["derived", "random", "offset"]
    batch = fields(9)
    replayed = program.replay(batch)
    assert [site.table for site, _ in replayed] == ["derived", "offset"]
    assert np.array_equal(replayed[1][1], batch["sparse"].numpy().reshape(-1) + 1)


def test_replay_leaves_a_changed_buffer_alone():
    counter = torch.zeros(3, dtype=torch.long)

    def step(batch, tables):
        counter.add_(1)
        tables("t", batch)

    program = record(step, flat(8), Tables()).program(0)
    before = counter.clone()
    program.replay(flat(5))
    assert torch.equal(counter, before)


def test_running_statistics_are_not_replayed():
    mean, var = torch.zeros(3), torch.ones(3)

    def step(batch, tables):
        dense = nn.functional.batch_norm(batch["dense"], mean, var, training=True)
        tables("t", dense.abs().long())

    recording = record(step, fields(8), Tables())
    assert "batch_norm" in recording.sites[0].reason
    before = mean.clone()
    recording.program(0).replay(fields(8))
    assert torch.equal(mean, before)


def test_a_literal_that_differs_between_recordings_is_not_derived():
    seed = iter([3, 9])

    def step(batch, tables):
        tables("t", batch["sparse"] + next(seed))
        tables("u", batch["sparse"])

    tables = Tables()
    first = record(step, fields(16), tables).program(0)
    refined = first.refine(record(step, fields(16), tables).program(0))
    assert [site.table for site in refined.derived] == ["u"]
    assert "follows none of the batch: 3 then 9" in refined.sites[0].reason


def test_a_python_made_constant_that_differs_between_recordings_is_not_derived():
    draws = np.random.default_rng(3)

    def step(batch, tables):
        tables("t", batch["sparse"] + torch.from_numpy(draws.integers(0, 50, (FIELDS,))))
        tables("u", torch.tensor([int(draws.integers(0, 1000))]))
        tables("v", batch["sparse"] + torch.tensor([1] * FIELDS))

    tables = Tables()
    first = record(step, fields(16), tables).program(0)
    assert len(first.derived) == 3
    refined = first.refine(record(step, fields(12), tables).program(0))
    assert [site.table for site in refined.derived] == ["v"]
    assert all("made anew" in site.reason for site in refined.sites[:2])


def test_refine_refuses_other_operations():
    def step(batch, tables):
        tables("t", batch["sparse"] + 1 if batch["sparse"].shape[0] > 10 else batch["sparse"])

    tables = Tables()
    large, small = (record(step, fields(size), tables).program(0) for size in (16, 4))
    assert large.refine(small) is None
    assert small.refine(large) is None


def test_refine_keeps_both_programs_usable():
    def step(batch, tables):
        tables("t", batch["sparse"])

    tables = Tables()
    first, second = (record(step, fields(size), tables).program(0) for size in (16, 4))
    refined = first.refine(second)
    assert {site.program for site in refined.sites} == {refined}
    for program in (first, second, refined):
        assert_replays(program, step, fields(6), tables)
        assert all(site.program is program for site in program.sites)


PICKED = {
    "shuffled": lambda batch: batch["sparse"][torch.randperm(batch["sparse"].shape[0])],
    "by numpy": lambda batch: torch.from_numpy(np.sort(batch["sparse"].numpy().ravel())[::2].copy()),
    "by Python": lambda batch: torch.tensor(sorted(batch["sparse"].flatten().tolist())[3:]),
}


@pytest.mark.parametrize("pick", PICKED.values(), ids=PICKED.keys())
def test_ids_that_are_some_of_the_batch_are_said_to_be(pick):
    def step(batch, tables):
        tables("t", pick(batch))

    program = record(step, fields(32), Tables()).program(0)
    refined = program.refine(record(step, fields(9), Tables()).program(0)) or program
    ((site, place),) = refined.among
    assert site.reason and site.among == "['sparse']" and place == 1
    assert any("some of batch['sparse']" in line for line in refined.describe())


def test_ids_made_elsewhere_are_not_taken_for_some_of_the_batch():
    def step(batch, tables):
        tables("t", torch.from_numpy(batch["sparse"].numpy() + 1000))

    assert record(step, fields(32), Tables()).program(0).among == []


def test_a_loop_over_ids_is_no_row_of_constants():
    def step(batch, tables):
        for i in batch["sparse"][:, 0]:
            tables("t", torch.tensor(int(i)))

    program = record(step, fields(16), Tables()).program(0)
    assert program.derived == [] and {path for _, path in program.among} <= {1}
    assert all("numpy, Python" in site.reason for site in program.sites)
