"""Where compiled functions cannot be kept on disk: a run goes on, and says once that each start compiles them again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
import cuda_ops
from cuda_ops.cpu.dedup import _dedup
from cuda_ops.cpu.kernels import first_outside
if len(sys.argv) > 1:  # more bytes than that no file may have: as on a full disk, writing fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
print(cuda_ops.dedup(np.array([4, 2, 4]))[0], first_outside(np.array([1, 5]), 3))
print(cuda_ops.same_ids(np.arange(3), np.arange(3)))
print("hits", sum(_dedup.stats.cache_hits.values()), "misses", sum(_dedup.stats.cache_misses.values()))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the program in a Python of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def assert_one_warning(stderr: str, folder: str) -> None:
    said = [line for line in stderr.splitlines() if "compiled functions cannot be" in line]
    assert len(said) == 1, stderr
    assert folder in said[0] and "each start compiles them again" in said[0] and "set NUMBA_CACHE_DIR to" in said[0]


def test_without_a_folder_that_can_be_written_all_is_compiled_again(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "cache")  # below a file: root cannot make it either
    result = run(NUMBA_CACHE_DIR=folder, NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[4 2] 1", "True", "hits 0 misses 1"]
    assert_one_warning(result.stderr, folder)


@pytest.mark.parametrize("most_bytes", [0, 2000])  # no index of what there is; that, and not what is compiled
def test_a_full_disk_ends_no_call(tmp_path, most_bytes):
    full = run(str(most_bytes), NUMBA_CACHE_DIR=str(tmp_path))
    assert full.returncode == 0, full.stderr
    assert full.stdout.splitlines() == ["[4 2] 1", "True", "hits 0 misses 1"]
    assert_one_warning(full.stderr, str(tmp_path))
    with_room = [run(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert [each.stdout.split("hits")[1].split() for each in with_room] == [["0", "misses", "1"], ["1", "misses", "0"]]
    assert not any("compiled functions" in each.stderr for each in with_room)


def test_other_errors_of_numbas_settings_are_not_hidden(tmp_path):
    result = run(NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CACHE_LOCATOR_CLASSES="NoSuchLocator")
    assert result.returncode and "Unknown cache locator class: 'NoSuchLocator'" in result.stderr
