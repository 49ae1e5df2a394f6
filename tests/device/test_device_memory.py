"""Copies between host and device, and that the stand-in for a device sees one that nobody waits for."""

import numpy as np
import pytest
import torch

from adaloader.memory.device_memory import all_on_host, memory_of, on_device, on_host


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (5,), (7, 3)])
def test_what_is_sent_comes_back(dtype, shape, device, seed):
    memory, random = memory_of(device), np.random.default_rng(seed)
    array = (100 * random.standard_normal(shape)).astype(dtype)
    read_only = array.copy()
    read_only.flags.writeable = False
    for given in (array, read_only, np.asfortranarray(array), np.repeat(array, 2, axis=0)[::2]):
        there = on_device(given, memory)
        assert there.device == device and there.dtype == torch.from_numpy(array).dtype
        np.testing.assert_array_equal(on_host(there), array)
        np.testing.assert_array_equal(memory.fetch(there)(), array)


def test_on_the_cpu_memory_is_shared():
    array = np.arange(4.0)
    assert memory_of(torch.device("cpu")) is None
    on_device(array, None)[1] = 7
    assert array[1] == 7
    assert np.shares_memory(on_host(torch.from_numpy(array)), array)


def test_tensors_of_host_and_device_together(device, seed):
    values = [torch.randn(3, 2), torch.randn(0, 2), torch.randn(5)]
    given = [values[0].to(device), values[1], values[2].to(device)]
    for array, expected in zip(all_on_host(given), values, strict=True):
        np.testing.assert_array_equal(array, expected.numpy())


def test_memory_that_is_written_too_early_is_seen(device):
    memory, wrong = memory_of(device), 0
    for _ in range(100):
        array = memory.room((64,), "float64")
        array.fill(1.0)
        there = memory.send(array)
        array.fill(2.0)  # which is not allowed
        wrong += bool((there != 1.0).any())
    assert wrong
