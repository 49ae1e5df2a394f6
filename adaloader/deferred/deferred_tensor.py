"""The tensor that stands for a table which is never built: its form and an initialisation program.

What happens to it before a loader takes it over is one of: a question about its form, answered; an operation
that `deferred_operations.py` knows, most of them recorded as steps of the program; anything else, refused
with `DeferredInitError`, which names the operation, the user's line and the remedy.
"""

import copy
import math
import threading

import torch

from adaloader.deferred.init_program import InitProgram, Irreproducible
from adaloader.deferred.init_refusal import refusal
from adaloader.overrides.constant import constant_tensor
from adaloader.overrides.native import operation_name

_OURS = ("_declaration", "_rows")

# Questions about form, by name: the stand-in answers them itself. Properties named is_... are added where
# they are asked.
_FORM = set(
    """
    shape.__get__ dtype.__get__ device.__get__ layout.__get__ ndim.__get__ itemsize.__get__ nbytes.__get__
    name.__get__ names.__get__ output_nr.__get__ _version.__get__ requires_grad.__get__ requires_grad.__set__
    retains_grad.__get__ grad.__get__ grad.__set__ _grad.__get__ _grad.__set__ grad_fn.__get__
    grad_dtype.__get__ grad_dtype.__set__ _backward_hooks.__get__ _backward_hooks.__set__
    _post_accumulate_grad_hooks.__get__ _post_accumulate_grad_hooks.__set__
    size dim ndimension numel nelement element_size get_device storage_offset dim_order has_names
    is_floating_point is_complex is_signed is_inference is_same_size is_neg is_conj is_pinned is_shared
    result_type _has_compatible_shallow_copy_type new_tensor __len__ __hash__ __dir__ __format__
    detach_ requires_grad_ retain_grad register_hook register_post_accumulate_grad_hook
    """.split()
)

# All else that works, by name: functions of the tensor and the operation's other arguments, which may raise
# Irreproducible. deferred_operations.py fills it.
operations = {}


class Declaration:
    """The program of one table, shared by all its aliases (`detach()`, `.data`, rows, the Parameter).

    Invariant: once `taken_over`, the program does not change.
    """

    def __init__(self, program: InitProgram):
        self.program = program
        self.taken_over = False


class OpenContexts(threading.local):
    """The `deferred_init` contexts that this thread is in, outermost first."""

    def __init__(self):
        self.stack = []


open_contexts = OpenContexts()


class DeferredTensor(torch.Tensor):
    """A float32 or float64 tensor [num_rows, dim], or some of its rows, whose values are only declared.

    Its storage is one NaN, whatever its shape. `nn.Parameter(tensor)` gives a Parameter of this class with
    the same program. To adopt it set `__class__`: all that is ours lies in `__dict__`, under `_declaration`
    and `_rows`.
    """

    _declaration: Declaration
    _rows: tuple[int, int] | None  # (start, stop) of a view of rows; None for the table

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation_name(func)
        if name in _FORM or name.startswith("is_") and name.endswith(".__get__"):
            return on_the_stand_in(func, *args, **kwargs)
        if name in ("to", "type_as") and not isinstance(args[0], DeferredTensor):
            return on_the_stand_in(func, *args, **kwargs)  # another tensor takes its dtype and device
        tensor, others, options = _split_arguments(name, args, kwargs)
        operation = operations.get(name)
        if operation is None or not isinstance(tensor, DeferredTensor):
            raise _refuse(func, args, kwargs)
        try:
            return operation(tensor, *others, **options)
        except Irreproducible as irreproducible:
            raise _refuse(func, args, kwargs, str(irreproducible)) from None

    def __repr__(self, *, tensor_contents=None):
        rows = f", rows {self._rows[0]}:{self._rows[1]}" if self._rows else ""
        return f"{type(self).__name__}({self._declaration.program.describe()}{rows}; managed by no loader yet)"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            result = new_tensor(copy.deepcopy(self._declaration, memo), self.device, self._rows, self.shape)
            others = {name: value for name, value in self.__dict__.items() if name not in _OURS}
            result.__dict__.update(copy.deepcopy(others, memo))
            memo[id(self)] = result.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        raise _refuse(torch.Tensor.__reduce_ex__, (self,), {}, "it has no values that could be saved or sent")


def declare(program: InitProgram, device, requires_grad: bool = False) -> DeferredTensor:
    """Return a new deferred table with `program`; it takes no memory."""
    return new_tensor(Declaration(program), device).requires_grad_(requires_grad)


def program_of(tensor) -> InitProgram | None:
    """Return the program of a deferred table, whatever its class is by now; None for anything else."""
    attributes = getattr(tensor, "__dict__", {})
    if "_declaration" not in attributes or attributes["_rows"] is not None:
        return None
    return attributes["_declaration"].program


def take_over(tensor) -> InitProgram:
    """Return the program of a deferred table and close it: from now on initialising any alias raises.

    Raises:
        ValueError: the tensor is no deferred table.
    """
    program = program_of(tensor)
    if program is None:
        raise ValueError(f"{type(tensor).__name__} is no deferred table; only these can be taken over")
    tensor.__dict__["_declaration"].taken_over = True
    return program


def new_tensor(declaration: Declaration, device, rows=None, shape=None) -> DeferredTensor:
    """Return another tensor of a table, or with `rows` (start, stop) and `shape` a view of some of its
    rows."""
    program = declaration.program
    stand_in = constant_tensor(
        program.shape if shape is None else shape,
        math.nan,
        dtype=getattr(torch, program.dtype),
        device=device,
    )
    tensor = torch.Tensor._make_subclass(DeferredTensor, stand_in)
    tensor._declaration = declaration
    tensor._rows = rows
    return tensor


def on_the_stand_in(func, *args, **kwargs):
    """Call `func` on the one-element tensors that deferred ones are to PyTorch."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _split_arguments(name, args, kwargs):
    """Return (tensor, other arguments, keyword arguments) of a call, whose tensor may be named or second."""
    if not args:
        tensor_name = next((key for key in ("tensor", "input", "self") if key in kwargs), None)
        return (
            kwargs.get(tensor_name),
            (),
            {key: value for key, value in kwargs.items() if key != tensor_name},
        )
    if name in ("mul", "add") and len(args) == 2 and not isinstance(args[0], DeferredTensor):
        args = args[::-1]
    return args[0], args[1:], kwargs


def _refuse(func, args, kwargs, reason=""):
    candidates = [*args, *kwargs.values()]
    candidates += [element for each in candidates if isinstance(each, list | tuple) for element in each]
    table = next(each for each in candidates if isinstance(each, DeferredTensor))
    name = operation_name(func)
    in_place = name == "__setitem__" or name.endswith("_") and not name.endswith("__")
    initialises = in_place or bool(open_contexts.stack)
    return refusal(torch.overrides.resolve_name(func) or name, table._declaration.program, initialises, reason)
