"""What the tests of this room share."""

import os
import secrets

import pytest


@pytest.fixture
def seed() -> int:
    """A fresh seed, shown when the test fails; `ADALOADER_TEST_SEED` gives it again."""
    drawn = int(os.environ.get("ADALOADER_TEST_SEED", secrets.randbits(31)))
    print(f"ADALOADER_TEST_SEED={drawn}")
    return drawn
