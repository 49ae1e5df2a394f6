"""Bare parameters that may be tables: a large 2-D `nn.Parameter` of a user's module is one if it is looked up, not
multiplied.

What it is cannot be seen before it is used, so its first use decides. Until then it keeps its values. If it is first
given to a lookup it becomes a managed table there and then; any other operation on its values makes it an ordinary
dense parameter for good. No message is needed: every rank holds the same values, and keeps the rows that it owns.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import pm
from adaloader.memory.device_memory import KINDS, on_host
from adaloader.model.managed_model import ManagedModel
from adaloader.optimizers.held_state import continue_from, held_anywhere, hyperparameters, take_states
from adaloader.optimizers.supported import group_of, rule_for
from adaloader.overrides.compiler import not_compiled
from adaloader.overrides.form import FORM
from adaloader.overrides.native import native
from adaloader.tables.dense_use import become_dense
from adaloader.tables.managed_table import ManagedTable
from adaloader.tables.probation import Probation, confirm
from adaloader.tables.table_parameter import LOOKUPS, TableParameter, become_table

# Modules of PyTorch's own multiply their weights; these only hold parameters for others.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
# Lookups whose first argument is the table.
_TABLE_FIRST = {native("embedding"), native("index_select"), torch.Tensor.index_select}
# What a rank has decided of a candidate.
_OPEN, _TABLE_SO_FAR, _TABLE, _DENSE = range(4)


def find_candidates(model: nn.Module, tables: Collection[str], min_rows: int) -> dict[str, nn.Parameter]:
    """Return by name the parameters that may be tables though no module says so; `tables` are known to be some."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name not in tables and _may_be_table(parameter, holders[id(parameter)], min_rows)
    }


def _may_be_table(parameter: nn.Parameter, holders: list[nn.Module], min_rows: int) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.ndim == 2
        and parameter.shape[0] >= min_rows
        and parameter.dtype in (torch.float32, torch.float64)
        and (parameter.device.type == "cpu" or parameter.device.type in KINDS)
        and all(isinstance(m, _CONTAINERS) or not type(m).__module__.startswith("torch.") for m in holders)
    )


def watch_candidates(model: ManagedModel, candidates: dict[str, nn.Parameter]) -> None:
    """Reserve a table for each candidate, the same on every rank, and let its first use decide (collective)."""
    specs, refusals = [], []
    for name, parameter in candidates.items():
        spec, refusal = _spec_for(name, parameter, model.optimizers)
        specs.append(spec)
        refusals.append(refusal)
    tables = model.manager.add_tables(specs)
    for (name, parameter), table, refusal in zip(candidates.items(), tables, refusals, strict=True):
        _watch(model, name, parameter, table, refusal)


def _spec_for(
    name: str, parameter: nn.Parameter, optimizers: list[Optimizer]
) -> tuple[pm.TableSpec, ValueError | None]:
    """Return what the manager must know should it become a table, and the error that its use as one would then be."""
    rule, group, refusal = pm.Frozen(), {}, None
    place = group_of(optimizers, parameter, name)
    if place is not None:
        optimizer, group = optimizers[place[0]], optimizers[place[0]].param_groups[place[1]]
        try:
            rule = rule_for(optimizer, group, name)
            group = hyperparameters(optimizer, group, parameter, rule)
        except ValueError as error:  # of no matter while it may turn out to be dense
            refusal = error
    elif optimizers and parameter.requires_grad:
        refusal = ValueError(
            f"no optimizer holds table {name!r} {list(parameter.shape)}: build the optimizer over model.parameters() "
            "of this very model, or pass all optimizers as optimizer=[...]"
        )
    rows, dim = parameter.shape
    dtype = str(parameter.dtype).removeprefix("torch.")
    fill_states = _state_source(optimizers, parameter, rule)
    return pm.TableSpec(name, rows, dim, dtype, rule, group, _row_source(parameter), fill_states), refusal


def decide_now(parameter: nn.Parameter) -> None:
    """Make a candidate a table without waiting for its first use (on every rank); no effect on other parameters."""
    if isinstance(parameter, CandidateParameter):
        parameter._decide(True)


