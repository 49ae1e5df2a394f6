"""Which batch a lookup is of, where the ids alone do not say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pm
from adaloader.lookups.batch_rows import BatchRows
from adaloader.lookups.batches import Batch, Batches
from adaloader.lookups.held_ids import HeldIds


@pytest.fixture
def batches():
    return Batches(SimpleNamespace(steps=0, release=lambda plan: None))


class AnIteration:
    ended, ahead, trains = False, 0, True

    def first_used(self, batch):
        """Nothing follows from it here."""


def a_batch(number, rows):
    """A batch that intends `rows` of table 0."""
    batch = Batch(number, AnIteration(), (2.0, 6.0), None, number)
    plan = pm.RowPlan(number, None, np.array(rows), number, np.arange(len(rows)), None)
    batch.tables = {0: BatchRows(np.array(rows), [(np.array(rows), np.arange(len(rows)))], plan)}
    return batch


def test_ids_that_a_finished_batch_had_too_are_of_the_forward_that_goes_on(batches):
    finished, now = a_batch(0, [3, 5]), a_batch(1, [4, 6])
    for batch in (finished, now):
        batches.handed_out(batch)
        batches.used(batch)
        if batch is finished:
            batches._manager.steps = 1
            batches.finish_used()
    assert not batches.looked_up_late(0, np.array([3, 5]))
    assert batches.current is now


def test_a_batch_that_is_looked_up_again_after_its_step_is_the_current_one(batches):
    finished = a_batch(0, [3, 5])
    batches.handed_out(finished)
    batches.used(finished)
    batches.backward_goes_on()
    batches._manager.steps = 1
    batches.finish_used()
    assert batches.looked_up_late(0, np.array([3, 5]))
    assert batches.current is finished


def test_few_ids_of_many_do_not_tell_which_batch_they_are_of(batches):
    """A lookup of one sample's rows may equal that of a sample of another batch."""
    finished, now = a_batch(0, [3, 5, 7, 9, 11]), a_batch(1, [4, 6, 7, 8, 10])
    now.iteration = finished.iteration
    for batch in (finished, now):
        rows = batch.tables[0].rows
        batch.tables[0].sites = [(rows[at : at + 1], np.array([at])) for at in range(len(rows))]
    batches.handed_out(finished)
    batches.used(finished)
    batches.backward_goes_on()
    batches._manager.steps = 1
    batches.finish_used()
    batches.handed_out(now)
    assert not batches.looked_up_late(0, np.array([7]))
    batches.used(now)
    for other in (later := a_batch(2, [7]), a_batch(0, [7])):
        batches.handed_out(other)
    later.iteration = now.iteration
    assert batches.may_be_of(now, 0, np.array([7]))
    assert not batches.may_be_of(finished, 0, np.array([7]))
    assert batches.may_be_of(other, 0, np.array([7]))  # of another loader, in the same step


@pytest.mark.parametrize("made_by", [torch.tensor, np.array])
def test_a_batch_is_known_by_its_ids_while_the_loop_holds_it(made_by):
    data = {"ids": made_by([[3, 4], [5, 6], [7, 8]]), "weights": made_by([1.0, 2.0, 3.0]), "none": [None]}
    held = HeldIds(data)
    assert held.have(np.array([3, 4, 5, 6, 7, 8])) and held.have(np.array([4, 6, 8]))
    assert not held.have(np.array([4, 6])) and not held.have(np.array([1, 2, 3])) and not held.have(np.array([3, 6, 7]))
    del data
    assert not held.have(np.array([4, 6, 8]))
