"""What the tests of models on a device share."""

import os
import secrets

import pytest

torch = pytest.importorskip("torch")


@pytest.fixture
def seed() -> int:
    """A fresh seed, shown when the test fails; `ADALOADER_TEST_SEED` gives it again."""
    drawn = int(os.environ.get("ADALOADER_TEST_SEED", secrets.randbits(31)))
    print(f"ADALOADER_TEST_SEED={drawn}")
    return drawn


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A device of another type than the CPU, whose copies take their time (`far.py`, `delayed.py`)."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no place for a device in Python")
    from tests.device.delayed import install

    return install()
