"""The initial values of a deferred table's rows, as what a manager calls and what a checkpoint can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaloader.deferred.init_program import InitProgram


@dataclass(frozen=True)
class ProgramFill:
    """Called with (rows int64 `[n]`, out `[n, dim]`): writes the initial values of rows."""

    program: InitProgram
    seed: int
    name: str

    def __call__(self, rows: np.ndarray, out: np.ndarray) -> None:
        self.program.fill(rows, out, seed=self.seed, name=self.name)

    def description(self) -> dict[str, Any]:
        """Return what `program_fill` needs to make it again: numbers and text."""
        steps = [[s.kind, list(s.arguments), s.start, s.stop, s.dtype] for s in self.program.steps]
        shape, dtype = list(self.program.shape), self.program.dtype
        return {"seed": self.seed, "name": self.name, "shape": shape, "dtype": dtype, "steps": steps}


def program_fill(description: Mapping[str, Any]) -> ProgramFill:
    """Return the `ProgramFill` that gave a description.

    Raises:
        ValueError: if it is none.
    """
    try:
        shape, steps = tuple(map(int, description["shape"])), description["steps"]
        program = InitProgram(shape, str(description["dtype"]), int(description["seed"]), "a checkpoint")
        for kind, arguments, start, stop, dtype in steps:
            if str(dtype) not in ("float32", "float64"):
                raise ValueError(f"unknown dtype {dtype!r}")
            # A step that was computed in another dtype stands before a conversion.
            if program.dtype != dtype:
                program = InitProgram(shape, dtype, program.seed, program.where, program.steps)
            program = program.then(kind, *arguments, rows=(int(start), int(stop)))
        program = InitProgram(shape, str(description["dtype"]), program.seed, program.where, program.steps)
        return ProgramFill(program, int(description["seed"]), str(description["name"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no initialisation of a table: {error!r}") from error
