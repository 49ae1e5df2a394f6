"""Where compiled functions cannot be kept on disk: a run goes on, and says once that each start compiles them again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_ops

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


def run(*arguments: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run the program in a Python of its own, in `folder`, of whose modules it takes its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


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


def test_what_was_compiled_is_used_again_until_a_source_changes(tmp_path):
    """Numba itself goes by the file of the function that is called: another may have been compiled into it."""
    rooms = Path(cuda_ops.__file__).parent
    shutil.copytree(rooms, tmp_path / "cuda_ops", ignore=shutil.ignore_patterns("__pycache__"))

    def hits_and_misses() -> str:
        result = run(folder=tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
        assert result.returncode == 0, result.stderr
        return result.stdout.split("hits ")[1].strip()

    assert hits_and_misses() == "0 misses 1"
    assert hits_and_misses() == "1 misses 0"
    with (tmp_path / "cuda_ops" / "cpu" / "kernels.py").open("a") as source:
        source.write("\nCHANGED = True\n")
    assert hits_and_misses() == "0 misses 1"
    assert hits_and_misses() == "1 misses 0"


def test_other_errors_of_numbas_settings_are_not_hidden(tmp_path):
    result = run(NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CACHE_LOCATOR_CLASSES="NoSuchLocator")
    assert result.returncode and "Unknown cache locator class: 'NoSuchLocator'" in result.stderr
