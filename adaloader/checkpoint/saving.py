"""Saving: one cut through loader, tables, optimizers and random generators, by all ranks together."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adaloader.candidate import agree_on_candidates
from adaloader.checkpoint.agreement import raise_together
from adaloader.checkpoint.dtypes import dtype_name
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
from adaloader.checkpoint.positions import describe_loader, position_of
from adaloader.checkpoint.random_states import random_states
from adaloader.checkpoint.tables import OwnRows, own_rows, table_entry
from adaloader.checkpoint.tensor_file import TensorFileWriter
from adaloader.checkpoint.tree import Encoder
from adaloader.errors import CheckpointError
from adaloader.gathering import leaving_tables_out
from adaloader.managed_model import ManagedModel
from adaloader.table_values import all_texts, text_of_rank_0

if TYPE_CHECKING:
    from adaloader.loader import AdaLoader
    from adaloader.wrapped_loader import WrappedLoader


@dataclass(frozen=True)
class Saved:
    """What a save has done: the checkpoint's folder, bytes over all ranks, and seconds that it took on this rank."""

    path: Path
    bytes: int
    seconds: float


def save(path: str | os.PathLike, loader: AdaLoader | WrappedLoader, extra: Mapping[str, Any] | None = None) -> Saved:
    """Write a checkpoint of everything that a run needs to go on (collective).

    Tables (values and optimizer state of the rows that were touched), all other parameters and buffers, the state of
    all optimizers, random generators, and the loader's position as handed out. Call it where the loop has finished with
    a batch, after `optimizer.step()`: gradients are not saved. `path` is a folder that all ranks see; where it holds a
    checkpoint already, that one stays until this one is on the disk whole.

    Args:
        path: the checkpoint's folder; it is made.
        loader: the loader that the run trains with.
        extra: what else to keep, by name: numbers, text, tensors, lists and dictionaries of them, and whatever has
            `state_dict()` (schedulers, a GradScaler), of which that is kept. Each rank's own.

    Raises:
        ValueError: if the loader manages no model.
        CheckpointError: on every rank, saying on which the disk is full, a folder cannot be written, or what cannot be
            saved. Then nothing was changed, what was saved before is intact, and the run can go on.
    """
    return save_at(path, loader, extra, None)


def save_at(path, loader, extra, before: tuple[int, Any] | None) -> Saved:
    """As `save` (collective); `before`: batches handed out, and the loader's state, at the position to save, if not the
    last batch handed out."""
    started = time.perf_counter()
    managed = managed_by(loader)
    manager = managed.manager
    manager.settle()
    agree_on_candidates(managed)
    folder = Path(path)
    encoder = Encoder()
    state, problem = _encode_state(managed, loader, extra, encoder, before)
    raise_together(manager, problem)
    data = text_of_rank_0(manager, f"data-{secrets.token_hex(8)}")
    raise_together(manager, _make_folder(folder / data) if manager.rank == 0 else "")
    written: list[str] = []
    try:
        with manager.still():
            problem = _write_rank(managed, folder / data, encoder, state)
        written = all_texts(manager, problem)
        _raise_unwritten(written)
        raise_together(manager, _write_index(managed, loader, folder, data, written) if manager.rank == 0 else "")
    except BaseException:
        if manager.rank == 0 and not _is_current(folder, data):
            shutil.rmtree(folder / data, ignore_errors=True)
        raise
    if manager.rank == 0:
        remove_other_data(folder, data)
    total = sum(json.loads(each)["file"]["bytes"] for each in written)
    return Saved(folder, total, time.perf_counter() - started)


def managed_by(loader: AdaLoader | WrappedLoader) -> ManagedModel:
    """Return the model that a loader manages; what this rank owes the others of a pass that has ended is done first.

    Raises:
        ValueError: if it manages none.
    """
    session = getattr(loader, "_session", None)
    if session is None:
        raise ValueError(
            f"{type(loader).__name__} manages no model, so there is nothing to save or load: pass an AdaLoader that "
            "was built with model="
        )
    if session.managed.follower is not None:
        session.managed.follower.finish()
    return session.managed


