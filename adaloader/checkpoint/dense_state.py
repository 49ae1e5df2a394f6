"""What a checkpoint has beside the rows of tables: dense parameters, buffers, and the state of optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import pm
from adaloader.checkpoint.dtypes import BY_NAME
from adaloader.checkpoint.layout import Index
from adaloader.checkpoint.saving import parameter_names
from adaloader.checkpoint.tensor_file import TensorFile
from adaloader.checkpoint.tree import decode
from adaloader.errors import CheckpointError
from adaloader.model.gathering import importing, leaving_tables_out
from adaloader.model.managed_model import ManagedModel
from adaloader.optimizers.supported import OPTIONS_OF_KIND, rule_for

_ALWAYS_OF_KIND = ("amsgrad", "centered")
"""Options that no schedule changes."""


class DenseState:
    """The model's and the optimizers' part of a checkpoint; tensors are read when they are asked for.

    `model` maps names of the model's state_dict to nodes; `groups` are the names of the parameters in each group of
    each optimizer.

    Raises:
        CheckpointError: if the index has no such part.
    """

    def __init__(self, index: Index, file: TensorFile):
        self.file = file
        try:
            self.model = _items(index.trees["model"])
            optimizers = [_items(node) for node in index.trees["optimizers"]["list"]]
            self._states = [{key: _items(of) for key, of in _items(each["state"]).items()} for each in optimizers]
            self._param_groups = [decode(each["param_groups"], file.tensor) for each in optimizers]
            self.kinds: list[str] = index.trees["kinds"]
            self.groups: list[list[list[str]]] = index.trees["parameters"]
            sizes = [[len(group["params"]) for group in groups] for groups in self._param_groups]
            if len(self.kinds) != len(sizes) or sizes != [[len(names) for names in groups] for groups in self.groups]:
                raise ValueError("the optimizers' groups have other parameters than are named")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the index has no state of a model and its optimizers: {error!r}") from error

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Return dtype and shape of an entry of the model's state_dict; None if it is no tensor."""
        tensor = _tensor_of(self.model.get(name))
        if tensor is None:
            return None
        entry = self.file.entry(tensor)
        return BY_NAME[entry.dtype], entry.shape

    def model_state(self, names: set[str]) -> dict[str, Any]:
        """Return the entries `names` of the model's state_dict."""
        return {name: decode(node, self.file.tensor, name) for name, node in self.model.items() if name in names}

    def optimizer_state(self, number: int, left_out: set[str]) -> dict[str, Any]:
        """Return an optimizer's state_dict without the entries of the parameters `left_out`."""
        states, groups = self._states[number], self._param_groups[number]
        kept = {}
        for group, names in zip(groups, self.groups[number], strict=True):
            for key, name in zip(group["params"], names, strict=True):
                if key in states and name not in left_out:
                    kept[key] = {of: decode(node, self.file.tensor, name) for of, node in states[key].items()}
        return {"state": kept, "param_groups": groups}

    def check(self, managed: ManagedModel, index: Index) -> list[str]:
        """Return what does not fit the model, a line each."""
        return [*self._model_problems(managed, index), *dict.fromkeys(self.optimizer_problems(managed, index).values())]

    def _model_problems(self, managed: ManagedModel, index: Index) -> list[str]:
        wanted, of_tables = dense_entries(managed), aliases_in(index)
        problems = []
        for name, value in wanted.items():
            if name not in self.model and name not in of_tables:
                problems.append(f"the model's {name!r} is not in it")
            elif isinstance(value, torch.Tensor) and (form := self.form(name)) is not None:
                if form[1] != tuple(value.shape):
                    problems.append(f"{name!r} has shape {list(form[1])} in it and {list(value.shape)} in the model")
                elif form[0] != value.dtype:
                    problems.append(f"{name!r} has dtype {form[0]} in it and {value.dtype} in the model")
        tables = table_aliases(managed)
        problems += [f"its {name!r} is not in the model" for name in self.model if name not in {*wanted, *tables}]
        return problems

    def optimizer_problems(self, managed: ManagedModel, index: Index) -> dict[int, str]:
        """Return why optimizers cannot go on with what is saved of them, by number."""
        if len(self.groups) != len(managed.optimizers):
            problem = f"it has {len(self.groups)} optimizers, the loader {len(managed.optimizers)}"
            return dict.fromkeys(range(max(1, len(managed.optimizers))), problem)
        problems = ((at, self._optimizer_problem(at, managed, index)) for at in range(len(managed.optimizers)))
        return {at: problem for at, problem in problems if problem}

    def _optimizer_problem(self, at: int, managed: ManagedModel, index: Index) -> str:
        optimizer, groups = managed.optimizers[at], self.groups[at]
        mine, kind = parameter_names(managed, optimizer), type(optimizer).__qualname__
        if kind != self.kinds[at]:
            return f"optimizer {at} is a {kind}, and was a {self.kinds[at]}"
        if mine != groups:
            differing = {n for g in mine for n in g} ^ {n for g in groups for n in g}
            what = f"{sorted(differing)[:5]} are not in both" if differing else "in another order, or other groups"
            return f"optimizer {at} ({type(optimizer).__name__}) holds other parameters: {what}"
        for saved, group in zip(self._param_groups[at], optimizer.param_groups, strict=True):
            if _needs_other_state(managed, optimizer, group, saved, index):
                had, has = (_options_of_kind(each, group) for each in (saved, group))
                return f"optimizer {at} is {kind}({has}) and was {kind}({had}), which has other state"
        return ""


