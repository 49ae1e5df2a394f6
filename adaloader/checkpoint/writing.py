"""Writing what was cut, in the background: each rank its file, then rank 0 the index that makes them a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaloader.checkpoint.dtypes import dtype_name
from adaloader.checkpoint.exchange import Exchange
from adaloader.checkpoint.layout import (
    INDEX,
    FileEntry,
    Index,
    encode_index,
    file_name,
    read_index,
    remove_other_data,
    sync_folder,
    write_durably,
)
from adaloader.checkpoint.tables import Cut
from adaloader.checkpoint.tensor_file import TensorFileWriter
from adaloader.checkpoint.tree import Encoder
from adaloader.errors import CheckpointError
from pm import PeerError

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel

_LOOK_SECONDS = 0.1
_REMEDY = "if that takes so long because a disk is slow, build the loader with more timeout_seconds"
_INTACT = "what was saved before is intact, and the run can go on"


@dataclass(frozen=True)
class Saved:
    """What a save has done.

    Args:
        path: the checkpoint's folder.
        bytes: over all ranks.
        seconds: from its beginning until it was on the disk.
        stall_seconds: how long of it this rank's training stood still: the cut, records copied aside before they were
            updated, and waits for the end.
    """

    path: Path
    bytes: int
    seconds: float
    stall_seconds: float


@dataclass(frozen=True)
class Part:
    """What one rank has to write: `nodes` for the index, the tensors of `encoder`, and the rows of `cut`."""

    folder: Path
    data: str
    nodes: dict[str, Any]
    encoder: Encoder
    cut: Cut


class Saving:
    """A checkpoint that is being written while training goes on.

    `wait()` returns when it is on the disk; the next save, `load` and the loader's `close` wait for it too.
    """

    def __init__(
        self, managed: ManagedModel, part: Part, make_index: Callable[[list[dict[str, Any]]], Index], started: float
    ):
        self._manager, self._counts = managed.manager, managed.saves
        self._part, self._make_index, self._started = part, make_index, started
        self._number = managed.saves.begun
        self._exchange: Exchange | None = managed.exchange
        self._written, self._ended = threading.Event(), threading.Event()
        self._problem, self._bytes, self._seconds = "", 0, 0.0
        self._stall_seconds = time.perf_counter() - started
        self._is_told = False
        if self._exchange is not None:
            self._exchange.begin(self._number, self._end)
        self._thread = threading.Thread(target=self._run, name="adaloader-checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no thread left for us: all ranks hear of it if writing needs one
            self._run()
        _not_told.add(self)  # not before there is somebody who ends it

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self._part.folder

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not; `wait()` then returns or raises at once."""
        return self._ended.is_set()

    @property
    def is_told(self) -> bool:
        """Whether somebody has been told how it ended."""
        return self._is_told

    def wait(self) -> Saved:
        """Wait until the checkpoint is on the disk, and return what was done.

        Raises:
            CheckpointError: on every rank, if it could not be written; what was saved before is intact.
            PeerError: if another rank is not done `timeout_seconds` after this one.
        """
        started = time.perf_counter()
        try:
            self._await_end()
        finally:
            self._count_stall(time.perf_counter() - started)
        if not self._is_told:
            self._is_told = True
            _not_told.discard(self)
            self._counts.add(self._bytes, self._seconds, self.stall_seconds)
        if self._problem:
            raise CheckpointError(self._problem)
        return Saved(self.path, self._bytes, self._seconds, self.stall_seconds)

    @property
    def stall_seconds(self) -> float:
        """How long this rank's training has stood still for it until now."""
        return self._stall_seconds + self._part.cut.stall_seconds

    def forget(self) -> None:
        """This process was forked from the one that writes it, and has not got the thread that would end it here."""
        self._problem = f"process {os.getppid()} writes {self.path}, of which this one is a fork: wait for it there"
        self._is_told = True
        self._ended = threading.Event()  # a new one, for somebody may have held the lock of the other
        self._ended.set()

    def _count_stall(self, seconds: float) -> None:
        self._stall_seconds += seconds

    def _await_end(self) -> None:
        written_at = None
        while not self._ended.wait(_LOOK_SECONDS):
            if self._exchange is None:
                continue
            self._manager.raise_failure()
            if written_at is None and self._written.is_set():
                written_at = time.monotonic()
            if written_at is not None and time.monotonic() - written_at > self._manager.timeout_seconds:
                raise PeerError(self._describe_missing())

    def _describe_missing(self) -> str:
        """Return for whom this rank has waited in vain, in no lock, for the others are asked what they are doing."""
        manager, silent = self._manager, self._exchange.silent(self._number)
        missing = f"rank {', '.join(map(str, silent))} to write its part" if silent else "rank 0 to write the index"
        return (
            f"rank {manager.rank} has written its part of {self.path} and waited {manager.timeout_seconds:g} s "
            f"(timeout_seconds={manager.timeout_seconds:g}) for {missing}; {_REMEDY}. {manager.describe_peers()}"
        )

    # In the background

    def _run(self) -> None:
        rank, part = self._manager.rank, self._part
        try:
            said = _write_rank(part, rank)
        except Exception as error:  # whatever it is must reach all ranks, for they wait for this one
            said = f"!{part.folder}: {type(error).__name__}: {error}"
        finally:
            part.cut.end()
            part.encoder.tensors.clear()
        if self._exchange is not None:
            self._exchange.say(self._number, said)
        self._written.set()
        if rank == 0:
            self._conclude(said)

    def _conclude(self, said: str) -> None:
        """On rank 0: make the checkpoint what the folder holds when all have written, and tell them."""
        try:
            everyones = [said] if self._exchange is None else self._exchange.hear(self._number)
            problem = _conclude(self._part, everyones, self._make_index)
            size = 0 if problem else sum(json.loads(each)["file"]["bytes"] for each in everyones)
        except Exception as error:  # as above
            problem, size = f"{type(error).__name__}: {error}", 0
        text = json.dumps({"problem": problem, "bytes": size})
        if self._exchange is None:
            self._end(text)
        else:
            self._exchange.end(self._number, text)

    def _end(self, text: str) -> None:
        said = json.loads(text)
        self._problem, self._bytes = said["problem"], said["bytes"]
        self._seconds = time.perf_counter() - self._started
        self._ended.set()


