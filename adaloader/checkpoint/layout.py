"""A checkpoint on disk: a folder with an index and, in a folder within it, one file of tensors per rank.

    PATH/index.json                 what there is, with sizes and checksums; renamed into place when all else is on disk
    PATH/data-XXXX/rank-00000.safetensors

The index is what makes a checkpoint: without one, or beside another one's data, files are of a save that did not end.
So at any instant the folder holds the last complete checkpoint, or none yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaloader.checkpoint.tensor_file import TensorFile, open_regular, parse_json
from adaloader.errors import CheckpointError
from pm.storage.records import latest_caught_up

FORMAT = "adaloader-checkpoint"
VERSION = 1
INDEX = "index.json"
_MOST_INDEX_BYTES = 1 << 28
_DATA = re.compile(r"data-[0-9a-f]{16}")
_FILE = re.compile(r"rank-[0-9]{5,9}\.safetensors")
STEP_NAME = re.compile(r"step-([0-9]{12})")


@dataclass(frozen=True)
class FileEntry:
    """One file of tensors: its name, size, and the CRC-32 of its header and of each tensor."""

    name: str
    bytes: int
    header_crc: int
    crcs: dict[str, int]


@dataclass(frozen=True)
class TableEntry:
    """One managed table.

    Args:
        rows, dim, dtype: as declared.
        rule: how steps update its rows; `states` are the names of the parts of its state, `state_widths` how many
            numbers of a row each has.
        aliases: all names under which the model's state_dict has it.
        held: rows of all files together.
        gradient_steps, begun: see `pm.Table`.
        initial_state: what the state of a row starts from.
        program: how rows that nobody touched start, for tables declared under `deferred_init`; None where all are here.
        history_steps, history: number and node of the steps that rows may still have to catch up with; None for tables
            whose steps do not move rows that they do not touch.
    """

    rows: int
    dim: int
    dtype: str
    rule: str
    states: list[str]
    state_widths: list[int]
    aliases: list[str]
    held: int
    gradient_steps: int
    begun: bool
    initial_state: float
    program: dict[str, Any] | None
    history_steps: int = 0
    history: Any = None


@dataclass(frozen=True)
class Index:
    """What is in a checkpoint; `trees` are nodes of `tree.decode` of rank 0's file, `of_ranks` of each rank's."""

    data: str
    steps: int
    created: str
    software: dict[str, str]
    configuration: dict[str, Any]
    tables: dict[str, TableEntry]
    trees: dict[str, Any]
    of_ranks: list[dict[str, Any]]
    files: list[FileEntry] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        return len(self.files)


def held_name(what: str, table: str, state: str = "") -> str:
    """Return the name, in a rank's file, of what it holds of a table: its "rows", "values", "state" or "caught_up"."""
    return f"{what}/{table}" + (f"/{state}" if state else "")


