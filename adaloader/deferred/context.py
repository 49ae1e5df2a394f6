"""Declaring tables that no machine could hold: `with deferred_init():` around a model's construction.

Read `init_program.py` for what is kept of a table, and `deferred_tensor.py` for what stands for it until a
loader takes it over.
"""

import operator
import sys

import torch
from torch.overrides import TorchFunctionMode

from adaloader.deferred.deferred_operations import show_trunc_normal
from adaloader.deferred.deferred_tensor import DeferredTensor, declare, open_contexts, program_of, take_over
from adaloader.deferred.factories import read_factory
from adaloader.deferred.init_program import DeferredInitError, InitProgram, stable_hash
from adaloader.deferred.init_refusal import user_line
from adaloader.overrides.native import operation_name

__all__ = [
    "DeferredInitError",
    "DeferredTensor",
    "InitProgram",
    "deferred_init",
    "program_of",
    "stable_hash",
    "take_over",
]


_MODULES_OF_MODES = (__name__, "torch.overrides", "torch.utils._device")


def deferred_init(min_rows: int = 1000, seed: int | None = None) -> TorchFunctionMode:
    """Declare, rather than build, the tables of the model that is constructed inside: a context manager.

    Inside it, `torch.empty`, `zeros`, `ones`, `full`, `rand`, `randn`, `normal`, `empty_strided` and
    `Tensor.new_...` that would make a float32 or float64 tensor of two dimensions with at least `min_rows`
    rows give a `DeferredTensor` of that shape, dtype and device, which takes no memory. So `nn.Embedding`,
    `nn.EmbeddingBag` and bare parameters are declared as they are written; weights that torch.nn's other
    layers make for themselves (`nn.Linear`, ...) are left alone, as these need them whole. Initialisation
    that is random per element or constant, for the table or for ranges of its rows, is recorded, and makes
    each row when a loader first touches it, from (seed, table name, row) alone. `AdaLoader(model=...)` takes
    the tables over.

    Tensors made outside are plain, and those declared inside work on after the end. Contexts nest; the
    innermost decides.

    A declared table draws nothing from PyTorch's random generators, not even from a `generator=` that it is
    given. So its own values are not those of a plain construction from the same `torch.manual_seed`, nor are
    those of layers made after it. `torch.Tensor(n, d)` and `torch.FloatTensor(n, d)`, which PyTorch shows to
    no mode, make plain tensors: write `torch.empty(n, d)`.

    Args:
        min_rows: tensors with fewer rows are plain.
        seed: of the tables' initial values; `torch.initial_seed()` at entry where it is None.

    Raises:
        ValueError: `min_rows` is below 1, or `seed` does not fit in 64 bits.
        DeferredInitError: (inside, or later on a declared tensor) an initialisation that cannot be had row by
            row, with its line, or a use of the values before a loader manages the table.
    """
    return _DeferredInit(min_rows, seed)


class _DeferredInit(TorchFunctionMode):
    """The mode under `deferred_init`. Invariant: it is in its thread's `open_contexts` from entry to exit."""

    def __init__(self, min_rows: int, seed: int | None):
        super().__init__()
        self.min_rows = operator.index(min_rows)
        self.given_seed = seed if seed is None else operator.index(seed)
        if self.min_rows < 1:
            raise ValueError(f"min_rows must be at least 1, got {min_rows}")
        if self.given_seed is not None and not -(1 << 63) <= self.given_seed < 1 << 64:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")

    def __enter__(self):
        self.seed = torch.initial_seed() if self.given_seed is None else self.given_seed
        show_trunc_normal()
        result = super().__enter__()
        open_contexts.stack.append(self)
        return result

    def __exit__(self, *exception):
        open_contexts.stack.pop()
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # An outer context does not take what an inner one left plain.
        if open_contexts.stack[-1] is self:
            factory = read_factory(operation_name(func), args, kwargs)
            if factory is not None and factory.shape[0] >= self.min_rows and not _made_by_dense_layer():
                return self._declare(factory)
        return func(*args, **kwargs)

    def _declare(self, factory):
        dtype = str(factory.dtype).removeprefix("torch.")
        program = InitProgram(factory.shape, dtype, self.seed, user_line())
        for step in factory.steps:
            program = program.then(*step)
        return declare(program, factory.device, factory.requires_grad)


def _made_by_dense_layer() -> bool:
    """Whether the tensor is being made by a layer of torch.nn that is not an embedding."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _MODULES_OF_MODES:
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "")
    return module.startswith("torch.nn.modules.") and module != "torch.nn.modules.sparse"