def _encode_state(managed: ManagedModel, loader, extra, encoder: Encoder, before) -> tuple[dict[str, Any], str]:
    """Return this rank's nodes but for its rows, and what cannot be saved, an empty text if all can."""
    nodes: dict[str, Any] = {"trees": {}, "own": {}, "tables": {}}
    model = managed.model()
    try:
        if extra is not None and not isinstance(extra, Mapping):
            raise CheckpointError(f"extra must be a dictionary of what to keep by name, got {type(extra).__name__}")
        own = {
            "position": position_of(loader, before),
            "random": random_states(getattr(loader, "generator", None)),
            "draws": loader._session.draws.position(),
            "extra": stateful(dict(extra or {})),
        }
        with leaving_tables_out(managed), torch.no_grad():
            if managed.manager.rank == 0:
                nodes["trees"]["model"] = encoder.encode(dict(model.state_dict()), "model")
                optimizers = [each.state_dict() for each in managed.optimizers]
                nodes["trees"]["optimizers"] = encoder.encode(optimizers, "optimizers")
                nodes["trees"]["kinds"] = [type(each).__qualname__ for each in managed.optimizers]
                nodes["trees"]["parameters"] = [parameter_names(managed, each) for each in managed.optimizers]
            else:
                saved = model.state_dict()
                own["buffers"] = {name: saved[name] for name, _ in model.named_buffers() if name in saved}
        nodes["own"] = {name: encoder.encode(value, f"own/{name}") for name, value in own.items()}
        aliases = _names_by_parameter(managed)
        for table in managed.tables_in_order():
            if managed.manager.rank == 0:
                entry = table_entry(table, 0, encoder, aliases[id(table.parameter)])
                nodes["tables"][table.name] = asdict(entry)
    except CheckpointError as error:
        return nodes, str(error)
    return nodes, ""


def stateful(value: Any) -> Any:
    """Return `value` with the `state_dict()` of whatever in it has one in its place."""
    if isinstance(value, dict):
        return {name: stateful(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(stateful(each) for each in value)
    if callable(getattr(value, "state_dict", None)):
        return value.state_dict()
    return value


def parameter_names(managed: ManagedModel, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the parameters in each group of an optimizer; that of one that is not the model's is ""."""
    names = {key: names[0] for key, names in _names_by_parameter(managed).items()}
    return [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]


def _names_by_parameter(managed: ManagedModel) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, parameter in managed.model().named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _make_folder(data: Path) -> str:
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        data.mkdir()
        sync_folder(data.parent.parent)
    except OSError as error:
        return f"the checkpoint cannot be written: {error.filename or data}: {error.strerror}"
    return ""


def _write_rank(managed: ManagedModel, data: Path, encoder: Encoder, nodes: dict[str, Any]) -> str:
    """Write this rank's file; return what the index needs to know of it as JSON, or "!" and what went wrong."""
    path = data / file_name(managed.manager.rank)
    writer = None
    try:
        rows = own_rows(managed)
        forms = {name: (dtype_name(each), tuple(each.shape)) for name, each in encoder.tensors.items()}
        for of_table in rows:
            forms.update(of_table.forms())
        writer = TensorFileWriter(path, forms)
        for name, tensor in encoder.tensors.items():
            writer.write(name, tensor)
        _write_rows(managed, rows, writer)
        writer.close()
    except OSError as error:
        return f"!{path}: {error.strerror or error}; what was saved before is intact, and the run can go on"
    finally:
        if writer is not None:
            writer.abandon()
    entry = FileEntry(path.name, writer.bytes, writer.header_crc, writer.crcs)
    held = {of_table.table.name: len(of_table.rows) for of_table in rows}
    return json.dumps({"file": asdict(entry), "held": held, **nodes}, allow_nan=False)


def _write_rows(managed: ManagedModel, rows: list[OwnRows], writer: TensorFileWriter) -> None:
    for of_table in rows:
        for name, part in of_table.parts(managed.manager):
            writer.write(name, part)


def _raise_unwritten(written: list[str]) -> None:
    failed = [f"rank {rank}: {each[1:]}" for rank, each in enumerate(written) if each.startswith("!")]
    if failed:
        raise CheckpointError("the checkpoint could not be written: " + "; ".join(failed))


def _write_index(managed: ManagedModel, loader, folder: Path, data: str, written: list[str]) -> str:
    """Make the checkpoint what the folder holds; return what went wrong, an empty text if nothing did."""
    said = [json.loads(each) for each in written]
    missing = [each["file"]["name"] for each in said if not (folder / data / each["file"]["name"]).is_file()]
    if missing:
        return f"{folder} is not one folder that all ranks see: rank 0 does not find {', '.join(missing)} there"
    tables = {
        name: {**entry, "held": sum(each["held"][name] for each in said)} for name, entry in said[0]["tables"].items()
    }
    index = Index(
        data=data,
        steps=managed.optimizer_steps,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        software={"adaloader": _version_of("adaloader"), "torch": torch.__version__},
        configuration={
            "ranks": managed.ranks,
            "settings": {name: value for name, value in managed.settings.items() if name != "comm"},
            "loader": describe_loader(loader),
        },
        tables=tables,
        trees=said[0]["trees"],
        of_ranks=[each["own"] for each in said],
        files=[FileEntry(**each["file"]) for each in said],
    )
    try:
        sync_folder(folder / data)
        write_durably(folder / INDEX, encode_index(index))
    except OSError as error:
        return f"{folder / INDEX}: {error.strerror}; what was saved before is intact, and the run can go on"
    return ""


def _is_current(folder: Path, data: str) -> bool:
    """Whether the index already names this data."""
    try:
        return read_index(folder).data == data
    except CheckpointError:
        return False


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
