"""Saving: one cut through loader, tables, optimizers and random generators, by all ranks together."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adaloader.checkpoint.agreement import raise_together
from adaloader.checkpoint.exchange import Exchange
from adaloader.checkpoint.layout import FileEntry, Index
from adaloader.checkpoint.positions import describe_loader, position_of, read_ahead_of
from adaloader.checkpoint.tables import cut, table_entry
from adaloader.checkpoint.tree import Encoder
from adaloader.checkpoint.writing import Part, SaveCounts, Saved, Saving
from adaloader.errors import CheckpointError
from adaloader.model.gathering import leaving_tables_out
from adaloader.model.managed_model import ManagedModel
from adaloader.ranks.table_values import text_of_rank_0
from adaloader.reading.random_states import random_states
from adaloader.tables.candidate import agree_on_candidates

if TYPE_CHECKING:
    from adaloader.loader import AdaLoader
    from adaloader.wrapped_loader import WrappedLoader

DEFAULT_SPARE_BYTES = 64 << 20


def save(
    path: str | os.PathLike,
    loader: AdaLoader | WrappedLoader,
    extra: Mapping[str, Any] | None = None,
    *,
    asynchronous: bool = False,
    spare_bytes: int = DEFAULT_SPARE_BYTES,
) -> Saved | Saving:
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
        asynchronous: whether to return at once, with a `Saving` whose `wait()` returns what is returned otherwise. What
            is written is what there is now. The next save, `load` and `loader.close()` wait for it, and raise what
            went wrong if nobody was told yet. While the first step of a table is not over, it is waited for here.
        spare_bytes: most memory of each rank for rows that are updated before they are written; when it is full, an
            update waits for the disk. On top come a copy of the dense parameters and their optimizer state, and about
            60 bytes a row.

    Raises:
        ValueError: if the loader manages no model.
        CheckpointError: on every rank, saying on which the disk is full, a folder cannot be written, or what cannot be
            saved; or that a rank has run out of batches. Then nothing was changed, what was saved before is intact, and
            the run can go on. So it is if this is how an earlier, asynchronous one ended; then this one is not begun.
    """
    if not isinstance(spare_bytes, int) or spare_bytes < 0:
        raise ValueError(f"spare_bytes must be a number of bytes, 0 or more; got {spare_bytes!r}")
    saving = save_at(path, loader, extra, None, spare_bytes=spare_bytes, asynchronous=asynchronous)
    return saving if asynchronous else saving.wait()


def save_at(
    path, loader, extra, before: tuple[int, Any] | None, *, asynchronous: bool, spare_bytes: int = DEFAULT_SPARE_BYTES
) -> Saving:
    """Begin a save (collective); `before`: batches handed out, and the loader's state, at the position to save, if not
    the last batch handed out. Without `asynchronous` nothing may change until it has been waited for."""
    started = time.perf_counter()
    managed = managed_by(loader)
    manager = managed.manager
    finish_saving(managed)
    if manager.ranks > 1:
        managed.roll_call.check()
        managed.exchange = managed.exchange or Exchange(manager)
    managed.saves = managed.saves or SaveCounts()
    manager.settle()
    agree_on_candidates(managed)
    folder = Path(path)
    encoder = Encoder()
    nodes, problem = _encode_state(managed, loader, extra, encoder, before)
    raise_together(manager, problem)
    data = text_of_rank_0(manager, f"data-{secrets.token_hex(8)}")
    raise_together(manager, _make_folder(folder / data) if manager.rank == 0 else "")
    with manager.still():
        rows = cut(managed, spare_bytes)
    if asynchronous:
        encoder.copy_tensors()
    managed.saves.begun += 1
    part = Part(folder, data, nodes, encoder, rows)
    managed.saving = Saving(managed, part, _index_maker(managed, loader, data), started)
    if not rows.is_kept:
        managed.saving.wait()
    return managed.saving


def finish_saving(managed: ManagedModel) -> None:
    """Wait for a save that is under way.

    Raises:
        CheckpointError: on every rank, if it could not be made and nobody was told yet.
    """
    saving, managed.saving = managed.saving, None
    if saving is not None and not saving.is_told:
        saving.wait()


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
            "read_ahead": read_ahead_of(loader, before),
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
    except OSError as error:
        return f"the checkpoint cannot be written: {error.filename or data}: {error.strerror}"
    return ""


def _index_maker(managed: ManagedModel, loader, data: str) -> Callable[[list[dict[str, Any]]], Index]:
    """Return a function that makes the index of the present state from what the ranks say of their parts."""
    known = {
        "data": data,
        "steps": managed.optimizer_steps,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "software": {"adaloader": _version_of("adaloader"), "torch": torch.__version__},
        "configuration": {
            "ranks": managed.ranks,
            "settings": {name: value for name, value in managed.settings.items() if name != "comm"},
            "loader": describe_loader(loader),
        },
    }

    def make(said: list[dict[str, Any]]) -> Index:
        tables = {
            name: {**entry, "held": sum(each["held"][name] for each in said)}
            for name, entry in said[0]["tables"].items()
        }
        return Index(
            **known,
            tables=tables,
            trees=said[0]["trees"],
            of_ranks=[each["own"] for each in said],
            files=[FileEntry(**each["file"]) for each in said],
        )

    return make


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
