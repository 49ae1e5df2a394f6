"""The gradient of a managed table: some rows and their values, in the shape of the table, without its memory.

`table.grad` of a managed table is a `RowGradient`. User code may read it (`rows`, `values`), take its norm, scale it,
clip it and clear it; whatever else is asked of it is an error that names the operation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from adaloader.compiler import not_compiled
from adaloader.conversion import METHODS, check_stays
from adaloader.deferred_tensor import constant_tensor, operation_name
from adaloader.errors import ManagedTableError
from adaloader.slabs import Part, coalesce, no_rows

if TYPE_CHECKING:
    from adaloader.managed_table import ManagedTable


class RowGradient(torch.Tensor):
    """A row gradient `[num_rows, dim]`; it is a view of what the table holds, so changes in place reach the next step.

    Attributes:
        rows: the distinct rows that it has, int64 `[U]`.
        values: their gradient `[U, dim]`; on several ranks this rank's part of the sum over ranks.
    """

    _table: ManagedTable

    @property
    def rows(self) -> torch.Tensor:
        return torch.from_numpy(self._whole().rows.copy())

    @property
    def values(self) -> torch.Tensor:
        return self._whole().values

    def _whole(self) -> Part:
        """All parts in one, which stays the table's gradient, so that changes to its values count."""
        table = self._table
        if any(part.counts is not None for part in table.parts):
            raise ManagedTableError(
                f"the gradient of table {table.name!r} is divided by frequencies over all ranks "
                "(scale_grad_by_freq=True) only when the optimizer steps; it cannot be read before"
            )
        if len(table.parts) != 1:
            table.parts = [coalesce(table.parts) if table.parts else no_rows(table)]
        (only,) = table.parts
        if only.scale not in (None, 1.0):
            only.values.mul_(only.scale)
        only.scale = 1.0
        return only

    def __repr__(self, *, tensor_contents=None) -> str:
        rows = sum(len(part.rows) for part in self._table.parts)
        return f"RowGradient(table={self._table.name!r}, shape={tuple(self.shape)}, gathered_rows={rows})"

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


def row_gradient(table: ManagedTable) -> RowGradient:
    """Return the gradient of `table` as user code sees it."""
    spec = table.table.spec
    stand_in = constant_tensor((spec.rows, spec.dim), math.nan, dtype=table.parameter.dtype, device="cpu")
    gradient = torch.Tensor._make_subclass(RowGradient, stand_in)
    gradient._table = table
    return gradient


def _refusal(gradient: RowGradient, operation: str) -> ManagedTableError:
    return ManagedTableError(
        f"{operation} cannot be applied to the row gradient of table {gradient._table.name!r}; use its .rows and "
        ".values, or norm, mul_, div_, clamp_, zero_"
    )


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
    order = 2.0 if order in (None, "fro") else order
    if dim is not None or keepdim or any(v is not None for v in kwargs.values()) or isinstance(order, str) or order < 0:
        raise _refusal(gradient, f"a norm with p={order!r}, dim={dim!r}")
    _refuse_on_several_ranks(
        gradient,
        "its norm",
        "Clip the dense parameters alone (clip_grad_norm_ over those that have no .rows in their .grad), or scale the "
        "gradient by a factor that does not depend on it",
    )
    values = gradient.values.detach()
    return torch.linalg.vector_norm(values if len(values) else values.new_zeros(1), order, dtype=dtype)


def _matrix_norm(gradient, ord=None, *args, **kwargs):
    """`torch.linalg.norm`, for which a number means a norm of a matrix."""
    if ord not in (None, "fro"):
        raise _refusal(gradient, f"linalg.norm with ord={ord!r}")
    return _norm(gradient, 2.0, *args, **kwargs)


def _refuse_on_several_ranks(gradient, what: str, remedy: str) -> None:
    table = gradient._table
    if table.owner.ranks > 1:
        raise ManagedTableError(
            f"the gradient of table {table.name!r} over {table.owner.ranks} ranks: {what} is not supported, for each "
            f"rank holds its own part of the sum. {remedy}"
        )


def _scale_by(gradient, factor) -> RowGradient:
    if not _is_number(factor):
        raise _refusal(gradient, "multiplication by anything but one number")
    for part in gradient._table.parts:
        part.scale = (1.0 if part.scale is None else part.scale) * float(factor)
    return gradient


def _divide_by(gradient, divisor) -> RowGradient:
    if not _is_number(divisor):
        raise _refusal(gradient, "division by anything but one number")
    value = float(divisor)
    return _scale_by(gradient, 1.0 / value if value else math.copysign(math.inf, value))


def _is_number(value) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, RowGradient) and value.numel() == 1
    return isinstance(value, (int, float))


def _clamp_(gradient, min=None, max=None) -> RowGradient:
    _refuse_on_several_ranks(gradient, "clamping it", "Clamp the dense parameters' gradients alone")
    if (min is not None and min > 0) or (max is not None and max < 0):
        raise _refusal(gradient, f"clamp_(min={min!r}, max={max!r}), which changes the zeros of absent rows,")
    with torch.no_grad():
        gradient.values.clamp_(min, max)
    return gradient


def _zero_(gradient) -> RowGradient:
    gradient._table.clear_gradient(keep_zero=True)
    return gradient


def _same(gradient, *args, **kwargs) -> RowGradient:
    return gradient


def _to(gradient, *args, **kwargs) -> RowGradient:
    check_stays(gradient._table.name, gradient.dtype, args, kwargs)
    return gradient


def _converted(wanted: dict[str, object]):
    return lambda gradient, *args, **kwargs: _to(gradient, **wanted)


def _set_data(gradient, value) -> None:
    if not (isinstance(value, RowGradient) and value._table is gradient._table):
        raise _refusal(gradient, "assigning .data")


def _element_wise(test):
    """A test of the values that are there (`[U, dim]`); the zeros of absent rows pass or fail it like any zero."""

    def handler(gradient):
        _refuse_on_several_ranks(gradient, test.__name__, "Test the loss instead")
        return test(gradient.values)

    return handler


def _for_each(single, plain):
    """Handle a `_foreach_` function over a list in which row gradients and plain tensors are mixed."""

    def handler(gradients, *args, **kwargs):
        if any(isinstance(arg, (list, tuple)) for arg in (*args, *kwargs.values())):
            raise _refusal(_first(gradients), operation_name(plain) + " with a value for each gradient")
        dense = [g for g in gradients if not isinstance(g, RowGradient)]
        results = iter(plain(dense, *args, **kwargs) or dense) if dense else iter(())
        return [single(g, *args, **kwargs) if isinstance(g, RowGradient) else next(results) for g in gradients]

    return handler


_PROPERTIES = """shape dtype device ndim requires_grad is_leaf is_sparse is_cuda is_cpu layout grad_fn is_sparse_csr
is_meta is_mps is_xla is_xpu itemsize nbytes""".split()
_METHODS = """size dim numel nelement is_floating_point is_complex element_size get_device __len__ requires_grad_ stride
is_contiguous""".split()

_FORM = (
    {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES if hasattr(torch.Tensor, name)}
    | {getattr(torch.Tensor, name) for name in _METHODS}
    | {torch.is_complex, torch.is_floating_point, torch.numel, torch._has_compatible_shallow_copy_type}
)

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
    torch.Tensor.detach: _same,
    torch.Tensor.detach_: _same,
    torch.Tensor.data.__get__: _same,
    torch.Tensor.data.__set__: _set_data,
    torch.Tensor.coalesce: _same,
    torch.Tensor.to: _to,
    torch.Tensor.__format__: lambda gradient, spec: format(repr(gradient), spec),
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