class CandidateParameter(nn.Parameter):
    """A parameter that waits for its first use."""

    _decide: Callable[[bool], None]
    decides_before_rows = True

    @classmethod
    @not_compiled
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in FORM and func not in _NEUTRAL and not _keeps_form(func, args):
            for candidate in {id(each): each for each in _candidates_among((*args, *kwargs.values()))}.values():
                candidate._decide(candidate is _looked_up(func, args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo):
        """A copy waits for nothing: no loader manages the model that it is in."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        plain = nn.Parameter(self.detach(), self.requires_grad)
        plain.__dict__.update((name, value) for name, value in vars(self).items() if name != "_decide")
        return plain.__reduce_ex__(protocol)


_NEUTRAL = {
    torch.Tensor.detach,
    torch.Tensor.copy_,
    torch.Tensor.data.__get__,
    torch.Tensor.grad.__get__,
    torch.Tensor.grad.__set__,
    torch.Tensor.requires_grad_,
    torch.Tensor.requires_grad.__set__,
    torch.Tensor.to,
    torch.Tensor.__repr__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
}


def _keeps_form(func, args: tuple) -> bool:
    """Whether a call gives a candidate other values and nothing else, as `model.to(...)` does where it changes none."""
    if func is not torch.Tensor.data.__set__:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return all(getattr(args[0], of) == getattr(args[1], of) for of in ("shape", "dtype", "device"))


def _watch(
    model: ManagedModel, name: str, parameter: nn.Parameter, table: pm.Table, refusal: ValueError | None
) -> None:
    to_model, to_parameter = weakref.ref(model), weakref.ref(parameter)

    def decide(is_table: bool) -> None:
        candidate = to_parameter()
        candidate.__class__ = nn.Parameter
        del candidate._decide
        if is_table and to_model() is not None:
            if refusal is not None:
                raise type(refusal)(*refusal.args)  # a new one: what is kept here must not keep the loop's frames
            with to_model().paused():
                _promote(to_model(), name, candidate, table)

    parameter.__class__ = CandidateParameter
    parameter._decide = decide
    model.watched[name] = to_parameter
    continue_from(table, held_anywhere(model.optimizers, parameter, table.spec.rule))


def _row_source(parameter: nn.Parameter) -> Callable[[np.ndarray, np.ndarray], None]:
    """Return a function that fills rows from the values that a candidate has as long as it is one."""
    source = weakref.ref(parameter)

    def fill(rows: np.ndarray, out: np.ndarray) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            np.take(on_host(source()), rows, axis=0, out=out)

    return fill


def _state_source(
    optimizers: list[Optimizer], parameter: nn.Parameter, rule: pm.Rule
) -> Callable[[np.ndarray, np.ndarray], None]:
    """Return a function that fills rows' optimizer state from what a candidate's optimizer holds for it."""
    source = weakref.ref(parameter)

    def fill_states(rows: np.ndarray, out: np.ndarray) -> None:
        parts = held_anywhere(optimizers, source(), rule).parts
        if parts is not None:
            take_states(parts, rows, out)

    return fill_states


def agree_on_candidates(model: ManagedModel) -> None:
    """Decide on every rank what any rank has decided of a parameter that may be a table (collective).

    A rank that has not used it yet still holds it whole; what concerns all tables needs all ranks to agree.

    Raises:
        ValueError: on every rank, if a parameter is a table on some ranks and dense on others.
    """
    manager = model.manager
    if manager.ranks == 1 or not model.watched:
        return
    decided = np.array([_decision(parameter()) for parameter in model.watched.values()], np.int8)
    all_decided = np.empty((manager.ranks, len(decided)), np.int8)
    manager.transport.collective(lambda comm: comm.Iallgather(decided, all_decided), manager.timeout_seconds)
    for at, (name, parameter) in enumerate(model.watched.items()):
        tables = np.flatnonzero(all_decided[:, at] == _TABLE).tolist()
        dense = np.flatnonzero(all_decided[:, at] == _DENSE).tolist()
        if tables and dense:
            raise ValueError(
                f"parameter {name!r} was looked up on ranks {tables} and used otherwise on ranks {dense}; all ranks "
                "must use it the same way, or say in strategy= what it is"
            )
        if dense:
            _become_dense(parameter())
        elif (all_decided[:, at] != _OPEN).any():
            decide_now(parameter())
            if tables and parameter()._managed.probation is not None:
                confirm(parameter()._managed)


def _become_dense(parameter: nn.Parameter) -> None:
    if isinstance(parameter, CandidateParameter):
        parameter._decide(False)
    elif isinstance(parameter, TableParameter):
        become_dense(parameter._managed, "another rank's use of the parameter")


def _decision(parameter: nn.Parameter) -> int:
    if isinstance(parameter, CandidateParameter):
        return _OPEN
    if isinstance(parameter, TableParameter):
        return _TABLE if parameter._managed.probation is None else _TABLE_SO_FAR
    return _DENSE


def state_was_loaded(model: ManagedModel) -> None:
    """Optimizers hold other state than before: candidates that become tables later start from that."""
    for name, parameter in model.watched.items():
        if isinstance(parameter(), CandidateParameter):
            table = next(table for table in model.manager.tables if table.spec.name == name)
            continue_from(table, held_anywhere(model.optimizers, parameter(), table.spec.rule))


def _promote(model: ManagedModel, name: str, parameter: nn.Parameter, table) -> None:
    """Make a table of a candidate; its memory is kept for as long as it may still become dense (see `probation.py`)."""
    held = held_anywhere(model.optimizers, parameter, table.spec.rule)
    if model.reducer is not None:
        model.reducer.drop(parameter)
    with model.manager.structure:  # no row is being made meanwhile, for another rank, of the memory that goes
        managed = ManagedTable(name, parameter, table, weakref.ref(model), probation=Probation(parameter, held))
        managed.steps_before = table.gradient_steps
        table.spec = replace(table.spec, fill=managed.probation.fill, fill_states=managed.probation.fill_states)
        become_table(parameter, managed)
    model.table_added(managed)


def _candidates_among(arguments) -> list[CandidateParameter]:
    found = []
    for argument in arguments:
        if isinstance(argument, CandidateParameter):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += _candidates_among(argument)
    return found


def _looked_up(func, args: tuple, kwargs: dict) -> nn.Parameter | None:
    """Return the parameter that this call looks up, if it is a lookup."""
    if func not in LOOKUPS:
        return None
    weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
    if func is torch.Tensor.__getitem__:
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        is_ids = isinstance(index, (list, np.ndarray)) or hasattr(index, "__index__")
        if isinstance(index, torch.Tensor):
            is_ids = not index.is_floating_point() and index.dtype not in (torch.bool, torch.uint8)
        return args[0] if is_ids and not isinstance(index, bool) else None
    if func in _TABLE_FIRST:
        weight = kwargs.get("weight", kwargs.get("input", args[0] if args else None))
    return weight if isinstance(weight, CandidateParameter) else None
