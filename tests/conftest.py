"""What all tests share: seeds; and no example has a deadline, for machines that many share are slow at times."""

import os
import secrets

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


@pytest.fixture
def seed() -> int:
    """A fresh seed, shown when the test fails; `ADALOADER_TEST_SEED` gives it again."""
    drawn = int(os.environ.get("ADALOADER_TEST_SEED", secrets.randbits(31)))
    print(f"ADALOADER_TEST_SEED={drawn}")
    return drawn


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """NumPy's generator with a fresh seed."""
    return np.random.default_rng(seed)
