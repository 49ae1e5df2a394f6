"""Loading: what a checkpoint has into a loader, its model and optimizers, at any number of ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adaloader.checkpoint.agreement import raise_together
from adaloader.checkpoint.dense_state import DenseState, load_dense
from adaloader.checkpoint.layout import Index, find_checkpoint, open_file, read_index, verify_file
from adaloader.checkpoint.plain import load_plain
from adaloader.checkpoint.positions import describe_loader, go_on_from, read_again
from adaloader.checkpoint.report import Restored
from adaloader.checkpoint.saving import finish_saving, managed_by
from adaloader.checkpoint.table_loading import check_tables, load_tables
from adaloader.checkpoint.tensor_file import TensorFile
from adaloader.checkpoint.tree import decode
from adaloader.errors import CheckpointError
from adaloader.model.managed_model import ManagedModel
from adaloader.ranks.table_values import all_texts
from adaloader.reading.random_states import check_random_states, set_random_states
from adaloader.tables.candidate import agree_on_candidates, state_was_loaded

if TYPE_CHECKING:
    from adaloader.loader import AdaLoader
    from adaloader.wrapped_loader import WrappedLoader


def load(
    path: str | os.PathLike | Mapping[str, torch.Tensor],
    loader: AdaLoader | WrappedLoader,
    *,
    strict: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Restored:
    """Have a run go on from a checkpoint (collective): model, optimizers, random generators, and the loader's position.

    The checkpoint may be of another number of ranks, techniques or staleness. With as many ranks and staleness 0 the
    run goes on to the bit as the one that was saved; with others the rest of the pass has the samples that were left.
    Files are checked whole before anything is changed. A loop over the loader that is under way is over.

    Args:
        path: the folder of a checkpoint, or one of several (`step-...`), of which the newest complete one is taken. Or
            plain tensors for the model alone, by the names of its `state_dict()`: a `.safetensors` file, a file of
            `torch.save` (read with `weights_only=True`), or a dictionary; these are read slice by slice.
        loader: the loader to go on with, built as the one that was saved.
        strict: False to load what fits, and report the rest.
        extra: objects with `load_state_dict()` (schedulers, a GradScaler) by the names under which they were saved.

    Returns:
        restored: a dictionary of what was saved as `extra`, with a `report`.

    Raises:
        ValueError: if the loader manages no model.
        CheckpointError: on every rank and before anything is changed, naming the file and what is wrong with it, or
            what of it does not fit the model.
    """
    managed = managed_by(loader)
    finish_saving(managed)
    managed.manager.settle()
    if isinstance(path, Mapping) or Path(path).is_file():
        return load_plain(path, managed, strict=strict)
    index, folder, problem = None, Path(path), ""
    try:
        folder = find_checkpoint(folder)
        index = read_index(folder)
    except CheckpointError as error:
        problem = str(error)
    raise_together(managed.manager, problem)
    _check_same_everywhere(managed, folder, index)
    with _naming_slow_disks(managed, folder):
        raise_together(managed.manager, _verify_share(managed, folder, index))
    files = [open_file(folder, index, rank) for rank in range(index.ranks)]
    try:
        with _naming_slow_disks(managed, folder):
            return _load(managed, loader, folder, index, files, strict, extra or {})
    finally:
        for file in files:
            file.close()


@contextlib.contextmanager
def _naming_slow_disks(managed: ManagedModel, folder: Path) -> Iterator[None]:
    """Each rank reads inside: have the error of one that waited too long for another say what helps."""
    try:
        yield
    except TimeoutError as error:
        seconds = managed.manager.timeout_seconds
        raise TimeoutError(
            f"while {folder} was read (timeout_seconds={seconds:g}): {error} If reading takes so long because a disk "
            "is slow, build the loader with more timeout_seconds"
        ) from error


def _check_same_everywhere(managed: ManagedModel, folder: Path, index: Index) -> None:
    """Raise unless all ranks read the same checkpoint (collective): the newest of several may be another by now."""
    seen = all_texts(managed.manager, f"{folder.name}/{index.data}")
    if len(set(seen)) > 1:
        raise CheckpointError(
            f"ranks found different checkpoints in {folder.parent}: {', '.join(sorted(set(seen)))}; they must see one"
        )


def _verify_share(managed: ManagedModel, folder: Path, index: Index) -> str:
    """Verify this rank's share of the files, and return what is wrong with them."""
    share = range(managed.manager.rank, index.ranks, managed.ranks)
    problems = [problem for rank in share if (problem := verify_file(folder, index, rank))]
    return "; ".join(problems)


