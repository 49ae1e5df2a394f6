"""Start a program of several ranks from a test, and bring back all that it said.

A test that must see a whole job fail (an exception on one rank, a hang, Ctrl-C) cannot be one of that job's
ranks. It launches the job with `launch` and looks at the `Result`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository root: put first on the program's import path, so that nothing need be installed."""

LAUNCHER_PREFIXES = (
    "PMI_",
    "PMI2_",
    "PMIX_",
    "HYDRA_",
    "HYDI_",
    "MPIR_",
    "MPI_LOCAL",
    "OMPI_",
    "PRTE_",
    "SLURM_",
)
"""Variables by which a launcher tells a process that it is a rank: a job started from inside another must not
inherit them.
"""

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""One thread a rank, output as it comes, and (Open MPI) more ranks than cores."""

SECONDS_TO_DIE = 5.0
"""How long a job that is told to end may take before it is killed."""


@dataclass(frozen=True)
class Result:
    """What a program did: its exit code (negative: the signal that ended it), its output, and how long it
    took.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float


def mpirun() -> str | None:
    """Return the path of the `mpirun` beside this interpreter, else the first on PATH, else None."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def launch(
    n: int,
    source_or_path: str | Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
    interrupt_after_seconds: float | None = None,
) -> Result:
    """Run a Python program on `n` ranks and wait for its end.

    Args:
        n: ranks under `mpirun`; 0 runs the program without `mpirun`.
        source_or_path: a path (a `Path`, or a string that ends in `.py`), or the program's text, dedented and
            written to a temporary file.
        args: the program's arguments.
        env: variables on top of this process's own.
        timeout_seconds: the limit; the whole process group is killed when it is over.
        interrupt_after_seconds: send SIGINT to the whole process group after so long, as Ctrl-C in a terminal
            does.

    Raises:
        FileNotFoundError: there is no `mpirun`, or no such program.
        TimeoutError: the job did not end in time; the message holds the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="adaloader-launch-") as folder:
        command = _command(n, _program(source_or_path, Path(folder)), args)
        started = time.monotonic()
        with _running(command, _environment(env), Path(folder)) as process:
            timed_out = _wait(process, timeout_seconds, interrupt_after_seconds)
        seconds = time.monotonic() - started
        stdout, stderr = ((Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    if timed_out:
        raise TimeoutError(
            f"{' '.join(command[:-1])} did not end within {timeout_seconds} s and was killed\n"
            f"--- end of its stdout\n{stdout[-4000:]}\n--- end of its stderr\n{stderr[-8000:]}"
        )
    return Result(process.returncode, stdout, stderr, seconds)


def _program(source_or_path: str | Path, folder: Path) -> Path:
    """Return the path of the program, written to `folder` if it was given as text."""
    if isinstance(source_or_path, Path) or source_or_path.endswith(".py"):
        path = Path(source_or_path)
        if not path.is_file():
            raise FileNotFoundError(f"no program {path}: give a path that exists, or the program's text")
        return path
    path = folder / "program.py"
    path.write_text(textwrap.dedent(source_or_path))
    return path


def _command(n: int, program: Path, args: tuple[str, ...]) -> list[str]:
    python = [sys.executable, "-u", str(program), *map(str, args)]
    if n == 0:
        return python
    launcher = mpirun()
    if launcher is None:
        raise FileNotFoundError("no mpirun beside the interpreter or on PATH: pip install 'adaloader[mpi]'")
    return [launcher, "-n", str(n), *python]


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {**kept, **SETTINGS, "PYTHONPATH": path, **(extra or {})}


@contextmanager
def _running(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Own a process group: whatever happens, nothing of it is left when the block ends.

    Output goes to files, for a pipe stays open as long as any grandchild holds it.
    """
    with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_take_interrupts,
        )
        try:
            yield process
        finally:
            _end(process)


def _take_interrupts() -> None:
    """Heed SIGINT again, which a shell makes those ignore that it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float, interrupt_after_seconds: float | None) -> bool:
    """Wait for the end of the job, and return whether the time was over before."""
    left_seconds = timeout_seconds
    if interrupt_after_seconds is not None:
        try:
            process.wait(interrupt_after_seconds)
            return False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            left_seconds -= interrupt_after_seconds
    try:
        process.wait(left_seconds)
        return False
    except subprocess.TimeoutExpired:
        return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher politely, so that it ends ranks that are not of its process group; then kill what is
    left.
    """
    for number, seconds in ((signal.SIGTERM, SECONDS_TO_DIE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
