"""What the tests of models on a device share."""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("ADALOADER_FAR_DEVICE") else ["test_*.py"]
"""PyTorch has one place for a device of others, and who fills it changes what a process sees of PyTorch: these tests
are run by `tests/test_device.py`, in processes of their own."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A device of another type than the CPU, whose copies take their time (`far.py`, `delayed.py`)."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no place for a device in Python")
    from tests.device.delayed import install

    return install()
