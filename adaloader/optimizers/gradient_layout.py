"""Dense and sparse gradients: which of them PyTorch's optimizers take, and so which tables they can train here.

A managed table's gradient is always a few rows. What they mean is for the lookup's `sparse` to say: with a dense
gradient (sparse=False) an optimizer may move every row, with a sparse one only those looked up.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

import pm
from adaloader.errors import UnsupportedOptimizerError

_DENSE_ONLY = (pm.DecayingAdagrad, pm.RMSprop, pm.Adadelta, pm.Adam, pm.NAdam, pm.RAdam, pm.Adamax)
_SPARSE_MODULES = (nn.Embedding, nn.EmbeddingBag)


def check_layout(rule: pm.Rule, sparse: bool, table: str, where: str) -> None:
    """Raise UnsupportedOptimizerError where plain PyTorch refuses gradients of that layout.

    Args:
        rule: of the table.
        sparse: whether its gradient would be sparse.
        table: its name.
        where: the lookup, for the message.
    """
    if sparse and isinstance(rule, _DENSE_ONLY):
        options = " with weight_decay" if isinstance(rule, pm.DecayingAdagrad) else ""
        raise UnsupportedOptimizerError(
            f"table {table!r}: {where} has sparse=True, and its optimizer{options} ({type(rule).__name__}) takes dense "
            "gradients only, as in plain PyTorch; set sparse=False, or train it with torch.optim.SparseAdam, SGD "
            "(no weight_decay) or Adagrad (no weight_decay)"
        )
    if not sparse and isinstance(rule, pm.SparseAdam):
        raise UnsupportedOptimizerError(
            f"table {table!r}: {where} has sparse=False, and its optimizer SparseAdam takes sparse gradients only, as "
            "in plain PyTorch; set sparse=True, or train it with torch.optim.Adam, SGD or Adagrad"
        )


def check_modules(model: nn.Module, rules: Mapping[str, tuple[pm.Rule, Mapping[str, object]]]) -> None:
    """Check every embedding module of tables that are trained.

    Args:
        model: whose modules hold the tables.
        rules: rule and hyperparameters by the table's name.

    Raises:
        UnsupportedOptimizerError: naming table, module and remedy.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in rules}
    for path, module in model.named_modules():
        weight = own_weight(module)
        if not isinstance(module, _SPARSE_MODULES) or id(weight) not in names or not weight.requires_grad:
            continue
        table = names[id(weight)]
        rule, group = rules[table]
        where = f"{type(module).__name__} {path!r}"
        check_layout(rule, module.sparse, table, where)
        if module.sparse and isinstance(rule, pm.MomentumSGD) and group.get("weight_decay"):
            raise UnsupportedOptimizerError(
                f"table {table!r}: {where} has sparse=True, and SGD(weight_decay={group['weight_decay']!r}) takes "
                "dense gradients only, as in plain PyTorch; set sparse=False, or put the table into a parameter group "
                "without weight_decay"
            )


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """Return a module's parameter `weight`, if it has one; not by its attribute, which a parametrization would
    compute."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False)).get("weight")
