"""The parameter that a managed table leaves in the model: its identity, shape and dtype, and no values.

Every operation on it passes `__torch_function__`, above autograd. A lookup runs on a slab (`operations.py`); a question
about its form is answered; a few others are handled here; anything else is an error that names table and operation.
Code that reaches below that (C++ extensions, TorchScript) finds NaN: the storage is one NaN, whatever the shape.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from adaloader.errors import ManagedTableError, WholeTableError
from adaloader.gradients import functional_grad
from adaloader.gradients.gradient_hooks import OfTable
from adaloader.gradients.row_gradient import RowGradient, row_gradient
from adaloader.gradients.whole_gradient import catch_whole_gradients
from adaloader.lookups import blocks, operations
from adaloader.overrides.compiler import not_compiled
from adaloader.overrides.constant import constant_tensor
from adaloader.overrides.conversion import METHODS, check_stays
from adaloader.overrides.form import FORM
from adaloader.overrides.native import native
from adaloader.tables.function_transforms import guard_transforms
from adaloader.tables.whole_use import use_whole
from adaloader.tables.writes import overwrite
from adaloader.views import table_views

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable


class _ManagedTensor:
    """What the parameter and its detached views share."""

    _managed: ManagedTable
    decides_before_rows = True

    @classmethod
    @not_compiled
    def __torch_function__(cls, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            made = blocks.look_up(*args, **kwargs)
            if made is not None:
                return made
        subject = table_views.subject(func, args, kwargs)
        if getattr(getattr(subject, "_managed", None), "is_dense", False):  # a view from before
            return func(*_as_dense(args), **_as_dense(kwargs))
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(subject, _ManagedTensor):
            try:
                made = handler(*args, **kwargs)
            except WholeTableError:
                return use_whole(subject._managed, func, args, kwargs)
            watch = subject._managed.owner.watch
            if watch.recorder is not None:
                watch.recorder.came_from_table(made)
            return made
        if func is torch.autograd.grad:
            return functional_grad.grad(*args, **kwargs)
        if func is torch.autograd.backward:  # with a table among its inputs=, which the graph knows
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in FORM or func in _FORM_OF_ARGUMENT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        table = _table_among((*args, *kwargs.values()))
        return NotImplemented if table is None else use_whole(table, func, args, kwargs)

    def __repr__(self, *, tensor_contents=None) -> str:
        table = self._managed
        return (
            f"{type(self).__name__}(table={table.name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"requires_grad={self.requires_grad}; rows are managed by AdaLoader)"
        )

    def __deepcopy__(self, memo):
        """A copy is an ordinary dense parameter (or tensor), with the values of this moment."""
        if id(self) not in memo:
            memo[id(self)] = self._as_plain()
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self._as_plain().__reduce_ex__(protocol)

    def _as_plain(self) -> torch.Tensor:
        return self._managed.whole_values().clone()


class TableParameter(_ManagedTensor, nn.Parameter):
    """A managed table as the model and the optimizers hold it; a parameter becomes one in place."""

    def _as_plain(self) -> nn.Parameter:
        return nn.Parameter(super()._as_plain(), self.requires_grad)

    @property
    def grad(self) -> RowGradient | None:
        table = self._managed
        if table.hidden or not table.may_have_gradient:
            return None
        if table.seen_gradient is None:
            table.seen_gradient = row_gradient(table.gradient)
        return table.seen_gradient

    @grad.setter
    def grad(self, value) -> None:
        if value is None:
            self._managed.clear_gradient()
        elif isinstance(value, RowGradient) and value._sum.table is self._managed:
            self._managed.replace_gradient(value._sum)
        else:
            raise ManagedTableError(
                f"the gradient of table {self._managed.name!r} can be set to None or to a gradient that was computed "
                f"from it (parameter.grad * 0.5, say), not to {type(value).__name__}"
            )

    @grad.deleter
    def grad(self) -> None:
        self._managed.clear_gradient()


class TableView(_ManagedTensor, torch.Tensor):
    """A detached view of a managed table: lookups of it give rows without gradient."""


def become_table(parameter: nn.Parameter, table: ManagedTable) -> None:
    """Turn `parameter` into a `TableParameter` in place and free its values; identity, shape and hooks stay."""
    guard_transforms()
    requires_grad = parameter.requires_grad
    stand_in = constant_tensor(parameter.shape, float("nan"), dtype=parameter.dtype, device=parameter.device)
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.grad.__set__(parameter, None)
        torch.Tensor.data.__set__(parameter, stand_in)
        _take_over_hooks(parameter, table)
        catch_whole_gradients(parameter, table)
    parameter.__class__ = TableParameter
    parameter._managed = table
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.requires_grad_(parameter, requires_grad)


def _table_among(arguments) -> ManagedTable | None:
    for argument in arguments:
        if isinstance(argument, _ManagedTensor):
            return argument._managed
        if isinstance(argument, (list, tuple)):
            found = _table_among(argument)
            if found is not None:
                return found
    return None


def _view(tensor, *args, **kwargs) -> TableView:
    """Return the table without its gradient (`detach()`, `.data`)."""
    table = tensor._managed
    stand_in = constant_tensor(tensor.shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = torch.Tensor._make_subclass(TableView, stand_in)
    view._managed = table
    return view


def _set_data(tensor, value) -> None:
    table = tensor._managed
    if isinstance(value, _ManagedTensor) and value._managed is table:
        return
    overwrite(table, value, f"assigning {tensor.__class__.__name__}.data")


def _copy_(tensor, source, non_blocking=False):
    if isinstance(source, _ManagedTensor):
        source = source._managed.whole_values()
    overwrite(tensor._managed, source, "copy_")
    return tensor


def _as_dense(value):
    """Return `value` with the parameter itself, without gradient, in place of views of a table that has become one."""
    if isinstance(value, TableView) and value._managed.is_dense:
        return value._managed.parameter.detach()
    if isinstance(value, dict):
        return {name: _as_dense(part) for name, part in value.items()}
    return type(value)(map(_as_dense, value)) if type(value) in (list, tuple) else value


def _to(tensor, *args, **kwargs):
    """`to` and its relatives: nothing to do for the dtype and device that the table has; an error for others."""
    check_stays(tensor._managed.name, tensor.dtype, tensor.device, args, kwargs)
    return tensor


def _converted(wanted: dict[str, object]):
    return lambda tensor, *args, **kwargs: _to(tensor, **wanted)


def _type(tensor, dtype=None, non_blocking=False, **kwargs):
    """`type()` names the tensor type; with a dtype it is a conversion."""
    if dtype is None:
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).type()
    return _to(tensor, torch.empty(0).type(dtype).dtype)


def _format(tensor, spec: str) -> str:
    return format(repr(tensor), spec)


def _requires_grad_(tensor, requires_grad=True):
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.requires_grad_(tensor, requires_grad)
    return tensor


def _set_requires_grad(tensor, requires_grad) -> None:
    _requires_grad_(tensor, requires_grad)


def _like(value):
    """`zeros_like` and its relatives: the same number everywhere, which takes the memory of one."""

    def handler(input, fill_value=value, *, dtype=None, device=None, requires_grad=False, **kwargs):
        dtype = input.dtype if dtype is None else dtype
        device = input.device if device is None else device
        return constant_tensor(input.shape, fill_value, dtype=dtype, device=device, requires_grad=requires_grad)

    return handler


def _registers(name: str):
    """`register_hook` and its relative; see `gradient_hooks.py`."""

    def handler(tensor, hook):
        if not tensor.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        hooks = getattr(tensor._managed, name)
        handle = RemovableHandle(hooks)
        hooks[handle.id] = OfTable(hook)
        return handle

    return handler


def _take_over_hooks(parameter: nn.Parameter, table: ManagedTable) -> None:
    """Keep hooks with the table: autograd would call them for the parameter itself, which gets no gradient."""
    for attribute, kept in (("_backward_hooks", "hooks"), ("_post_accumulate_grad_hooks", "post_hooks")):
        hooks = getattr(parameter, attribute)
        if hooks is not None:
            for key, hook in list(hooks.items()):
                hooks[key] = OfTable(hook)
            setattr(table, kept, hooks)  # the very dict: handles remove from it
            setattr(parameter, attribute, None)


LOOKUPS = {
    nn.functional.embedding: operations.embedding,
    native("embedding"): operations.aten_embedding,
    nn.functional.embedding_bag: operations.embedding_bag,
    native("index_select"): operations.index_select,
    torch.Tensor.index_select: operations.index_select,
    torch.Tensor.__getitem__: operations.get_item,
}

_HANDLERS = (
    LOOKUPS
    | {
        torch.Tensor.detach: _view,
        torch.detach: _view,
        torch.Tensor.data.__get__: _view,
        torch.Tensor.data.__set__: _set_data,
        torch.Tensor.copy_: _copy_,
        torch.Tensor.to: _to,
        torch.Tensor.type: _type,
        torch.Tensor.type_as: lambda tensor, other: _to(tensor, other.dtype),
        torch.Tensor.__format__: _format,
        torch.Tensor.retain_grad: lambda tensor: None,
        torch.Tensor.requires_grad_: _requires_grad_,
        torch.Tensor.requires_grad.__set__: _set_requires_grad,
        torch.Tensor.register_hook: _registers("hooks"),
        torch.Tensor.register_post_accumulate_grad_hook: _registers("post_hooks"),
        torch.zeros_like: _like(0.0),
        torch.ones_like: _like(1.0),
        torch.empty_like: _like(0.0),
        torch.full_like: _like(0.0),
    }
    | {method: _converted(wanted) for method, wanted in METHODS.items()}
    | {func: partial(table_views.view_by, func) for func in table_views.VIEWS}
    | table_views.BY_INDEX
)

# Calls on another tensor, of which a table among the arguments gives the form alone.
_FORM_OF_ARGUMENT = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.is_same_size, torch.Tensor.is_set_to}
