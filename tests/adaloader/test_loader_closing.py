"""Loaders leave nothing behind: no thread, no reference, no garbage in worker processes; on one process."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from adaloader import AdaLoader
from tests.adaloader.id_loaders import ROWS, Pairs, managed, train


def planner_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("adaloader")]


@pytest.fixture
def no_threads_before():
    gc.collect()
    assert planner_threads() == []


@pytest.mark.parametrize("ending", ["full pass", "break", "never iterated", "error", "iterator kept"])
@pytest.mark.parametrize("wrap", [False, True])
def test_loader_and_model_leave_nothing(ending, wrap, no_threads_before):
    loader, model, optimizer = managed(list(DataLoader(Pairs(), 4)) if wrap else Pairs(), wrap=wrap)
    watched = [weakref.ref(loader), weakref.ref(model), weakref.ref(model.table.weight), weakref.ref(optimizer)]
    assert len(planner_threads()) == 1
    iterator = None
    try:
        if ending == "iterator kept":
            iterator = iter(loader)
            next(iterator)
        elif ending != "never iterated":
            for batch in loader:
                train(model, optimizer, batch)
                if ending == "error":
                    raise KeyError("the user's own")
                if ending == "break":
                    break
    except KeyError:
        assert ending == "error"
    batch = None
    del loader, model, optimizer, iterator, batch
    gc.collect()
    gc.collect()  # autograd's nodes hold the parameter from outside Python until the first pass has freed them
    assert [type(reference()) for reference in watched] == [type(None)] * 4
    assert planner_threads() == []


def test_close_may_be_repeated_and_ends_the_loader(no_threads_before):
    loader, model, optimizer = managed(Pairs(), 4)
    other = AdaLoader(Pairs(), 4, model=model, min_rows=1)
    iterator = iter(loader)
    train(model, optimizer, next(iterator))
    for _ in range(3):
        loader.close()
    assert len(planner_threads()) == 1
    with pytest.raises(RuntimeError, match="was closed"):
        iter(loader)
    with pytest.raises(RuntimeError, match="was closed"):
        list(iterator)
    with torch.no_grad():
        for batch in other:
            model(batch[1])
    other.close()
    assert loader.stats()["steps"] == 1
    assert model.state_dict()["table.weight"].shape == (ROWS, 4)  # one process: nothing is lost


def test_many_loaders_in_one_process():
    for _ in range(20):
        loader, model, optimizer = managed(Pairs(), 8)
        for batch in loader:
            train(model, optimizer, batch)
        loader.close()
    assert planner_threads() == []


freed = []


class Garbage:
    """Held by itself alone: the next collection frees it."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        freed.append(self)


class Collecting(TensorDataset):
    """Says of each sample whether this process has freed any garbage, once that is collected."""

    def __getitem__(self, at):
        gc.collect()
        return super().__getitem__(at)[0], torch.tensor(len(freed))


def test_workers_leave_what_they_inherit_as_garbage():
    """A communicator, or a process group whose threads a forked process has not got, would crash the worker."""
    gc.collect()
    gc.disable()
    try:
        freed.clear()
        Garbage()
        loader, *_ = managed(Collecting(torch.arange(4)), 2, num_workers=1)
        in_worker = [counts.tolist() for _, counts in loader]
        assert in_worker == [[0, 0], [0, 0]]
        gc.collect()
        assert len(freed) == 1, "there was garbage"
    finally:
        gc.enable()
    loader.close()