@dataclass
class SaveCounts:
    """What the saves of a model have come to, on this rank."""

    begun: int = 0
    bytes: int = 0
    seconds: float = 0.0
    stall_seconds: float = 0.0

    def add(self, size: int, seconds: float, stall_seconds: float) -> None:
        self.bytes += size
        self.seconds += seconds
        self.stall_seconds += stall_seconds


_not_told: set[Saving] = set()


def _forget_parents() -> None:
    for saving in _not_told:
        saving.forget()
    _not_told.clear()


os.register_at_fork(after_in_child=_forget_parents)


def finish_at_exit() -> None:
    """The process ends: wait for what is being written, and say what could not be."""
    for saving in list(_not_told):
        try:
            saving.wait()
        except RuntimeError as error:
            print(f"adaloader: {error}", file=sys.stderr)


def _write_rank(part: Part, rank: int) -> str:
    """Write a rank's file; return what the index needs to know of it as JSON, or "!" and what went wrong."""
    path = part.folder / part.data / file_name(rank)
    writer, rows = None, part.cut.rows
    try:
        for of_table in rows:
            of_table.find()
        forms = {name: (dtype_name(each), tuple(each.shape)) for name, each in part.encoder.tensors.items()}
        for of_table in rows:
            forms.update(of_table.forms())
        writer = TensorFileWriter(path, forms)
        for of_table in rows:  # first, for the run may be waiting to update them
            for name, chunk in of_table.parts():
                writer.write(name, chunk)
        part.cut.end()
        for name, tensor in part.encoder.tensors.items():
            writer.write(name, tensor)
        writer.close()
    except OSError as error:
        return f"!{path}: {error.strerror or error}; {_INTACT}"
    finally:
        if writer is not None:
            writer.abandon()
    entry = FileEntry(path.name, writer.bytes, writer.header_crc, writer.crcs)
    held = {of_table.name: len(of_table) for of_table in rows}
    return json.dumps({"file": asdict(entry), "held": held, **part.nodes}, allow_nan=False)


def _conclude(part: Part, everyones: list[str], make_index: Callable[[list[dict[str, Any]]], Index]) -> str:
    """Write the index if all have written their files; return what went wrong, an empty text if nothing did."""
    failed = [f"rank {rank}: {each[1:]}" for rank, each in enumerate(everyones) if each.startswith("!")]
    problem = "the checkpoint could not be written: " + "; ".join(failed) if failed else ""
    try:
        problem = problem or _write_index(part, [json.loads(each) for each in everyones], make_index)
    finally:
        if not _is_current(part.folder, part.data):
            shutil.rmtree(part.folder / part.data, ignore_errors=True)
    if not problem:
        remove_other_data(part.folder, part.data)
    return problem


def _write_index(part: Part, said: list[dict[str, Any]], make_index: Callable[[list[dict[str, Any]]], Index]) -> str:
    folder, data = part.folder, part.folder / part.data
    missing = [each["file"]["name"] for each in said if not (data / each["file"]["name"]).is_file()]
    if missing:
        return f"{folder} is not one folder that all ranks see: rank 0 does not find {', '.join(missing)} there"
    try:
        for each in (data, folder.parent):
            sync_folder(each)
        write_durably(folder / INDEX, encode_index(make_index(said)))
    except OSError as error:
        return f"{folder / INDEX}: {error.strerror}; {_INTACT}"
    return ""


def _is_current(folder: Path, data: str) -> bool:
    """Whether the index already names this data."""
    try:
        return read_index(folder).data == data
    except CheckpointError:  # an index that cannot be read names nothing
        return False