def encode_index(index: Index) -> bytes:
    """Return the text of an index, with a digest of what it says."""
    content = asdict(index)
    return (
        json.dumps(
            {"format": FORMAT, "version": VERSION, "digest": _digest(content), "content": content}, allow_nan=False
        )
        + "\n"
    ).encode()


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_index(folder: Path) -> Index:
    """Read and check the index of a checkpoint, but not the files that it names.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = folder / INDEX
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: pass that of a checkpoint, or of several")
    if not path.exists():
        raise CheckpointError(f"{folder} holds no complete checkpoint: {INDEX} is missing")
    file = open_regular(path)
    with os.fdopen(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > _MOST_INDEX_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; no index has more than {_MOST_INDEX_BYTES:,}")
        parsed = parse_json(opened.read(_MOST_INDEX_BYTES), path)
    if not isinstance(parsed, dict) or parsed.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no index of a checkpoint: its format is not {FORMAT!r}")
    if parsed.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {str(parsed.get('version'))[:40]} of the format, and this AdaLoader knows up to "
            f"{VERSION}: install a newer one to load it"
        )
    content = parsed.get("content")
    try:
        is_sound = isinstance(content, dict) and parsed.get("digest") == _digest(content)
    except RecursionError as error:
        raise CheckpointError(f"{path} is malformed: it is nested too deep") from error
    if not is_sound:
        raise CheckpointError(f"{path} is damaged: its content does not have the digest that it gives")
    return _index_of(content, path)


def _index_of(content: Mapping[str, Any], path: Path) -> Index:
    """Make an index of what was parsed; every name, number and list in it is checked here, once."""
    try:
        made = Index(
            **{
                **content,
                "tables": {name: TableEntry(**entry) for name, entry in content["tables"].items()},
                "files": [FileEntry(**entry) for entry in content["files"]],
            }
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed: {error}") from error
    problem = _problem(made)
    if problem:
        raise CheckpointError(f"{path} is malformed: {problem}")
    return made


def _problem(index: Index) -> str:
    if not isinstance(index.data, str) or not _DATA.fullmatch(index.data):
        return f"{str(index.data)[:80]!r} is no name of a folder of data"
    if not index.files or not _is_count(index.steps) or not isinstance(index.trees, dict):
        return "it names no files, no steps or no trees"
    if not isinstance(index.of_ranks, list) or len(index.of_ranks) != len(index.files):
        return f"it has {len(index.files)} files, and states of another number of ranks"
    if not isinstance(index.configuration, dict) or not all(isinstance(of, dict) for of in index.of_ranks):
        return "its configuration or states are no dictionaries"
    for at, file in enumerate(index.files):
        if not isinstance(file.name, str) or not _FILE.fullmatch(file.name) or file.name != file_name(at):
            return f"{str(file.name)[:80]!r} is no name of the file of rank {at}"
        if not (_is_count(file.bytes) and _is_count(file.header_crc) and isinstance(file.crcs, dict)):
            return f"the entry of {file.name} has no sizes or checksums"
    for name, table in index.tables.items():
        if not (_is_count(table.rows) and _is_count(table.dim) and _is_count(table.held) and table.held <= table.rows):
            return f"table {name!r} has {table.held} of {table.rows} rows of {table.dim}"
        if table.dtype not in ("float32", "float64") or not (
            _is_count(table.gradient_steps) and _is_count(table.history_steps)
        ):
            return f"table {name!r} has dtype {table.dtype!r} and {table.gradient_steps!r} steps"
        if not (isinstance(table.states, list) and isinstance(table.state_widths, list)) or len(table.states) != len(
            table.state_widths
        ):
            return f"table {name!r} has states {table.states!r} of widths {table.state_widths!r}"
        if not all(isinstance(each, str) for each in table.states) or not all(map(_is_count, table.state_widths)):
            return f"table {name!r} has states {table.states!r} of widths {table.state_widths!r}"
        if not isinstance(table.aliases, list) or not all(isinstance(each, str) for each in table.aliases):
            return f"table {name!r} has the names {table.aliases!r}"
        if not isinstance(table.initial_state, (int, float)) or not isinstance(table.program, (dict, type(None))):
            return f"table {name!r} says wrongly how its rows start"
    return ""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def step_folder(folder: Path, steps: int) -> Path:
    """Return where, in a folder of several checkpoints, that of `steps` is."""
    return folder / f"step-{steps:012d}"


def complete_in(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder of several, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if STEP_NAME.fullmatch(each.name) and (each / INDEX).is_file())


def find_checkpoint(path: Path) -> Path:
    """Return the folder of a checkpoint: `path` itself, or the newest complete one in it.

    Raises:
        CheckpointError: if there is none.
    """
    if not (path / INDEX).exists():
        complete = complete_in(path)
        if complete:
            return complete[-1]
        if path.is_dir():
            raise CheckpointError(f"{path} holds no complete checkpoint: no {INDEX} in it, nor in a step-... of it")
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}: pass the folder of a checkpoint, or of several")
    return path


def open_file(folder: Path, index: Index, rank: int) -> TensorFile:
    """Open a rank's file of tensors, whose size and header are checked; what the tables hold is of the right shape.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    entry = index.files[rank]
    if (folder / index.data).is_symlink():
        raise CheckpointError(f"{folder / index.data} is a link: a checkpoint's data lies in its own folder")
    opened = TensorFile(folder / index.data / entry.name, entry.bytes)
    try:
        if opened.header_crc != entry.header_crc or set(opened.tensors) != set(entry.crcs):
            raise CheckpointError(f"{opened.path} is damaged: its header does not have the checksum in the index")
        for name, table in index.tables.items():
            _check_held(opened, name, table)
    except BaseException:
        opened.close()
        raise
    return opened


