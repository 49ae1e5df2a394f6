"""What a checkpoint has beside the rows of tables: dense parameters, buffers, and the state of optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adaloader.checkpoint.dtypes import BY_NAME
from adaloader.checkpoint.layout import Index
from adaloader.checkpoint.saving import parameter_names
from adaloader.checkpoint.tensor_file import TensorFile
from adaloader.checkpoint.tree import decode
from adaloader.errors import CheckpointError
from adaloader.model.gathering import importing, leaving_tables_out
from adaloader.model.managed_model import ManagedModel


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
        return [*self._model_problems(managed, index), *self._optimizer_problems(managed)]

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

    def _optimizer_problems(self, managed: ManagedModel) -> list[str]:
        if len(self.groups) != len(managed.optimizers):
            return [f"it has {len(self.groups)} optimizers, the loader {len(managed.optimizers)}"]
        problems = []
        for at, (optimizer, groups) in enumerate(zip(managed.optimizers, self.groups, strict=True)):
            mine, kind = parameter_names(managed, optimizer), type(optimizer).__qualname__
            if kind != self.kinds[at]:
                problems.append(f"optimizer {at} is a {kind}, and was a {self.kinds[at]}")
            elif mine != groups:
                differing = {n for g in mine for n in g} ^ {n for g in groups for n in g}
                what = f"{sorted(differing)[:5]} are not in both" if differing else "in another order, or other groups"
                problems.append(f"optimizer {at} ({type(optimizer).__name__}) holds other parameters: {what}")
        return problems


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
    if dense._optimizer_problems(managed):
        return
    left_out = set(table_aliases(managed)) | aliases_in(index) | unfit
    tables = [table.parameter for table in managed.tables]
    for number, optimizer in enumerate(managed.optimizers):
        kept = {parameter: optimizer.state[parameter] for parameter in tables if parameter in optimizer.state}
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


def _unfit(managed: ManagedModel, dense: DenseState) -> set[str]:
    unfit = set()
    for name, value in dense_entries(managed).items():
        form = dense.form(name) if isinstance(value, torch.Tensor) else None
        if form is not None and form[1] != tuple(value.shape):
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
