"""What is inside a checkpoint, for people, and whether all of it is as it was written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from adaloader.checkpoint.layout import (
    Index,
    complete_in,
    find_checkpoint,
    held_name,
    open_file,
    read_index,
    verify_file,
)
from adaloader.errors import CheckpointError


def describe(path: Path) -> Iterator[str]:
    """Yield lines that say what a checkpoint has; its files are opened, but not read whole.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    folder = find_checkpoint(path)
    index = read_index(folder)
    yield f"{folder}: {index.steps:,} steps, saved by {index.ranks} rank(s) at {index.created}"
    if folder != path:
        yield f"the newest of {len(complete_in(path))} complete checkpoints in {path}"
    yield f"{sum(file.bytes for file in index.files):,} bytes in {index.ranks} file(s) of {folder / index.data}"
    yield "software: " + ", ".join(f"{name} {number}" for name, number in index.software.items())
    settings = index.configuration.get("settings", {})
    yield "settings: " + ", ".join(f"{name}={value!r}" for name, value in settings.items())
    yield from _tables(folder, index)
    yield from _others(folder, index)


def _tables(folder: Path, index: Index) -> Iterator[str]:
    per_file = []
    for rank in range(index.ranks):
        with open_file(folder, index, rank) as file:
            per_file.append({name: file.entry(held_name("rows", name)).shape[0] for name in index.tables})
    for name, table in index.tables.items():
        state = f" with {', '.join(table.states)}" if table.states else ""
        yield (
            f"table {name}: {table.held:,} of {table.rows:,} rows x {table.dim} {table.dtype}, {table.rule}{state}, "
            f"{table.gradient_steps:,} steps; by rank {[held[name] for held in per_file]}"
        )


def _others(folder: Path, index: Index) -> Iterator[str]:
    with open_file(folder, index, 0) as file:
        for name, entry in sorted(file.tensors.items()):
            if name.startswith("model/"):
                yield f"{name.removeprefix('model/')}: {entry.dtype.lower()} {list(entry.shape)}"
    optimizers = index.trees.get("parameters", [])
    yield f"optimizers: {len(optimizers)}, of {[sum(map(len, groups)) for groups in optimizers]} parameters"
    extra = index.of_ranks[0].get("extra", {}).get("dict", [])
    yield f"extra: {', '.join(str(item[0]) for item in extra) or 'nothing'}"


def verify(path: Path, progress=lambda each: each) -> list[str]:
    """Read a checkpoint whole and return what is wrong with it, a line each.

    `progress`: wraps the numbers of its files as they are read.
    """
    folder = find_checkpoint(path)
    index = read_index(folder)
    numbers: Iterable[int] = progress(range(index.ranks))
    problems = [problem for rank in numbers if (problem := verify_file(folder, index, rank))]
    if problems:
        return problems
    for name, table in index.tables.items():
        held = 0
        for rank in range(index.ranks):
            with open_file(folder, index, rank) as file:
                held += file.entry(held_name("rows", name)).shape[0]
        if held != table.held:
            problems.append(f"{folder}: table {name!r} has {held} rows in its files, {table.held} in the index")
    return problems


def check(path: Path, progress=lambda each: each) -> None:
    """Raise CheckpointError if anything is wrong with a checkpoint; `progress` is that of `verify`."""
    problems = verify(path, progress)
    if problems:
        raise CheckpointError("; ".join(problems))
