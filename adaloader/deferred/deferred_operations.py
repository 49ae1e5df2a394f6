"""What a deferred tensor can do: be initialised, aliased, copied, converted, and lend its shape.

Importing this file fills `deferred_tensor.operations`. Operations never allocate the table's size, and raise
`Irreproducible` where they would have to.
"""

import math
import operator
from dataclasses import replace

import torch

from adaloader.deferred.deferred_tensor import (
    DeferredTensor,
    declare,
    new_tensor,
    on_the_stand_in,
    open_contexts,
    operations,
)
from adaloader.deferred.factories import METHODS, read_factory
from adaloader.deferred.init_program import Irreproducible
from adaloader.deferred.init_steps import IN_PLACE, NN_INIT, OUT_OF_PLACE, scalar
from adaloader.overrides.constant import constant_tensor

_DTYPE_NAMES = {torch.float32: "float32", torch.float64: "float64"}


def _operation(*names):
    def register(function):
        operations.update(dict.fromkeys(names, function))
        return function

    return register


# --- initialisation ---


def _check_open(tensor):
    """Refuse to change a program that nobody reads any more, or when PyTorch would not change the tensor."""
    if tensor._declaration.taken_over:
        raise Irreproducible("a loader manages the table by now, and this alias is from before")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise Irreproducible("a leaf that requires a gradient changes in place under torch.no_grad() only")


def _record(tensor, steps):
    """Append steps (kind, arguments...) to the program of the table, for the rows that `tensor` covers."""
    _check_open(tensor)
    declaration = tensor._declaration
    if tensor.shape[0]:
        for kind, *arguments in steps:
            declaration.program = declaration.program.then(kind, *arguments, rows=tensor._rows)
    return tensor


