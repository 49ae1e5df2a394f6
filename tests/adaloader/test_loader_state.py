"""A loader is saved and resumes after the last batch that it has handed out; on one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.adaloader.id_loaders import Pairs, managed, numbers, save_and_load, train


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("lookahead", [0, 1, 5, 50])
@pytest.mark.parametrize("stop_after", [0, 1, 3, 6])
def test_resuming_goes_on_after_the_last_batch_handed_out(num_workers, lookahead, stop_after, seed):
    if num_workers and stop_after not in (1, 6):
        pytest.skip("workers are slow to start")
    print("seed", seed)

    def build():
        return managed(Pairs(), 4, shuffle=True, num_workers=num_workers, lookahead=lookahead)

    torch.manual_seed(seed)
    loader, model, optimizer = build()
    torch.manual_seed(seed)
    states, seen = [], []
    iterator = iter(loader)
    for batch in itertools.islice(iterator, stop_after):
        train(model, optimizer, batch)
        states.append(loader.state_dict())
        seen.append(batch[0].tolist())
    state = save_and_load(loader.state_dict())
    rest = numbers(iterator)
    resumed, model, optimizer = build()
    torch.manual_seed(seed + 1)
    resumed.load_state_dict(state)
    assert numbers(resumed) == rest
    assert sum(seen + rest, []) != list(range(23)) and sorted(sum(seen + rest, [])) == list(range(23))
    assert len(numbers(resumed)) == 6  # and the next pass is whole
    for number, earlier in enumerate(states):  # each earlier state is as it was taken
        resumed.load_state_dict(earlier)
        if num_workers == 0 or number == 0:
            assert numbers(resumed) == seen[number + 1 :] + rest


def test_the_state_after_the_end_begins_a_new_pass():
    loader, _, _ = managed(Pairs(), 4)
    list(loader)
    loader.load_state_dict(save_and_load(loader.state_dict()))
    assert len(list(loader)) == 6


def test_state_before_the_first_pass():
    loader, _, _ = managed(Pairs(), 4, shuffle=True)
    state = loader.state_dict()
    first = numbers(loader)
    loader.load_state_dict(state)
    assert numbers(loader) == first
