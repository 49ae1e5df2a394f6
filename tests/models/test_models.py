"""Every model of the zoo trains under AdaLoader as in plain PyTorch, with the tables managed that can be."""

import importlib
import importlib.util

import pytest
import torch

from tests.models.zoo import PACKAGES, all_cases, as_tensor, compare, difference, train_plain

CASES = {case.id: case for case in all_cases()}
LIMITS = {torch.float64: (1e-11, 1e-11), torch.float32: (1e-5, 2e-5)}
# Some parameters have a gradient of zero but for rounding (the bias of an attention's keys): Adagrad makes that a sign.
ADAGRAD_LIMITS = (1e-7, 1e-6)
FEWEST = {"deepctr_torch": 40, "torch_geometric": 15, "transformers": 60, "torch": 20}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_has_its_cases(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install '.[models]'")
    assert len(importlib.import_module(PACKAGES[package]).CASES) >= FEWEST[package]


@pytest.mark.parametrize("name", CASES)
def test_sgd_equals_plain(name):
    case = CASES[name]
    result = compare(case, "sgd")
    loss_limit, weight_limit = LIMITS[case.dtype]
    assert result.loss_difference <= loss_limit
    assert result.weight_difference <= weight_limit
    assert set(result.dense) == set(result.expected_dense)
    assert result.learned > 1e-4 and (result.lookups > 0) == bool(result.managed)
    assert result.coverage >= case.coverage, result.missed


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float64])
def test_adagrad_equals_plain(name):
    result = compare(CASES[name], "adagrad")
    assert result.loss_difference <= ADAGRAD_LIMITS[0]
    assert result.weight_difference <= ADAGRAD_LIMITS[1]


def test_a_difference_is_seen():
    """The comparison must be able to fail: a run from another seed differs, as do weights of another shape or NaNs."""
    case = CASES["home-made: matrix factorisation with biases"]
    one, other = train_plain(case, "sgd", 0), train_plain(case, "sgd", 1)
    assert difference(as_tensor(one.losses), as_tensor(other.losses)) > 1e-3
    assert max(difference(one.weights[name], value) for name, value in other.weights.items()) > 1e-3
    value = torch.ones(3)
    assert difference(value, torch.ones(2)) == difference(value, torch.tensor([1.0, torch.nan, 1.0])) == float("inf")
