"""DeviceKeyIndex against a dict, over random adds, finds and removals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_ops.cuda.index import DeviceKeyIndex
from tests.cuda_ops.cuda.device import DEVICE, SIMULATED, drawn, on_device, seeds

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered"
)  # the hash wraps, and the simulator remarks on it

ROUNDS, MOST_KEYS = (5, 12) if SIMULATED else (12, 30_000)


def assert_same(index, reference):
    keys, slots = index.items()
    assert dict(zip(keys.tolist(), slots.tolist(), strict=True)) == reference
    assert len(index) == len(reference) == len(keys)


@drawn
@given(seeds, st.sampled_from([5, 40, 2**40, 2**62]))
def test_it_is_a_dict(seed, span):
    rng = np.random.default_rng(seed)
    index, reference = DeviceKeyIndex(device=DEVICE), {}
    for _ in range(ROUNDS):
        keys = np.unique(rng.integers(0, span, rng.integers(0, MOST_KEYS + 1)))
        keys = rng.permutation(keys[[key not in reference for key in keys.tolist()]])
        slots = rng.integers(0, 2**60, len(keys))
        index.add(on_device(keys), on_device(slots))
        reference |= dict(zip(keys.tolist(), slots.tolist(), strict=True))
        some = np.concatenate([rng.permutation(list(reference) or [0])[:MOST_KEYS].astype(np.int64), [-1, -2, -3]])
        asked = np.concatenate([some, rng.integers(0, span, 4), some[:2]])
        assert index.find(on_device(asked)).tolist() == [reference.get(key, -1) for key in asked.tolist()]
        gone = np.unique(asked)[:: int(rng.integers(1, 4))]
        assert index.remove(on_device(gone)).tolist() == [reference.pop(key, -1) for key in gone.tolist()]
        assert_same(index, reference)


def test_keys_that_come_and_go_do_not_fill_it():
    index = DeviceKeyIndex(device=DEVICE)
    for start in range(0, 120, 6):
        keys = torch.arange(start, start + 6, device=DEVICE)
        index.add(keys, keys + 1)
        assert index.remove(keys).tolist() == (keys + 1).tolist()
    assert len(index) == 0 and index.memory_bytes <= 16 * 64


@pytest.mark.parametrize("again", [[3], [9, 1, 9], [10, 11, 12, 13, 14, 15, 16, 17, 2]])
def test_a_key_that_is_there_or_given_twice_is_an_error_that_changes_nothing(again):
    index = DeviceKeyIndex(device=DEVICE)
    keys = torch.tensor([3, 2, 8], device=DEVICE)
    index.add(keys, keys * 10)
    with pytest.raises(KeyError, match=rf"key ({again[-1]}) \(position \d+\) is in the index already"):
        index.add(torch.tensor(again, device=DEVICE), torch.arange(len(again), device=DEVICE))
    assert_same(index, {3: 30, 2: 20, 8: 80})
    index.add(torch.tensor([9, 1], device=DEVICE), torch.tensor([90, 11], device=DEVICE))
    assert_same(index, {3: 30, 2: 20, 8: 80, 9: 90, 1: 11})


def test_a_key_repeated_in_a_removal_is_removed_once():
    index = DeviceKeyIndex(expected=100, device=DEVICE)
    index.add(torch.tensor([4, 5], device=DEVICE), torch.tensor([40, 50], device=DEVICE))
    assert sorted(index.remove(torch.tensor([4, 4, 4], device=DEVICE)).tolist()) == [-1, -1, 40]
    assert_same(index, {5: 50})


def test_what_it_refuses():
    index = DeviceKeyIndex(device=DEVICE)
    one = torch.tensor([1], device=DEVICE)
    with pytest.raises(ValueError, match="1 keys given with 0 slots"):
        index.add(one, one[:0])
    with pytest.raises(ValueError, match="must not be negative, got key -1 and slot 1"):
        index.add(-one, one)
    with pytest.raises(TypeError, match="keys must be int64, got int32"):
        index.find(one.int())
    index.add(one[:0], one[:0])
    assert_same(index, {})
