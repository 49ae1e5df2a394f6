"""Models on a device, tested in processes of their own (see `tests/device/conftest.py`): one, and two ranks."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.launch import ROOT, launch, mpirun


def test_models_on_a_device():
    environment = {**os.environ, "ADALOADER_FAR_DEVICE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/device"]
    command += ["--ignore", "tests/device/test_ranks.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = re.findall(r"(\d+) (?:passed|skipped)", run.stdout)  # skipped where PyTorch has no such place
    assert sum(map(int, counts)) >= 60, run.stdout


@pytest.mark.skipif(find_spec("mpi4py") is None or mpirun() is None, reason="no mpi4py or no mpirun")
def test_models_on_a_device_on_two_ranks(tmp_path):
    program = tmp_path / "run.py"
    program.write_text(
        "import os, sys, pytest\n"
        "os.environ['ADALOADER_FAR_DEVICE'] = '1'\n"
        f"os.chdir({str(ROOT)!r})\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/device/test_ranks.py']))\n"
    )
    result = launch(2, program, timeout_seconds=900.0)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"2 (passed|skipped)", result.stdout), result.stdout
