"""Copies to and from the far device that take their time, as CUDA's do: on a thread of their own, some of them late.

What is asked of the device after a copy was begun waits for it, as a stream does that waits for an event. Nothing waits
for the host: memory that is written too early, or read too early, has the wrong values here.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

import adaloader.memory.device_memory
import cuda_ops.dispatch
from adaloader.memory.device_memory import DeviceMemory
from tests.device import far

_LATE_SECONDS = 0.0005


class DelayedMemory(DeviceMemory):
    """Copies on a thread, in the order in which they were begun."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._jobs: queue.Queue = queue.Queue()
        self._under_way: dict[int, threading.Event] = {}  # by address of the memory on the device
        self.sent = self.fetched = 0
        threading.Thread(target=self._work, daemon=True).start()
        far.before_use.append(self._wait_for)

    def send(self, array: np.ndarray) -> torch.Tensor:
        self.sent += 1
        there = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), device=self.device)
        target = far.near(there).numpy()
        target[...] = -(2**40) if array.dtype.kind == "i" else np.nan
        if not array.flags.writeable or not array.flags.c_contiguous:  # the real one copies it to pinned memory
            array = array.copy()
        self._begin(lambda: np.copyto(far.near(there).numpy(), array), there.untyped_storage().data_ptr())
        return there

    def fetch(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        self.fetched += 1
        tensor = tensor.detach()
        far.used(tensor)
        host = np.empty(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        host.fill(np.nan if host.dtype.kind == "f" else 0)  # for whoever reads it too early
        done = self._begin(lambda: np.copyto(host, far.near(tensor).numpy()), None)

        def wait() -> np.ndarray:
            done.wait()
            return host

        return wait

    def _begin(self, copy: Callable[[], None], address: int | None) -> threading.Event:
        done = threading.Event()
        if address is not None:
            self._under_way[address] = done
        self._jobs.put((copy, done, address))
        return done

    def _wait_for(self, tensor: torch.Tensor) -> None:
        done = self._under_way.get(tensor.untyped_storage().data_ptr())
        if done is not None:
            done.wait()

    def _work(self) -> None:
        while True:
            copy, done, address = self._jobs.get()
            if random.random() < 0.3:
                time.sleep(_LATE_SECONDS)
            copy()
            if self._under_way.get(address) is done:
                del self._under_way[address]
            done.set()


def _far_body(cpu_body):
    """Return the CPU's body of a function of `cuda_ops` for tensors of the far device, if CUDA devices have one too."""
    cuda_ops.dispatch.cuda_body(cpu_body)

    def call(*args, **kwargs):
        def on_cpu(value):
            if not isinstance(value, torch.Tensor):
                return value
            far.used(value)
            return far.near(value.detach()).numpy()

        result = cpu_body(*map(on_cpu, args), **{name: on_cpu(value) for name, value in kwargs.items()})
        return far.new(torch.from_numpy(result)) if isinstance(result, np.ndarray) else result

    return call


def install() -> torch.device:
    """Make models on the far device possible in this process; return the device."""
    device = far.far_device()
    adaloader.memory.device_memory.KINDS[far.NAME] = DelayedMemory
    cuda_ops.dispatch.BODIES[far.NAME] = _far_body
    return device
