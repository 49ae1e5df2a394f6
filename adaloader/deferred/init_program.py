"""How the rows of a deferred table start: a short program that makes any row on its own.

A program is what a model's constructor did to a table, reduced to the steps that decide its values: draw each
element, set it to a constant, or map it (scale, shift, ...), for all rows or for a range of them. Running it
for some rows gives what running it for all would.
"""

import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np

from cuda_ops import init as kernels

DRAWS = {"normal": 2, "uniform": 2, "trunc_normal": 4}  # name -> number of arguments
MAPS = {"mul": 1, "div": 1, "add": 1, "clamp": 2, "erfinv": 0, "cast": 0}
_ARGUMENTS = {**DRAWS, "fill": 1, **MAPS}
_MAX_STEPS = 1024
_MASK64 = (1 << 64) - 1


class DeferredInitError(RuntimeError):
    """A deferred table was initialised or used in a way that cannot be had row by row."""


class Irreproducible(ValueError):
    """An operation has no row by row equivalent: the message says why, and the caller which operation and
    table."""


@dataclass(frozen=True)
class Step:
    """One step: `kind` with `arguments`, for the rows from `start` to before `stop`, computed in `dtype`."""

    kind: str
    arguments: tuple[float, ...]
    start: int
    stop: int
    dtype: str

    @property
    def sets(self) -> bool:
        """Whether the step decides values without looking at what was there."""
        return self.kind not in MAPS


@dataclass(frozen=True)
class InitProgram:
    """The steps that give each row of one table its initial value. Immutable; equal programs give equal rows.

    Promised: a value is a function of (seed, table name, steps, row, element) alone, bit for bit on every
    IEEE machine. It does not depend on the other rows asked with it, on their order, on the number of rows of
    the table, or on ranks. float32 and float64 tables of one program have unrelated values, and none equals
    what PyTorch's generators draw; only the distributions are PyTorch's.
    """

    shape: tuple[int, int]
    dtype: str  # "float32" or "float64"; steps before a conversion have their own
    seed: int
    where: str = field(default="", compare=False)  # file:line of the declaration, for messages
    steps: tuple[Step, ...] = ()

    def then(self, kind: str, *arguments: float, rows: tuple[int, int] | None = None) -> "InitProgram":
        """Return this program with one more step, for `rows` (start, stop) or all.

        kinds: normal(mean, std), uniform(low, high), trunc_normal(mean, std, low, high), fill(c), mul(c),
        div(c), add(c), clamp(low, high), erfinv(), cast() (to the program's dtype). A step that sets its rows
        replaces the earlier steps that concern only these.

        Raises:
            Irreproducible: arguments outside the distribution's range, or too many steps.
        """
        if len(arguments) != _ARGUMENTS[kind]:
            raise TypeError(f"{kind} takes {_ARGUMENTS[kind]} arguments, got {arguments}")
        arguments = tuple(float(argument) for argument in arguments)
        _check_arguments(kind, arguments)
        start, stop = rows if rows is not None else (0, self.shape[0])
        step = Step(kind, arguments, start, stop, self.dtype)
        earlier = self.steps
        if step.sets:
            earlier = tuple(old for old in earlier if old.start < start or old.stop > stop)
        if len(earlier) >= _MAX_STEPS:
            raise Irreproducible(f"more than {_MAX_STEPS} steps: initialise ranges of rows, as weight[a:b].normal_()")
        return replace(self, steps=(*earlier, step))

    def cast(self, dtype: str) -> "InitProgram":
        """Return the program of this table converted to `dtype`: the same values, rounded."""
        return self if dtype == self.dtype else replace(self, dtype=dtype).then("cast")

    @property
    def undefined_rows(self) -> tuple[tuple[int, int], ...]:
        """Ranges (start, stop) of the rows to which no step gives a value: made by `torch.empty` and left
        so."""
        ranges = [(0, self.shape[0])]
        for step in self.steps:
            if step.sets:
                ranges = [
                    part
                    for start, stop in ranges
                    for part in ((start, min(stop, step.start)), (max(start, step.stop), stop))
                    if part[0] < part[1]
                ]
        return tuple(ranges)

    @property
    def constant(self) -> float | None:
        """The one value that the whole table has, or None where it has several or is not a plain fill."""
        steps = [step for step in self.steps if step.kind != "cast"]
        if len(steps) == 1 and steps[0].kind == "fill" and not self.undefined_rows:
            return steps[0].arguments[0]
        return None

    def describe(self) -> str:
        """Return the program in one line: equal for equal programs whatever their seeds, so that ranks can
        compare it."""
        table = f"{self.shape[0]} x {self.shape[1]} {self.dtype}"
        return f"{table}: {'; '.join(map(self._describe_step, self.steps)) or 'nothing'}"

    def _describe_step(self, step: Step) -> str:
        text = f"{step.kind}({', '.join(map(repr, step.arguments))})"
        if (step.start, step.stop) != (0, self.shape[0]):
            text += f" on rows {step.start}:{step.stop}"
        return text if step.dtype == self.dtype else f"{text} in {step.dtype}"

    def fill(self, rows_N: np.ndarray, out_ND: np.ndarray, *, seed: int, name: str) -> None:
        """Write the initial values of `rows_N` (int64 [N], any order, repetitions allowed) to `out_ND` [N,
        dim].

        `seed` (int, taken mod 2**64) and the table's `name` choose the random stream. `out_ND` has the
        program's dtype.

        Raises:
            ValueError: shapes or dtypes differ from those above. IndexError: a row outside the table.
            DeferredInitError: a row that was never initialised.
        """
        self._check_fill(rows_N, out_ND, name)
        values_ND = out_ND
        if self.steps and self.steps[0].dtype != self.dtype:
            values_ND = np.zeros(out_ND.shape, self.steps[0].dtype)
        for index, step in enumerate(self.steps):
            if values_ND.dtype != step.dtype:
                values_ND = values_ND.astype(step.dtype)  # a "cast" has no more to do
            key = stream_key(seed, name, index)
            if (step.start, step.stop) == (0, self.shape[0]):
                _apply(step, rows_N, values_ND, key)
                continue
            chosen_C = np.flatnonzero((rows_N >= step.start) & (rows_N < step.stop))
            if len(chosen_C):
                part_CD = values_ND[chosen_C]
                _apply(step, rows_N[chosen_C], part_CD, key)
                values_ND[chosen_C] = part_CD
        if values_ND is not out_ND:
            out_ND[...] = values_ND

    def _check_fill(self, rows_N, out_ND, name) -> None:
        num_rows, dim = self.shape
        if rows_N.dtype != np.int64 or rows_N.ndim != 1:
            raise ValueError(f"table {name!r}: rows must be int64 [N], got {rows_N.dtype} {list(rows_N.shape)}")
        if out_ND.dtype != self.dtype or out_ND.shape != (len(rows_N), dim):
            raise ValueError(
                f"table {name!r}: out must be {self.dtype} {[len(rows_N), dim]}, "
                f"got {out_ND.dtype} {list(out_ND.shape)}"
            )
        if not len(rows_N):
            return
        first, last = rows_N.min(), rows_N.max()
        if first < 0 or last >= num_rows:
            raise IndexError(f"table {name!r}: row {first if first < 0 else last} is not in [0, {num_rows})")
        for start, stop in self.undefined_rows:
            missing = rows_N[(rows_N >= start) & (rows_N < stop)]
            if len(missing):
                raise DeferredInitError(
                    f"table {name!r}: row {missing[0]} has no initial value: nothing set it after the table "
                    f"was declared at {self.where}; call an nn.init function on it before a loader is made"
                )


