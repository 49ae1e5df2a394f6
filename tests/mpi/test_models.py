"""Models of the zoo on several ranks, each with its share of every batch, give what one process gives."""

import pytest
import torch

from tests.models.sharing import samples_in, share_of, train_shared
from tests.models.zoo import all_cases, as_tensor, difference

CASES = {case.id: case for case in all_cases() if case.per_sample and case.dtype == torch.float64}


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_plain(comm, name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        plain = train_shared(comm, CASES[name], "sgd", 3, managed=False)
        managed = train_shared(comm, CASES[name], "sgd", 3, managed=True)
    finally:
        torch.set_default_dtype(before)
    assert difference(as_tensor(managed.losses), as_tensor(plain.losses)) <= CASES[name].tolerance
    if comm.rank:
        return
    assert managed.weights.keys() == plain.weights.keys()
    for weight, value in plain.weights.items():
        assert difference(managed.weights[weight], value) <= CASES[name].tolerance, weight


@pytest.mark.parametrize("name", CASES)
def test_shares_make_up_the_batch(name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        batch = CASES[name].make_batches(CASES[name].make_model())[0]
    finally:
        torch.set_default_dtype(before)
    assert sum(samples_in(share_of(batch, rank, 3)) for rank in range(3)) == samples_in(batch) >= 3
