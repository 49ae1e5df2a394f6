"""Plain tensors by the names of a model's state_dict into a managed model: pretrained tables, say.

Files are mapped, not read: rank 0 passes on a slice of a table at a time, and nobody holds one whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaloader.checkpoint.agreement import raise_together
from adaloader.checkpoint.dense_state import dense_entries, table_aliases
from adaloader.checkpoint.dtypes import BY_NAME
from adaloader.checkpoint.report import Restored
from adaloader.checkpoint.tensor_file import TensorFile
from adaloader.errors import CheckpointError
from adaloader.model.managed_model import ManagedModel
from adaloader.model.state import load_full_state_dict
from adaloader.ranks.table_values import text_of_rank_0


def load_plain(path: str | os.PathLike | Mapping[str, Any], managed: ManagedModel, *, strict: bool) -> Restored:
    """Load rank 0's plain tensors into the model on all ranks (collective); see `checkpoint.load`."""
    problem, tensors, report = "", {}, []
    if managed.manager.rank == 0:
        try:
            tensors = dict(path) if isinstance(path, Mapping) else open_plain(Path(path))
            report = _problems(managed, tensors)
        except CheckpointError as error:
            problem = str(error)
        if strict and report:
            problem = f"{_name_of(path)} does not fit the model: " + "; ".join(report)
        unfit = {name for name, line in ((each.split("'")[1], each) for each in report) if name in tensors}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in unfit}
    raise_together(managed.manager, problem)
    report = text_of_rank_0(managed.manager, "\n".join(report)).splitlines()
    load_full_state_dict(managed.model(), tensors if managed.manager.rank == 0 else None, strict=strict)
    where = None if isinstance(path, Mapping) else Path(path)
    return Restored({}, where, managed.optimizer_steps, report)


def open_plain(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a file, which are mapped where that can be.

    Raises:
        CheckpointError: naming the file, if it is neither of safetensors nor a state_dict that `torch.save` wrote.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"PK":
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever is wrong with it, it is the file's fault
            raise CheckpointError(f"{path} is no state_dict that torch.save wrote: {str(error)[:300]}") from error
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{path} holds a {type(found).__name__}, where a state_dict is a dictionary")
        return dict(found)
    with TensorFile(path) as file:
        return {name: _mapped(file, name) for name in file.tensors}


def _mapped(file: TensorFile, name: str) -> torch.Tensor:
    entry = file.entry(name)
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=BY_NAME[entry.dtype], device="cpu")
    # Copied on writing, which nobody does: PyTorch warns of memory that cannot be written.
    mapped = np.memmap(file.path, np.uint8, "c", entry.start, (entry.stop - entry.start,))
    return torch.from_numpy(mapped).view(BY_NAME[entry.dtype]).view(entry.shape)


def _problems(managed: ManagedModel, tensors: Mapping[str, Any]) -> list[str]:
    model, tables = managed.model(), table_aliases(managed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if name in tables}
    shapes |= {n: tuple(v.shape) if torch.is_tensor(v) else None for n, v in dense_entries(managed).items()}
    problems = [f"it lacks {name!r}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(getattr(tensor, "shape", ()))
        if name not in shapes:
            problems.append(f"{name!r} is not in the model")
        elif shapes[name] is not None and shape != shapes[name]:
            problems.append(f"{name!r} has shape {list(shape)} in it and {list(shapes[name])} in the model")
    return problems


def _name_of(path: Any) -> str:
    return "the state_dict" if isinstance(path, Mapping) else str(path)
