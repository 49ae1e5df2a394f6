"""Initialisation programs: comparing, replacing, limits, and the rows that nothing initialised."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from adaloader.deferred.context import (
    DeferredInitError,
    program_of,
)
from adaloader.deferred.init_program import InitProgram
from tests.adaloader.deferred_tables import D, N, declared, rows_of

# --- programs ---


def test_programs_compare_and_describe():
    weight = declared(lambda: nn.Embedding(N, D, padding_idx=0)).weight
    same = declared(lambda: nn.Embedding(N, D, padding_idx=0)).weight
    program = program_of(weight)
    assert program == program_of(same) and hash(program) == hash(program_of(same))
    assert program.describe() == f"{N} x {D} float32: normal(0.0, 1.0); fill(0.0) on rows 0:1"
    other_seed = program_of(declared(lambda: nn.Embedding(N, D, padding_idx=0), seed=6).weight)
    assert other_seed != program and other_seed.describe() == program.describe()
    with torch.no_grad():
        same[0] = 0.1
    assert program_of(same) != program and program_of(same).describe() != program.describe()


def test_setting_replaces_what_it_covers():
    weight = declared(lambda: torch.randn(N, D))
    weight.mul_(3.0)
    for row in (0, 1, 0, 0):
        weight[row] = 0.0
    assert [step.kind for step in program_of(weight).steps] == ["normal", "mul", "fill", "fill"]
    weight[:2].fill_(0.0)
    assert [step.kind for step in program_of(weight).steps] == ["normal", "mul", "fill"]
    weight.fill_(2.0)
    assert program_of(weight).describe().endswith(": fill(2.0)")
    assert program_of(weight).constant == 2.0
    assert program_of(weight.normal_()).constant is None


def test_a_program_has_a_limit():
    weight = declared(lambda: torch.zeros(N, D))
    with pytest.raises(DeferredInitError, match="declared at.*steps: initialise ranges of rows"):
        for row in range(N):
            weight[row].normal_()


def test_rows_never_initialised():
    weight = declared(lambda: torch.empty(N, D))
    weight[1:].normal_()
    assert program_of(weight).undefined_rows == ((0, 1),)
    assert not rows_of(weight, [1, N - 1]).isnan().any()
    with pytest.raises(DeferredInitError, match=r"'table': row 0 has no initial value.*test_init_program.py:\d+"):
        rows_of(weight, [2, 0])
    with pytest.raises(DeferredInitError, match=r"'table': row 7 has no initial value"):
        rows_of(declared(), [7])
    assert rows_of(weight, []).shape == (0, D)


def test_fill_checks_its_arguments():
    program = program_of(declared(lambda: torch.randn(N, D)))
    good_rows, good_out = np.arange(3), np.empty((3, D), np.float32)
    for rows, out in [
        (good_rows.astype(np.int32), good_out),
        (good_rows.reshape(1, 3), good_out),
        (good_rows, good_out.astype(np.float64)),
        (good_rows, good_out[:, :-1]),
        (good_rows, good_out[:-1]),
    ]:
        with pytest.raises(ValueError, match="'t'"):
            program.fill(rows, out, seed=0, name="t")


def test_unknown_arguments_of_steps():
    program = InitProgram((N, D), "float32", 0)
    with pytest.raises(TypeError, match="normal takes 2"):
        program.then("normal", 1.0)
    for kind, arguments in {
        "normal": (0.0, -1.0),
        "uniform": (1.0, 0.0),
        "trunc_normal": (0.0, 1.0, 2.0, 1.0),
    }.items():
        with pytest.raises(ValueError, match=kind):
            program.then(kind, *arguments)
    with pytest.raises(ValueError, match="finite"):
        program.then("normal", math.nan, 1.0)
