"""Deferred tables for the tests of several files: how to declare one, and what its rows become."""

import numpy as np
import torch

from adaloader.deferred.context import deferred_init, program_of

N, D = 5000, 12


def rows_of(tensor, rows=None, *, seed=11, name="table"):
    """Values of rows of a deferred table (all of them, unless given), as a tensor."""
    program = program_of(tensor)
    rows_N = np.arange(program.shape[0]) if rows is None else np.asarray(rows, np.int64)
    out_ND = np.full((len(rows_N), program.shape[1]), np.nan, program.dtype)
    program.fill(rows_N, out_ND, seed=seed, name=name)
    return torch.from_numpy(out_ND)


def declared(make=lambda: torch.empty(N, D), **arguments):
    with deferred_init(**{"seed": 5, **arguments}):
        return make()