def _load(
    managed: ManagedModel,
    loader,
    folder: Path,
    index: Index,
    files: list[TensorFile],
    strict: bool,
    extra: Mapping[str, Any],
) -> Restored:
    manager, report, left_out = managed.manager, [], set()
    agree_on_candidates(managed)
    own_rank = manager.rank if index.ranks == managed.ranks else 0
    own, dense, problem = {}, None, ""
    try:
        own = {name: decode(node, files[own_rank].tensor, name) for name, node in index.of_ranks[own_rank].items()}
        _check_own(own)
        dense = DenseState(index, files[0])
        lines, left_out = check_tables(managed, index, files)
        report = [*lines, *dense.check(managed, index)]
        if strict and report:
            raise CheckpointError("it does not fit: " + "; ".join(report) + " (strict=False loads what does)")
        _check_extra(own["extra"], extra)
    except (CheckpointError, KeyError) as error:
        problem = f"{folder}: {error}"
    raise_together(manager, problem)
    loader._session.leave_iterations()
    load_tables(managed, index, files, left_out)
    load_dense(managed, dense, own.get("buffers"), index)
    state_was_loaded(managed)
    managed.optimizer_steps = index.steps
    managed.writes += 1
    report += _load_position(loader, index, own, strict)
    for name, each in extra.items():
        each.load_state_dict(own["extra"][name])
    return Restored(own["extra"], folder, index.steps, report)


def _check_own(own: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless what a rank has of its own can be taken up; nothing is changed."""
    try:
        position, draws = own["position"], own["draws"]
        if position is not None and not {"state", "ended", "order"} <= set(position):
            raise ValueError("the position of the loader is none")
        if not isinstance(own["extra"], dict) or not isinstance(draws["pass"], int) or draws["seed"] == "":
            raise ValueError("extra or the place of random ids is none")
        for states in (own["random"], *(each for each in own.get("read_ahead") or () if each is not None)):
            check_random_states(states)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"the state of a rank in the index is malformed: {error!r}"[:300]) from error


def _check_extra(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing = sorted(set(wanted) - set(saved))
    if missing:
        raise CheckpointError(f"nothing was saved as extra {missing}; there is {sorted(saved)}")
    unable = [name for name, each in wanted.items() if not hasattr(each, "load_state_dict")]
    if unable:
        raise CheckpointError(f"extra {unable} have no load_state_dict(): read them from what load returns")


def _load_position(loader, index: Index, own: Mapping[str, Any], strict: bool) -> list[str]:
    """Have loader and random generators go on from where they were; return what could not."""
    generator = getattr(loader, "generator", None)
    same_ranks = index.ranks == loader._session.ranks
    report = []
    try:
        is_rest = go_on_from(loader, own["position"], index.configuration.get("loader", {}), same_ranks)
    except ValueError as error:
        if strict:
            raise CheckpointError(f"the loader's position cannot be taken up: {error}") from error
        report.append(f"position: {error}")
        is_rest = False
    is_same = same_ranks and describe_loader(loader) == index.configuration.get("loader")
    read_again(loader, own.get("read_ahead") if is_rest and is_same else None)
    loader._session.draws.go_on_from(own["draws"])
    states = own["random"]
    set_random_states(states, generator)
    without_loader = {name: state for name, state in states.items() if name != "loader"}
    loader._session.when_resumed((lambda: set_random_states(without_loader, None)) if is_rest else None)
    return report
