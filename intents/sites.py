"""A place where a model looked up rows of a table."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .program import Program

_LIBRARIES = {"torch", "torchdata", "adaloader", "intents", "pm", "cuda_ops", "contextlib", "functools"}


@dataclass(eq=False)
class Site:
    """One lookup of the recorded step, in the order in which they happened.

    ``where`` is file and line of the user's code. ``batch_number`` is the batch that the ids come from; for
    ids that come from no batch it is that of the lookups around it, and None if no batch was live. ``reason``
    says why the ids cannot be derived, and is None where they can; then ``program`` is the program that gives
    them. ``constant`` tells ids that are the same for every batch. ``among`` is the path of a leaf of the batch that
    holds all ids of such a lookup, in whatever order: what may be intended where the ids themselves cannot be derived.
    """

    table: str
    operation: str
    where: str
    batch_number: int | None = None
    reason: str | None = None
    constant: bool = False
    among: str | None = None
    program: Program | None = field(default=None, repr=False)


def users_line() -> str:
    """``file:line`` of the innermost frame that belongs to neither PyTorch nor this project."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"
