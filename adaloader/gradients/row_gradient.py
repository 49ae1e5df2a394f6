"""The gradient of a managed table: some rows and their values, in the shape of the table, without its memory.

`table.grad` of a managed table is a `RowGradient`. User code may read it (`rows`, `values`, `to_dense()`), take its
norm, scale it, clip it, clear it, and compute another from it; whatever else is asked of it is an error that names the
operation. On several ranks it is one gradient of all of them: what reads it is collective.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from adaloader.gradients import row_operations
from adaloader.gradients.row_sum import RowSum, refusal
from adaloader.overrides.compiler import not_compiled
from adaloader.overrides.constant import constant_tensor
from adaloader.overrides.conversion import METHODS, check_stays
from adaloader.overrides.form import FORM
from adaloader.overrides.native import operation_name


class RowGradient(torch.Tensor):
    """A row gradient `[num_rows, dim]`. That of a table is a view of what the table holds, so changes in place reach
    the next step; one that an operation or a hook gave stands for itself, and may be assigned to `table.grad`.

    Attributes:
        rows: the distinct rows that it has, int64 `[U]`; on several ranks (collective) those that are on this one.
        values: their gradient `[U, dim]`; on several ranks (collective) whole, summed over all of them.
    """

    _sum: RowSum
    decides_before_rows = True

    @property
    def rows(self) -> torch.Tensor:
        return torch.from_numpy(self._sum.whole().rows.copy()).to(self._sum.table.parameter.device)

    @property
    def values(self) -> torch.Tensor:
        values = self._sum.whole().values
        self._sum.changed()  # or may be, by whoever gets them
        return values

    def __repr__(self, *, tensor_contents=None) -> str:
        gathered = sum(len(part.rows) for part in self._sum.parts)
        return f"RowGradient(table={self._sum.table.name!r}, shape={tuple(self.shape)}, gathered_rows={gathered})"

    @classmethod
    @not_compiled
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is None:
            raise _refusal(_first((*args, *kwargs.values())), operation_name(func))
        return handler(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        raise _refusal(self, "pickling")

    def __deepcopy__(self, memo) -> RowGradient:
        return _clone(self)


def row_gradient(rows: RowSum) -> RowGradient:
    """Return a gradient of a table as user code sees it."""
    table = rows.table
    if table.gradient_form is None:
        shape = table.table.spec.rows, table.table.spec.dim
        like = table.parameter
        table.gradient_form = constant_tensor(shape, math.nan, dtype=like.dtype, device=like.device)
    gradient = torch.Tensor._make_subclass(RowGradient, table.gradient_form)
    gradient._sum = rows
    return gradient


def _refusal(gradient: RowGradient, operation: str):
    return refusal(gradient._sum.table, operation)


def _first(arguments) -> RowGradient | None:
    for argument in arguments:
        if isinstance(argument, RowGradient):
            return argument
        if isinstance(argument, (list, tuple)):
            found = _first(argument)
            if found is not None:
                return found
    return None


def _norm(gradient, p=2, dim=None, keepdim=False, *, dtype=None, ord=None, **kwargs):
    """The norm of all values, absent rows being zero."""
    order = p if ord is None else ord
    order = 2.0 if order in (None, "fro") else float("inf") if order == "inf" else order
    if dim is not None or keepdim or any(v is not None for v in kwargs.values()) or isinstance(order, str) or order < 0:
        raise _refusal(gradient, f"a norm with p={order!r}, dim={dim!r}")
    return row_operations.norm(gradient._sum, float(order), dtype)


def _matrix_norm(gradient, ord=None, *args, **kwargs):
    """`torch.linalg.norm`, for which a number means a norm of a matrix."""
    if ord not in (None, "fro"):
        raise _refusal(gradient, f"linalg.norm with ord={ord!r}")
    return _norm(gradient, 2.0, *args, **kwargs)


def _number(gradient, value, what: str) -> float:
    is_number = isinstance(value, (int, float))
    if isinstance(value, torch.Tensor):
        is_number = not isinstance(value, RowGradient) and value.numel() == 1
    if not is_number:
        raise _refusal(gradient, f"{what} anything but one number")
    return float(value)


def _scale_by(gradient, factor) -> RowGradient:
    gradient._sum.scale(_number(gradient, factor, "multiplication by"))
    return gradient


def _divide_by(gradient, divisor) -> RowGradient:
    return _scale_by(gradient, row_operations.inverse(_number(gradient, divisor, "division by")))


def _clamp_(gradient, min=None, max=None) -> RowGradient:
    row_operations.clamp_(gradient._sum, min, max)
    return gradient


def _zero_(gradient) -> RowGradient:
    rows = gradient._sum
    if rows.belongs_to_table:
        rows.table.clear_gradient(keep_zero=True)
    else:
        rows.parts = []
        rows.changed()
    return gradient


def _other(gradient, other, what: str) -> RowSum:
    if not (isinstance(other, RowGradient) and other._sum.table is gradient._sum.table):
        raise _refusal(gradient, f"{what} anything but another gradient of the same table")
    return other._sum


def _add_(gradient, other, alpha=1) -> RowGradient:
    row_operations.add_(gradient._sum, _other(gradient, other, "addition of"), float(alpha))
    return gradient


def _copy_(gradient, source, non_blocking=False) -> RowGradient:
    row_operations.replace(gradient._sum, _other(gradient, source, "copying from"))
    return gradient


def _clone(gradient, *args, **kwargs) -> RowGradient:
    return _new(gradient, lambda values: values.clone())


def _new(gradient, function) -> RowGradient:
    return row_gradient(gradient._sum.mapped(function))


def _multiplied(one, other) -> RowGradient:
    gradient, factor = (one, other) if isinstance(one, RowGradient) else (other, one)
    if factor is gradient:  # squares, as in a gradient penalty
        return row_gradient(row_operations.power(gradient._sum, 2))
    return row_gradient(row_operations.scaled(gradient._sum, _number(gradient, factor, "multiplication by")))


def _divided(gradient, divisor, **kwargs) -> RowGradient:
    if not isinstance(gradient, RowGradient) or kwargs:
        raise _refusal(_first((gradient, divisor)), "division by a gradient, or with rounding,")
    factor = row_operations.inverse(_number(gradient, divisor, "division by"))
    return row_gradient(row_operations.scaled(gradient._sum, factor))


def _added(one, other, alpha=1) -> RowGradient:
    if not isinstance(one, RowGradient):
        if not (isinstance(one, torch.Tensor) and one.shape == other.shape):
            raise _refusal(other, "addition to anything but a tensor of its shape")
        return torch.add(one, row_operations.to_dense(other._sum), alpha=alpha)
    return row_gradient(row_operations.added(one._sum, _other(one, other, "addition of"), float(alpha)))


def _subtracted(one, other, alpha=1) -> RowGradient:
    return _added(one, other, -alpha)


def _clamped(gradient, min=None, max=None) -> RowGradient:
    return row_gradient(row_operations.clamped(gradient._sum, min, max))


def _power(gradient, exponent) -> RowGradient:
    if not isinstance(gradient, RowGradient):
        raise _refusal(exponent, "use as an exponent")
    return row_gradient(row_operations.power(gradient._sum, exponent))


def _reduced(operation):
    def handler(input, *args, dtype=None, **kwargs):
        gradient = input
        if args or any(v not in (None, False) for v in kwargs.values()):
            raise _refusal(gradient, f"{operation.__name__} along a dimension")
        return operation(gradient._sum) if dtype is None else operation(gradient._sum, dtype)

    return handler


def _extreme(choose):
    def handler(gradient, *args, **kwargs):
        if args or kwargs:
            raise _refusal(gradient, f"{choose.__name__} along a dimension, or of two,")
        return row_operations.extreme(gradient._sum, choose)

    return handler


def _same(gradient, *args, **kwargs) -> RowGradient:
    return gradient


def _to(gradient, *args, **kwargs) -> RowGradient:
    check_stays(gradient._sum.table.name, gradient.dtype, gradient.device, args, kwargs)
    return gradient


def _converted(wanted: dict[str, object]):
    return lambda gradient, *args, **kwargs: _to(gradient, **wanted)


def _set_data(gradient, value) -> None:
    if not (isinstance(value, RowGradient) and value._sum.table is gradient._sum.table):
        raise _refusal(gradient, "assigning .data")
    if value._sum is not gradient._sum:
        row_operations.replace(gradient._sum, value._sum)


def _element_wise(test):
    """A test of the values that are there (`[U, dim]`); the zeros of absent rows pass or fail it like any zero."""
    return lambda gradient: row_operations.tested(gradient._sum, test)


def _for_each(single, plain):
    """Handle a `_foreach_` function over a list in which row gradients and plain tensors are mixed."""

    def handler(gradients, *args, **kwargs):
        if any(isinstance(arg, (list, tuple)) for arg in (*args, *kwargs.values())):
            raise _refusal(_first(gradients), operation_name(plain) + " with a value for each gradient")
        dense = [g for g in gradients if not isinstance(g, RowGradient)]
        results = iter(plain(dense, *args, **kwargs) or dense) if dense else iter(())
        return [single(g, *args, **kwargs) if isinstance(g, RowGradient) else next(results) for g in gradients]

    return handler


def _unscale(gradients, found_inf, inverse_scale) -> None:
    """What `GradScaler` does: multiply by `inverse_scale`, and note in `found_inf` where a value is not finite."""
    dense = [g for g in gradients if not isinstance(g, RowGradient)]
    if dense:
        torch._amp_foreach_non_finite_check_and_unscale_(dense, found_inf, inverse_scale)
    row_operations.unscale([g._sum for g in gradients if isinstance(g, RowGradient)], found_inf, inverse_scale)


_FORM = FORM | {torch.Tensor.requires_grad_, torch.Tensor.grad.__get__}

_HANDLERS = {
    torch.norm: _norm,
    torch.Tensor.norm: _norm,
    torch.linalg.vector_norm: lambda x, ord=2, **kwargs: _norm(x, ord, **kwargs),
    torch.linalg.norm: _matrix_norm,
    torch.Tensor.mul_: _scale_by,
    torch.Tensor.multiply_: _scale_by,
    torch.Tensor.__imul__: _scale_by,
    torch.Tensor.div_: _divide_by,
    torch.Tensor.divide_: _divide_by,
    torch.Tensor.true_divide_: _divide_by,
    torch.Tensor.__itruediv__: _divide_by,
    torch.Tensor.clamp_: _clamp_,
    torch.Tensor.clip_: _clamp_,
    torch.clamp_: _clamp_,
    torch.clip_: _clamp_,
    torch.Tensor.clamp_min_: lambda gradient, min: _clamp_(gradient, min=min),
    torch.Tensor.clamp_max_: lambda gradient, max: _clamp_(gradient, max=max),
    torch.Tensor.zero_: _zero_,
    torch.Tensor.add_: _add_,
    torch.Tensor.__iadd__: _add_,
    torch.Tensor.sub_: lambda gradient, other, alpha=1: _add_(gradient, other, -alpha),
    torch.Tensor.__isub__: lambda gradient, other: _add_(gradient, other, -1),
    torch.Tensor.copy_: _copy_,
    torch.Tensor.neg_: lambda gradient: _scale_by(gradient, -1.0),
    torch.Tensor.abs_: lambda gradient: _copy_(gradient, _new(gradient, torch.abs)),
    torch.Tensor.detach: _same,
    torch.Tensor.detach_: _same,
    torch.Tensor.data.__get__: _same,
    torch.Tensor.data.__set__: _set_data,
    torch.Tensor.coalesce: _same,
    torch.Tensor.to: _to,
    torch.Tensor.__format__: lambda gradient, spec: format(repr(gradient), spec),
    torch._amp_foreach_non_finite_check_and_unscale_: _unscale,
    torch.Tensor.to_dense: lambda gradient, *args, **kwargs: row_operations.to_dense(gradient._sum),
    torch.Tensor.clone: _clone,
    torch.clone: _clone,
    torch.Tensor.isfinite: _element_wise(torch.isfinite),
    torch.isfinite: _element_wise(torch.isfinite),
    torch.Tensor.isnan: _element_wise(torch.isnan),
    torch.isnan: _element_wise(torch.isnan),
    torch.Tensor.isinf: _element_wise(torch.isinf),
    torch.isinf: _element_wise(torch.isinf),
    torch._foreach_norm: _for_each(_norm, torch._foreach_norm),
    torch._foreach_mul_: _for_each(_scale_by, torch._foreach_mul_),
    torch._foreach_div_: _for_each(_divide_by, torch._foreach_div_),
    torch._foreach_zero_: _for_each(_zero_, torch._foreach_zero_),
    torch._foreach_clamp_min_: _for_each(lambda g, low: _clamp_(g, min=low), torch._foreach_clamp_min_),
    torch._foreach_clamp_max_: _for_each(lambda g, high: _clamp_(g, max=high), torch._foreach_clamp_max_),
} | {method: _converted(wanted) for method, wanted in METHODS.items()}

_OUT_OF_PLACE = {
    "mul": _multiplied,
    "multiply": _multiplied,
    "div": _divided,
    "divide": _divided,
    "true_divide": _divided,
    "add": _added,
    "sub": _subtracted,
    "subtract": _subtracted,
    "clamp": _clamped,
    "clip": _clamped,
    "pow": _power,
    "sum": _reduced(row_operations.total),
    "mean": _reduced(row_operations.mean),
    "max": _extreme(torch.max),
    "amax": _extreme(torch.max),
    "min": _extreme(torch.min),
    "amin": _extreme(torch.min),
} | {
    name: partial(_new, function=getattr(torch, name))
    for name in ("neg", "negative", "abs", "absolute", "square", "sign")
}
_HANDLERS |= {getattr(holder, name): h for name, h in _OUT_OF_PLACE.items() for holder in (torch, torch.Tensor)}
_HANDLERS |= {
    torch.Tensor.__mul__: _multiplied,
    torch.Tensor.__rmul__: _multiplied,
    torch.Tensor.__truediv__: _divided,
    torch.Tensor.__neg__: _HANDLERS[torch.neg],
    torch.Tensor.__abs__: _HANDLERS[torch.abs],
    torch.Tensor.__add__: _added,
    torch.Tensor.__sub__: _subtracted,
    torch.Tensor.__pow__: _power,
}
