"""Copies between the host's memory, where rows and their optimizer state live, and the device that a model is on.

A table whose parameter is on a device keeps its rows on the host: lookups get them as slabs on the device, and the
gradients of slabs, summed per row there, come back when a step applies them. All that knows of streams, events and
pinned memory is here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch


class DeviceMemory:
    """Copies to and from one device, in order with what is done there; for devices without streams of their own.

    Args:
        device: where tensors are sent.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def default_cache_bytes(self) -> int:
        """Return how much of the device's memory is used for rows where nobody says."""
        return 0

    def room(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return memory of the host, with unspecified contents, that can be sent without another copy."""
        return np.empty(shape, dtype)

    def send(self, array: np.ndarray) -> torch.Tensor:
        """Return a copy of `array` on the device, which what is done there from now on sees whole.

        `array` must not be written afterwards if it came from `room`; it is kept for as long as the copy takes.
        """
        return torch.from_numpy(np.array(array)).to(self.device)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        """Begin to copy a tensor of the device, as it is after what has been asked of the device so far; return what
        waits for the copy and gives it. The tensor must not be written before that.
        """
        return lambda: tensor.detach().cpu().numpy()


class CudaMemory(DeviceMemory):
    """Copies to and from a CUDA device through pinned memory, on streams of their own.

    A stream takes copies in, and another one out: copies overlap with the kernels that run, and an upload waits for no
    kernel before it. Events order them: the stream on which a copy is asked for waits for the copy, and a copy out
    waits for what that stream was asked to do before. The pinned memory is that of PyTorch's allocator, which gives the
    same pages again.
    """

    def __init__(self, device: torch.device):
        super().__init__(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
        self._in, self._out = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._under_way: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
        self._lock = threading.Lock()  # the backward sends on a thread of its own, beside whoever else does

    def default_cache_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free // 4

    def room(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="cpu", pin_memory=True).numpy()

    def send(self, array: np.ndarray) -> torch.Tensor:
        host = self._pinned(array)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._in):
            there = host.to(self.device, non_blocking=True)
            copied = self._in.record_event()
        current.wait_event(copied)
        there.record_stream(current)  # its memory belongs to the stream on which it was made
        with self._lock:
            self._under_way.append((copied, host))
            while self._under_way and self._under_way[0][0].query():
                self._under_way.popleft()
        return there

    def fetch(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        tensor = tensor.detach()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            host.copy_(tensor, non_blocking=True)
            copied = self._out.record_event()
        tensor.record_stream(self._out)

        def wait() -> np.ndarray:
            copied.synchronize()
            return host.numpy()

        return wait

    def _pinned(self, array: np.ndarray) -> torch.Tensor:
        if array.flags.writeable and array.flags.c_contiguous:
            tensor = torch.from_numpy(array)
            if tensor.is_pinned():
                return tensor
        host = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), device="cpu", pin_memory=True)
        np.copyto(host.numpy(), array)
        return host


KINDS: dict[str, type[DeviceMemory]] = {"cuda": CudaMemory}
"""By type of device: what copies to and from it. A table may be on these, and on the CPU."""

_memories: dict[torch.device, DeviceMemory] = {}


def memory_of(device: torch.device) -> DeviceMemory | None:
    """Return what copies to and from `device`, None for the CPU.

    Raises:
        KeyError: if there is nothing for devices of its type.
    """
    if device.type == "cpu":
        return None
    if device not in _memories:
        _memories[device] = KINDS[device.type](device)
    return _memories[device]


def on_device(array: np.ndarray, memory: DeviceMemory | None) -> torch.Tensor:
    """Return an array as a tensor: of the same memory on the CPU (`memory` is None), a copy on a device."""
    return torch.from_numpy(array) if memory is None else memory.send(array)


def on_host(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array, of the same memory if it is on the CPU."""
    return tensor.detach().cpu().numpy()


def all_on_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Return tensors as arrays, all copies begun before the first is waited for."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.detach().numpy() for tensor in tensors]
    memories = [memory_of(tensor.device) for tensor in tensors]
    begun = [None if m is None else m.fetch(t) for m, t in zip(memories, tensors, strict=True)]
    return [t.detach().numpy() if wait is None else wait() for t, wait in zip(tensors, begun, strict=True)]