def _derive(tensor, steps=(), dtype=None, device=None):
    """Return a new deferred table with the program of `tensor`, converted to `dtype`, and more steps."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise Irreproducible("autograd would follow it, so it is no initialisation")
    if tensor._rows is not None:
        raise Irreproducible("only a whole table can be copied or converted")
    program = tensor._declaration.program
    if dtype is not None:
        program = program.cast(_DTYPE_NAMES[dtype])
    for kind, *arguments in steps:
        program = program.then(kind, *arguments)
    return declare(program, tensor.device if device is None else device)


def _in_place(steps):
    return lambda tensor, *args, **kwargs: _record(tensor, steps(*args, **kwargs))


def _out_of_place(steps):
    return lambda tensor, *args, **kwargs: _derive(tensor, steps(*args, **kwargs))


def _nn_init(steps):
    def record(tensor, *args, **kwargs):
        with torch.no_grad():
            return _record(tensor, steps(tensor.shape, *args, **kwargs))

    return record


operations.update({name: _in_place(steps) for name, steps in IN_PLACE.items()})
operations.update({name: _out_of_place(steps) for name, steps in OUT_OF_PLACE.items()})
operations.update({name: _nn_init(steps) for name, steps in NN_INIT.items()})


@_operation("copy_")
def _copy(tensor, source, non_blocking=False):
    if not isinstance(source, DeferredTensor):
        return _record(tensor, [("fill", scalar(source))])
    _check_open(tensor)
    if source.shape != tensor.shape or tensor._rows is not None or source._rows is not None:
        raise Irreproducible("only a whole table can be copied onto another of its shape")
    declaration = tensor._declaration
    declaration.program = replace(declaration.program, steps=source._declaration.program.steps)
    return tensor


def show_trunc_normal() -> None:
    """Make `nn.init.trunc_normal_` ask deferred tensors, as its kin do; for all others it stays what it is.

    PyTorch asks no subclass about it, and its body draws until all values fit, which no stand-in can follow.
    Every public way to it calls this one function through the module.
    """
    plain = torch.nn.init._no_grad_trunc_normal_
    if getattr(plain, "asks_deferred", False):
        return

    def trunc_normal(tensor, mean, std, a, b, generator=None):
        if not isinstance(tensor, DeferredTensor):
            return plain(tensor, mean, std, a, b, generator=generator)
        public = torch.nn.init.trunc_normal_
        return torch.overrides.handle_torch_function(public, (tensor,), tensor, mean, std, a, b)

    trunc_normal.asks_deferred = True
    torch.nn.init._no_grad_trunc_normal_ = trunc_normal


# --- aliases and rows ---


@_operation("detach", "data.__get__")
def _alias(tensor):
    return new_tensor(tensor._declaration, tensor.device, tensor._rows, tensor.shape)


@_operation("data.__set__")
def _set_data(tensor, value):
    if tensor._declaration.taken_over:
        raise Irreproducible("a loader manages the table by now, and this alias is from before")
    if not isinstance(value, DeferredTensor) or value.shape != tensor.shape or value._rows is not None:
        raise Irreproducible("only another deferred table can take its place; assign a new nn.Parameter instead")
    on_the_stand_in(torch.Tensor.data.__set__, tensor, value)
    tensor._declaration = value._declaration


@_operation("__getitem__")
def _get_rows(tensor, index):
    # A view made with gradients on can be initialised by nn.init, which turns them off, and by nothing else.
    view = _rows_at(tensor, index)
    return view.requires_grad_(tensor.requires_grad and torch.is_grad_enabled())


@_operation("__setitem__")
def _set_rows(tensor, index, value):
    _record(_get_rows(tensor, index), [("fill", scalar(value))])


@_operation("select")
def _select(tensor, dim, index):
    _check_first_dimension(tensor, dim)
    return _get_rows(tensor, index)


@_operation("narrow")
def _narrow(tensor, dim, start, length):
    _check_first_dimension(tensor, dim)
    return _get_rows(tensor, slice(start, start + length))


def _check_first_dimension(tensor, dim):
    if tensor.ndim != 2 or dim not in (0, -2):
        raise Irreproducible("it takes part of a row")


def _is_everything(index) -> bool:
    return index is Ellipsis or isinstance(index, slice) and index.start is index.stop is index.step is None


def _rows_at(tensor, index):
    """Return the view of rows at an index: an integer, a slice of step 1, or everything."""
    rows, *columns = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_everything, columns)) or tensor.ndim != 2 and not _is_everything(rows):
        raise Irreproducible("it takes part of a row")
    if _is_everything(rows):
        return _alias(tensor)
    num_rows, first = tensor.shape[0], (tensor._rows or (0, 0))[0]
    if isinstance(rows, slice):
        start, stop = _slice_bounds(rows, num_rows)
        if (start, stop) == (0, num_rows):
            return _alias(tensor)
        view, shape = (first + start, first + stop), (stop - start, tensor.shape[1])
    else:
        if isinstance(rows, bool | torch.Tensor) or not hasattr(rows, "__index__"):
            raise Irreproducible(f"rows at a {type(rows).__name__}, not at an integer or a slice")
        row = operator.index(rows)
        if not -num_rows <= row < num_rows:
            raise IndexError(f"row {row} is out of range for a deferred table of {num_rows} rows")
        row = first + row % num_rows
        view, shape = (row, row + 1), tensor.shape[1:]
    return new_tensor(tensor._declaration, tensor.device, view, shape)


def _slice_bounds(rows: slice, num_rows: int) -> tuple[int, int]:
    if any(isinstance(bound, torch.Tensor) for bound in (rows.start, rows.stop, rows.step)):
        raise Irreproducible("a slice with bounds that are tensors")
    start, stop, step = rows.indices(num_rows)
    if step != 1:
        raise Irreproducible(f"a slice with step {step}")
    return start, max(start, stop)


# --- copies and conversions ---


def _convert(tensor, device=None, dtype=None, always=False):
    device = tensor.device if device is None else torch.device(device)
    dtype = tensor.dtype if dtype is None else dtype
    if (device, dtype) == (tensor.device, tensor.dtype) and not always:
        return tensor
    if dtype not in _DTYPE_NAMES:
        raise Irreproducible(f"rows are float32 or float64, not {dtype}")
    return _derive(tensor, dtype=dtype, device=device)


@_operation("to")
def _to(tensor, *args, copy=False, **kwargs):
    if args and isinstance(args[0], torch.Tensor):
        return _convert(tensor, args[0].device, args[0].dtype, copy)
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    return _convert(tensor, device, dtype, copy)


@_operation("type")
def _type(tensor, dtype=None, non_blocking=False):
    if dtype is None:
        return on_the_stand_in(torch.Tensor.type, tensor)
    if isinstance(dtype, str | type):
        dtype = torch.empty(0).type(dtype).dtype
    return _convert(tensor, None, dtype)


@_operation("type_as")
def _type_as(tensor, other):
    return _convert(tensor, other.device, other.dtype)


@_operation("cpu")
def _cpu(tensor, memory_format=None):
    return _convert(tensor, "cpu")


@_operation("cuda")
def _cuda(tensor, device=None, non_blocking=False, memory_format=None):
    return _convert(tensor, torch.device("cuda", torch.cuda.current_device()) if device is None else device)


def _conversion(dtype):
    return lambda tensor, memory_format=None: _convert(tensor, None, dtype)


operations.update(
    float=_conversion(torch.float32),
    double=_conversion(torch.float64),
    half=_conversion(torch.float16),
    bfloat16=_conversion(torch.bfloat16),
)


@_operation("clone")
def _clone(tensor, memory_format=None):
    return _derive(tensor)


@_operation("contiguous")
def _contiguous(tensor, memory_format=None):
    return tensor


@_operation("is_contiguous")
def _is_contiguous(tensor, memory_format=None):
    return True


@_operation("stride")
def _stride(tensor, dim=None):
    strides = (tensor.shape[1], 1) if tensor.ndim == 2 else (1,)
    return strides if dim is None else strides[dim]


# --- new tensors of its shape ---


def _like(name):
    """Give `zeros_like` and its kin: a constant of one element of memory, which optimizers may hold as state.

    Inside a context it is a deferred table instead: what a constructor makes there may become a parameter.
    """

    def make(tensor, fill_value=None, *, dtype=None, device=None, requires_grad=False, **irrelevant):
        dtype, device = dtype or tensor.dtype, tensor.device if device is None else device
        value = {"zeros_like": 0.0, "ones_like": 1.0, "full_like": fill_value, "empty_like": math.nan}[name]
        if not _becomes_deferred(tensor, dtype):
            return constant_tensor(tensor.shape, value, dtype=dtype, device=device, requires_grad=requires_grad)
        steps = [("fill", scalar(value))] if name != "empty_like" else []
        return _declare_beside(tensor, tensor.shape, dtype, device, requires_grad, steps)

    return make


def _random_like(*step):
    def make(tensor, *, dtype=None, device=None, requires_grad=False, **irrelevant):
        dtype, device = dtype or tensor.dtype, tensor.device if device is None else device
        if not _becomes_deferred(tensor, dtype):
            raise Irreproducible("outside deferred_init it would take the memory of the table")
        return _declare_beside(tensor, tensor.shape, dtype, device, requires_grad, [step])

    return make


def _new(name):
    """Give `new_empty` and its kin: deferred where the result would be as large as the table, else plain."""

    def make(tensor, *args, **kwargs):
        factory = read_factory(name, (tensor, *args), kwargs)
        if factory is None or math.prod(factory.shape) < tensor.numel():
            return on_the_stand_in(getattr(torch.Tensor, name), tensor, *args, **kwargs)
        return _declare_beside(
            tensor, factory.shape, factory.dtype, factory.device, factory.requires_grad, factory.steps
        )

    return make


def _becomes_deferred(tensor, dtype) -> bool:
    return bool(open_contexts.stack) and dtype in _DTYPE_NAMES and tensor.ndim == 2


def _declare_beside(tensor, shape, dtype, device, requires_grad, steps):
    """Declare another table with the seed of this one's."""
    program = replace(tensor._declaration.program, shape=tuple(shape), dtype=_DTYPE_NAMES[dtype], steps=())
    for kind, *arguments in steps:
        program = program.then(kind, *arguments)
    return declare(program, device, requires_grad)


operations.update({name: _like(name) for name in ("zeros_like", "ones_like", "full_like", "empty_like")})
operations.update({name: _new(name) for name in METHODS})
operations.update(rand_like=_random_like("uniform", 0.0, 1.0), randn_like=_random_like("normal", 0.0, 1.0))