def _check_held(opened: TensorFile, name: str, table: TableEntry) -> None:
    """Raise CheckpointError unless a file holds as many values and states of a table as it has rows of it."""
    rows = held_name("rows", name)
    if rows not in opened.tensors:
        return
    shape = opened.entry(rows).shape
    dtype = {"float32": "F32", "float64": "F64"}[table.dtype]
    expected = {rows: ("I64", shape[:1]), held_name("values", name): (dtype, (*shape[:1], table.dim))}
    for state, width in zip(table.states, table.state_widths, strict=True):
        expected[held_name("state", name, state)] = (dtype, (*shape[:1], width))
    if table.history is not None:
        expected[held_name("caught_up", name)] = ("I64", shape[:1])
    for tensor, (kind, form) in expected.items():
        found = opened.entry(tensor)
        if (found.dtype, found.shape) != (kind, form) or len(shape) != 1:
            raise CheckpointError(
                f"{opened.path}: {tensor!r} is {found.dtype} {list(found.shape)} where table {name!r} has {kind} "
                f"{list(form)}"
            )


def verify_file(folder: Path, index: Index, rank: int) -> str:
    """Read a rank's file whole and return what is wrong with it, an empty text if nothing is."""
    try:
        with open_file(folder, index, rank) as opened:
            for name, crc in index.files[rank].crcs.items():
                if opened.crc(name) != crc:
                    return f"{opened.path} is damaged: {name!r} does not have the checksum in the index"
            for name, table in index.tables.items():
                problem = _check_rows(opened, name, table)
                if problem:
                    return f"{opened.path}: {problem}"
    except CheckpointError as error:
        return str(error)
    return ""


def _check_rows(opened: TensorFile, name: str, table: TableEntry) -> str:
    rows, chunk, last = held_name("rows", name), 1 << 18, -1
    if rows not in opened.tensors:
        return ""
    for start in range(0, opened.entry(rows).shape[0], chunk):
        part = opened.rows(rows, start, start + chunk)
        if part[0] <= last or (np.diff(part) <= 0).any() or part[-1] >= table.rows:
            return f"the rows of table {name!r} are not ascending from 0 to {table.rows - 1}"
        last = int(part[-1])
        if table.history is not None:
            words = opened.rows(held_name("caught_up", name), start, start + chunk)
            if not 0 <= latest_caught_up(words) <= table.history_steps:
                return f"rows of table {name!r} are caught up to other steps than its {table.history_steps}"
    return ""


# Writing


def write_durably(path: Path, text: bytes) -> None:
    """Write a file whole, and have it on the disk; nobody sees it by its name before."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove_other_data(folder: Path, kept: str) -> None:
    """Remove the data, in a checkpoint's folder, of saves that a later one has replaced, or that did not end."""
    for each in folder.iterdir():
        if _DATA.fullmatch(each.name) and each.name != kept and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Remove a whole checkpoint, its index first: what is left should that be interrupted is none."""
    (folder / INDEX).unlink(missing_ok=True)
    remove_other_data(folder, "")
    for name in (INDEX + ".tmp",):
        (folder / name).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        return  # somebody keeps files of their own in it
