"""The commands of `python -m adaloader`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from adaloader.checkpoint.exporting import export
from adaloader.checkpoint.inspecting import describe, verify
from adaloader.checkpoint.layout import find_checkpoint, read_index
from adaloader.errors import CheckpointError
from adaloader.job import add_run_arguments, run_job


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code: 0, 1 for what is wrong with a checkpoint or job, 2 for the command line.

    The code of `run` is its job's where that is not 0.
    """
    parser = argparse.ArgumentParser(prog="python -m adaloader", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="list what is inside a checkpoint, and verify it")
    inspecting.add_argument("path", type=Path, help="its folder, or one of several (the newest is taken)")
    inspecting.add_argument("--quick", action="store_true", help="do not read the files whole")
    exporting = commands.add_parser("export", help="write the model's state_dict as one safetensors file")
    exporting.add_argument("path", type=Path, help="the checkpoint's folder, or one of several (the newest is taken)")
    exporting.add_argument("out", type=Path, help="the file to write, OUT.safetensors")
    add_run_arguments(commands.add_parser("run", help="start a job, say what died, and start it again"))
    args = parser.parse_args(arguments)
    try:
        code = {"inspect": _inspect, "export": _export, "run": run_job}[args.command](args)
        print(end="", flush=True)  # here, where an error can be caught; at the exit it would be a traceback
        return code
    except BrokenPipeError:  # who read our output, such as `head`, has read enough
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            os.dup2(nowhere, stream.fileno())
        return 128 + signal.SIGPIPE  # as of a program that the signal ends
    except CheckpointError as error:
        print(f"adaloader: {error}", file=sys.stderr)
        return 1


def _inspect(args: argparse.Namespace) -> int:
    for line in describe(args.path):
        print(line)
    if args.quick:
        return 0
    problems = verify(args.path, lambda numbers: _progress(numbers, "verifying"))
    for problem in problems:
        print(f"adaloader: {problem}", file=sys.stderr)
    if not problems:
        print("verified: every file is as it was written")
    return int(bool(problems))


def _export(args: argparse.Namespace) -> int:
    index = read_index(find_checkpoint(args.path))
    total = sum(t.rows * t.dim * int(t.dtype.removeprefix("float")) // 8 for t in index.tables.values())
    bar = _progress(None, "exporting", total=total, unit="B", unit_scale=True)
    progress = (lambda count: None) if bar is None else bar.update
    try:
        size = export(args.path, args.out, progress, lambda numbers: _progress(numbers, "verifying"))
    finally:
        if bar is not None:
            bar.close()
    print(f"{args.out}: {size:,} bytes")
    return 0


def _progress(of, what: str, **options):
    """Return `of` with a progress bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return of
    return tqdm(of, desc=what, disable=not sys.stderr.isatty(), leave=False, **options)
