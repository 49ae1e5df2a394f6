"""The CUDA bodies on Numba's simulator, in a process of their own: Numba reads the switch when it is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="this process is on the simulator already")
def test_the_tests_of_the_cuda_bodies_pass_on_the_simulator():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda_ops/cuda"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 40, run.stdout


def test_without_cuda_tensors_nothing_of_cuda_is_imported():
    program = (
        "import sys, torch, cuda_ops\n"
        "cuda_ops.expand(torch.ones(2, 3), torch.tensor([0, 1]))\n"
        "print([name for name in sys.modules if name.startswith(('numba.cuda', 'cuda_ops.cuda'))])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