def _needs_other_state(
    managed: ManagedModel,
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    saved: Mapping[str, Any],
    index: Index,
) -> bool:
    """Whether the state of a parameter group is another under the options that are saved than under those it has.

    Of dense parameters a momentum that was 0 once is none: a schedule may have begun there.
    """
    if any(bool(saved.get(option)) != bool(group.get(option)) for option in _ALWAYS_OF_KIND):
        return True
    tables = {id(table.parameter): table for table in managed.tables}
    names = _names(managed)
    for parameter in group["params"]:
        table, name = tables.get(id(parameter)), names.get(id(parameter), "")
        if table is None and name not in index.tables:
            continue
        rule = rule_for(optimizer, group, name) if table is None else table.table.spec.rule
        if name in index.tables and index.tables[name].rule != rule.name:
            return True
        # A table that was none when it was saved: what is saved of it is an ordinary parameter's.
        if not isinstance(rule, pm.Frozen) and not rule.covers(rule_for(optimizer, {**group, **saved}, name)):
            return True
    return False


def _names(managed: ManagedModel) -> dict[int, str]:
    """Return the name of each parameter by its id(), that of its table if it is one."""
    named = {id(parameter): name for name, parameter in managed.model().named_parameters()}
    return {**named, **{id(table.parameter): table.name for table in managed.tables}}


def _options_of_kind(group: Mapping[str, Any], like: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={group.get(name)!r}" for name in OPTIONS_OF_KIND if name in like)


def load_dense(managed: ManagedModel, dense: DenseState, buffers: Mapping[str, torch.Tensor] | None, index: Index):
    """Set dense parameters, buffers and optimizers to what a checkpoint has, as far as it fits.

    `buffers`: this rank's own, where they are known.
    """
    model = managed.model()
    unfit = _unfit(managed, dense)
    model.load_state_dict(dense.model_state(set(dense_entries(managed)) - unfit), strict=False)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if buffers and name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])
    problems = dense.optimizer_problems(managed, index)
    left_out = set(table_aliases(managed)) | aliases_in(index) | _unfit(managed, dense, dtypes=True)
    # Of what is left out stays what there is: some optimizers make their state before the first step only.
    staying = [parameter for name, parameter in model.named_parameters() if name in left_out]
    for number, optimizer in enumerate(managed.optimizers):
        if number in problems:
            continue
        kept = {parameter: optimizer.state[parameter] for parameter in staying if parameter in optimizer.state}
        state = dense.optimizer_state(number, left_out)
        with importing(managed):
            optimizer.load_state_dict(state)
        _keep_dtypes(optimizer, state)
        optimizer.state.update(kept)


def _keep_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer's tensors the dtypes that they had.

    PyTorch converts them to the parameter's when it loads, also what it made in another (NAdam's product), and would
    then go on otherwise.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = [key for group in state["param_groups"] for key in group["params"]]
    for key, parameter in zip(keys, parameters, strict=True):
        for name, value in state["state"].get(key, {}).items():
            held = optimizer.state[parameter].get(name)
            if torch.is_tensor(value) and torch.is_tensor(held) and held.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(held.device)


def _unfit(managed: ManagedModel, dense: DenseState, *, dtypes: bool = False) -> set[str]:
    """Return the names of what has another shape in the checkpoint, or with `dtypes` another dtype."""
    unfit = set()
    for name, value in dense_entries(managed).items():
        form = dense.form(name) if isinstance(value, torch.Tensor) else None
        if form is not None and (form[1] != tuple(value.shape) or dtypes and form[0] != value.dtype):
            unfit.add(name)
    return unfit


def dense_entries(managed: ManagedModel) -> dict[str, Any]:
    """Return the model's state_dict without managed tables."""
    with leaving_tables_out(managed):
        return dict(managed.model().state_dict())


def table_aliases(managed: ManagedModel) -> dict[str, str]:
    """Return the name of the managed table by each name under which the model has it."""
    tables = {id(table.parameter): table.name for table in managed.tables}
    named = managed.model().named_parameters(remove_duplicate=False)
    return {name: tables[id(parameter)] for name, parameter in named if id(parameter) in tables}


def aliases_in(index: Index) -> set[str]:
    """Return all names of the tables in a checkpoint."""
    return {alias for entry in index.tables.values() for alias in entry.aliases}


def _items(node: Any) -> dict[Any, Any]:
    """Return the nodes of a dictionary's node by key."""
    return {key: value for key, value in node["dict"]}


def _tensor_of(node: Any) -> str | None:
    return node["tensor"] if isinstance(node, dict) and isinstance(node.get("tensor"), str) else None
