"""These tests need a CUDA device or Numba's simulator of one (`tests/cuda_ops/test_simulator.py` runs them on that)."""

import pytest

from tests.cuda_ops.cuda.device import CAN_RUN

NEEDS_NO_DEVICE = "test_compiles.py"


def pytest_collection_modifyitems(items):
    """Mark this folder's tests `gpu`, and skip them where there is none."""
    for item in items:
        if item.path.parent.name == "cuda" and item.path.name != NEEDS_NO_DEVICE:
            item.add_marker(pytest.mark.gpu)
            if not CAN_RUN:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or NUMBA_ENABLE_CUDASIM=1"))