def stable_hash(name: str) -> int:
    """Return a 64-bit hash of `name` that is the same in every process, on every machine (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def stream_key(seed: int, name: str, index: int) -> tuple[int, int]:
    """Return the key of the random stream of step `index` of table `name`, as two 32-bit words."""
    key = _mix(_mix(_mix(seed & _MASK64) ^ stable_hash(name)) ^ index)
    return key & 0xFFFFFFFF, key >> 32


def _mix(bits: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood 2014): a bijection on 64-bit integers."""
    bits = (bits + 0x9E3779B97F4A7C15) & _MASK64
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK64
    return bits ^ (bits >> 31)


def _check_arguments(kind: str, arguments: tuple[float, ...]) -> None:
    """Refuse what PyTorch's in-place functions refuse too, and bounds that no draw can have."""
    shown = f"{kind}({', '.join(map(repr, arguments))})"
    if kind in DRAWS and not all(map(math.isfinite, arguments[:2])):
        raise Irreproducible(f"{shown}: the first two arguments must be finite")
    if kind == "normal" and arguments[1] < 0.0:
        raise Irreproducible(f"{shown}: the standard deviation must not be negative")
    if kind == "uniform" and arguments[0] > arguments[1]:
        raise Irreproducible(f"{shown}: the lower bound is above the upper")
    if kind == "trunc_normal" and not (arguments[1] > 0.0 and arguments[2] <= arguments[3]):
        raise Irreproducible(f"{shown}: needs a positive standard deviation and bounds in order")


def _apply(step: Step, rows_N: np.ndarray, values_ND: np.ndarray, key: tuple[int, int]) -> None:
    """Run one step in place on its rows. Maps round as PyTorch's do, with scalars in the rows' dtype."""
    if step.kind in DRAWS:
        getattr(kernels, f"fill_{step.kind}")(values_ND, rows_N, *key, *step.arguments)
        return
    with np.errstate(all="ignore"):  # PyTorch, too, gives infinities and NaNs without a word
        scalars = [values_ND.dtype.type(argument) for argument in step.arguments]
        if step.kind == "fill":
            values_ND[...] = scalars[0]
        elif step.kind == "mul":
            values_ND *= scalars[0]
        elif step.kind == "div":
            values_ND /= scalars[0]
        elif step.kind == "add":
            values_ND += scalars[0]
        elif step.kind == "clamp":
            np.clip(values_ND, *scalars, out=values_ND)
        elif step.kind == "erfinv":
            kernels.erfinv(values_ND)
