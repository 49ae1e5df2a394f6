"""Trainers that others have written around a managed model (Lightning, accelerate): what lets them work, and errors
where they would go wrong without a word.
"""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import pm
from adaloader.errors import ManagedTableError
from adaloader.model.managed_model import managed_models

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
_TRAINERS = ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric")


def bare_optimizer(optimizer):
    """Return the optimizer of the user's inside of a trainer's own."""
    while type(optimizer).__module__.partition(".")[0] in _TRAINERS and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _refuse_wrapper(module: nn.Module, name: str, inner: nn.Module | None) -> None:
    """A module gets a submodule: raise if that puts a managed model where its gradients are averaged a second time."""
    kind = type(module).__name__
    if inner is None or kind not in _WRAPPERS or not type(module).__module__.startswith("torch."):
        return
    if any(part in managed_models for part in inner.modules()):
        raise ManagedTableError(
            f"{kind} was given a model whose tables AdaLoader manages, and whose gradients it averages over ranks "
            f"itself: leave {kind} out, and start one process per rank with mpirun. In Lightning say "
            "Trainer(strategy='auto', devices=1) on every rank; in accelerate use one process"
        )


def _refuse_unknown_optimizer(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """An optimizer is about to step: raise if it has a gradient of a table to apply that is not for it to apply.

    Dynamo traces this too, in a compiled step of any model: it is not to look at what others may free meanwhile, as at
    `managed_models`.
    """
    makes_gradients = len(args) > 1 or kwargs.get("closure") is not None  # args[0] is the optimizer
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            table = getattr(parameter, "_managed", None)
            if table is None or table.model() is None:
                continue
            known = table.owner.optimizers
            if table.owner.was_let_go(bare_optimizer(optimizer)):
                raise ManagedTableError(
                    f"{type(optimizer).__name__} trained table {table.name!r} until a later loader was given another "
                    "optimizer for it: step that one, or build a new optimizer and pass it to the next loader"
                )
            if any(bare_optimizer(optimizer) is each for each in known):
                break
            if not (makes_gradients or table.may_have_gradient):
                continue
            trained_by = [each for each in known if any(p is parameter for g in each.param_groups for p in g["params"])]
            if isinstance(table.table.spec.rule, pm.Frozen) or not trained_by:
                remedy = "build AdaLoader after it and pass it as optimizer="
            else:
                remedy = (
                    f"the loader was given {type(trained_by[0]).__name__} for it, and a table has one optimizer. Step "
                    "that one (in Lightning, return it from configure_optimizers), or give the next loader this one"
                )
            raise ManagedTableError(
                f"{type(optimizer).__name__} holds table {table.name!r}, whose rows AdaLoader updates, and was not "
                f"given to AdaLoader: {remedy}"
            )


register_module_module_registration_hook(_refuse_wrapper)
register_optimizer_step_pre_hook(_refuse_unknown_optimizer)


class Accelerated:
    """What accelerate's own wrapper does around the passes over a loader, for one that it leaves as it is: it says
    which loader is being iterated (whose last batch ends an accumulation), and samplers hear of each epoch.
    """

    def __init__(self):
        self.epoch = 0

    def begin(self, loader) -> None:
        """An iteration of `loader` begins."""
        from accelerate.state import GradientState

        state = GradientState()
        state._remove_dataloader(loader)  # of an iteration that the loop has left
        state._add_dataloader(loader)
        set_epoch(loader, self.epoch)

    def end(self, loader) -> None:
        """It has come to its end."""
        from accelerate.state import GradientState

        self.epoch += 1
        GradientState()._remove_dataloader(loader)


def set_epoch(loader, epoch: int) -> None:
    """Tell the sampler and the dataset of a loader the number of the epoch, those that want to know."""
    batch_sampler = loader.batch_sampler
    for each in (batch_sampler, getattr(batch_sampler, "sampler", loader.sampler), loader.dataset):
        if hasattr(each, "set_epoch"):
            each.set_epoch(epoch)


def check_accelerate(ranks: int) -> None:
    """Raise if accelerate, or AdaLoader, has several processes: both would share out batches."""
    state = sys.modules["accelerate"].state.PartialState()
    if state.num_processes > 1 or ranks > 1:
        raise ManagedTableError(
            f"accelerator.prepare(loader) with {state.num_processes} processes of accelerate and {ranks} ranks of "
            "AdaLoader: AdaLoader shares batches among ranks and averages gradients itself. Use accelerate with one "
            "process, or write the loop without accelerate and start it with mpirun"
        )


def _saved_arguments(loader) -> tuple:
    """What Lightning asks of a loader that it is about to build anew with another sampler."""
    if loader._session is not None:
        raise ManagedTableError(
            "Lightning would build this AdaLoader anew with a sampler of its own (for predict, overfit_batches=, or a "
            "strategy of several processes), but batches are read ahead, and shared among ranks, in the loader's own "
            "order. Predict with a plain DataLoader, or with AdaLoader.wrap(DataLoader(...), model=model); leave "
            "overfit_batches= out; start one process per rank with mpirun and Trainer(strategy='auto', devices=1)"
        )
    if loader._saved_arguments is None:
        raise AttributeError("__pl_saved_args")
    return loader._saved_arguments


def _save_arguments(loader, arguments: tuple) -> None:
    loader._saved_arguments = arguments


lightning_arguments = property(_saved_arguments, _save_arguments)
"""For loaders, under the name `__pl_saved_args`."""
