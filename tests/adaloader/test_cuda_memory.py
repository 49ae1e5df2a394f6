"""The order of copies to and from a CUDA device, on streams that run as late and as mixed up as their events allow."""

import random
import weakref
from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from adaloader.memory.device_memory import CudaMemory

DEVICE = torch.device("cuda", 1)


class Gpu:
    """Streams of jobs, run one by one: the first ones of a stream chosen at random, up to one that waits."""

    def __init__(self):
        self.streams = []
        self.recorded = []
        self.current = self.Stream(DEVICE)

    def Stream(self, device):
        assert device == DEVICE
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def run_some(self):
        stream = random.choice(self.streams)
        for _ in range(random.randrange(20)):  # one gets ahead of the others
            if stream.jobs and stream.jobs[0][0].done:
                stream.jobs.popleft()[1]()

    def run_all(self):
        while any(stream.jobs for stream in self.streams):
            self.run_some()


class Event:
    def __init__(self, gpu, done=False):
        self.gpu, self.done = gpu, done

    def set(self):
        self.done = True

    def query(self):
        self.gpu.run_some()
        return self.done

    def synchronize(self):
        while not self.done:
            self.gpu.run_some()


class Stream:
    def __init__(self, gpu):
        self.gpu, self.jobs = gpu, deque()

    def add(self, job, after=None):
        self.jobs.append((after or Event(self.gpu, done=True), job))

    def record_event(self):
        event = Event(self.gpu)
        self.add(event.set)
        return event

    def wait_event(self, event):
        self.add(lambda: None, event)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


@pytest.fixture
def gpu(monkeypatch):
    """Has `torch` make its streams, copies and pinned memory on a `Gpu`, whose memory is the host's."""
    gpu, pinned, empty = Gpu(), set(), torch.empty

    def empty_or_pinned(*args, pin_memory=False, **keywords):
        made = empty(*args, **keywords)
        if pin_memory:
            pinned.add(made.data_ptr())
            weakref.finalize(made, pinned.discard, made.data_ptr())
        return made

    def held(tensor):
        """What a copy under way holds of its tensors: those of the device, which `record_stream` keeps, alone."""
        return weakref.ref(tensor) if tensor.data_ptr() in pinned else lambda: tensor

    def copy(target, source, non_blocking):
        assert non_blocking
        target, source = held(target), held(source)
        gpu.current.add(lambda: np.copyto(target().numpy(), source().numpy()))

    def to(tensor, device, non_blocking):
        assert device == DEVICE and tensor.is_pinned()
        there = torch.full_like(tensor, -1)
        copy(there, tensor, non_blocking)
        return there

    monkeypatch.setattr(torch, "empty", empty_or_pinned)
    monkeypatch.setattr(torch.cuda, "Stream", gpu.Stream)
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *pair: gpu.recorded.append(pair))
    return gpu


def test_what_is_sent_is_there_when_it_is_used_and_what_is_fetched_as_it_was(gpu):
    memory, rng, right, waiting = CudaMemory(DEVICE), np.random.default_rng(), [], []
    for turn in range(200):
        values = rng.random((5, 3))
        if turn % 4 == 0:
            given = memory.room(values.shape, "float64")
            given[...] = values
        else:
            given = values.copy(order="F" if turn % 4 == 1 else "C")
            given.flags.writeable = turn % 4 != 2
        there = memory.send(given)
        assert gpu.recorded.pop()[1] is gpu.current
        if turn % 4 == 3:
            given[...] = 0  # which is allowed, for it is no pinned memory
        del given
        gpu.current.add(lambda there=there, values=values: right.append(np.array_equal(there.numpy(), values)))
        made = torch.zeros(5, 3, dtype=torch.float64)
        gpu.current.add(lambda made=made, there=there: np.copyto(made.numpy(), 2 * there.numpy()))
        waiting.append((memory.fetch(made), made, 2 * values))
        assert gpu.recorded.pop()[1] not in (gpu.current, gpu.streams[1])
        gpu.run_some()
        if random.random() < 0.3:
            random.shuffle(waiting)
            wait, made, expected = waiting.pop()
            np.testing.assert_array_equal(wait(), expected)
            gpu.current.add(lambda made=made: made.numpy().fill(-5))
    for wait, _, expected in waiting:
        np.testing.assert_array_equal(wait(), expected)
    gpu.run_all()
    assert len(right) == 200 and all(right)
    memory.send(np.zeros(1))
    gpu.run_all()
    memory.send(np.zeros(1))
    assert len(memory._under_way) <= 2, "memory of copies that have ended is not kept"


def test_the_cache_takes_a_quarter_of_what_is_free(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {DEVICE: (400, 1000)}[device])
    assert CudaMemory(DEVICE).default_cache_bytes() == 100


def test_a_device_without_a_number_is_the_current_one(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert CudaMemory(torch.device("cuda")).device == DEVICE
