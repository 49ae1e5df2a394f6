"""Every model of deepctr-torch: click-through models, models of behaviour sequences, and multi-task models.

Their input is one float matrix, in which ids and dense numbers are columns. As published they add a penalty on the
whole of every table (l2_reg_embedding=1e-5), so each model has two cases: as it comes, its tables dense, and without
penalty, its tables managed.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional

from tests.models.zoo import Case, all_tables, tables_like

# On import deepctr_torch asks a package registry for its newest version, on a thread. Tests ask nobody.
_utils = types.ModuleType("deepctr_torch.utils")
_utils.check_version = lambda version: None
sys.modules.setdefault("deepctr_torch.utils", _utils)

from deepctr_torch import models  # noqa: E402
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat, build_input_features  # noqa: E402

FIELDS = {"user": 60, "item": 80, "city": 30, "hour": 24}
ITEMS, SEQUENCE, DIM = 80, 5, 4
SMALL = {
    "dnn_hidden_units": (8, 4),
    "afn_dnn_hidden_units": (8, 4),
    "att_hidden_size": (6, 4),
    "att_hidden_units": (6, 4),
    "bottom_dnn_hidden_units": (8, 4),
    "tower_dnn_hidden_units": (6, 4),
    "expert_dnn_hidden_units": (8, 4),
    "gate_dnn_hidden_units": (4,),
    "cin_layer_size": (6, 4),
    "ltl_hidden_size": 6,
    "conv_filters": (3, 3),
    "init_std": 0.1,  # with the default of 1e-4 gradients are of the size of rounding, which Adagrad turns to signs
}
CLICK_MODELS = "WDL DeepFM xDeepFM AFM DIFM IFM AutoInt DCN DCNMix FiBiNET NFM MLR ONN PNN CCPM AFN".split()
SEQUENCE_MODELS = "DIN DIEN".split()
MULTI_TASK_MODELS = "SharedBottom ESMM MMOE PLE".split()


def click_columns() -> list:
    fields = [SparseFeat(name, rows, DIM) for name, rows in FIELDS.items()]
    bag = VarLenSparseFeat(SparseFeat("genres", 20, DIM), SEQUENCE, "mean")
    shared = SparseFeat("seller", FIELDS["user"], DIM, embedding_name="user")
    return [*fields, shared, bag, DenseFeat("age", 1), DenseFeat("price", 2)]


def columns_without_dense() -> list:
    return [column for column in click_columns() if not isinstance(column, DenseFeat)]


def columns_with_a_table_each() -> list:
    """For models that count fields by their tables."""
    return [column for column in click_columns() if column.name != "seller"]


def fields_only() -> list:
    return [column for column in columns_with_a_table_each() if isinstance(column, SparseFeat)]


def sequence_columns() -> list:
    def history(name: str) -> VarLenSparseFeat:
        return VarLenSparseFeat(SparseFeat(name, ITEMS, DIM, embedding_name="item"), SEQUENCE, length_name="length")

    fields = [SparseFeat("user", FIELDS["user"], DIM), SparseFeat("item", ITEMS, DIM), DenseFeat("age", 1)]
    return [*fields, history("hist_item"), history("neg_hist_item")]


def make_matrix(columns: list, samples: int) -> torch.Tensor:
    """Draw samples for the columns, [samples, width] in the default dtype."""
    places = build_input_features(columns)
    width = max(stop for _, stop in places.values())
    matrix = torch.empty(samples, width)
    for column in columns:
        start, stop = places[column.name]
        if isinstance(column, DenseFeat):
            matrix[:, start:stop] = torch.rand(samples, stop - start)
        else:
            ids = torch.randint(0, column.vocabulary_size, (samples, stop - start))
            matrix[:, start:stop] = torch.minimum(ids, torch.randint_like(ids, column.vocabulary_size))
    if "length" in places:
        start, _ = places["length"]
        matrix[:, start] = torch.randint(1, SEQUENCE + 1, (samples,))
    return matrix


def make_case(
    name: str,
    columns: Callable[[], list],
    *,
    penalty: bool,
    tasks: int = 1,
    title: str = "",
    dtype: torch.dtype = torch.float64,
    **options,
) -> Case:
    model_class = getattr(models, name)
    accepted = inspect.signature(model_class.__init__).parameters
    chosen = {key: value for key, value in {**SMALL, **options}.items() if key in accepted}
    if not penalty:
        chosen |= {key: 0 for key in accepted if key.startswith("l2_reg")}

    def make_model() -> nn.Module:
        given = {key: columns() for key in ("linear_feature_columns", "dnn_feature_columns") if key in accepted}
        if name == "MLR":
            given = {"region_feature_columns": columns()}
        return model_class(**given, **chosen)

    def make_batches(model: nn.Module) -> Iterable:
        torch.manual_seed(7)
        return [
            (make_matrix(columns(), size), (torch.rand(size, tasks) < 0.4).to(torch.get_default_dtype()))
            for size in (16, 16, 16, 16, 16, 9)
        ]

    def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        features, labels = batch
        loss = functional.binary_cross_entropy(model(features), labels)
        return (loss + model.get_regularization_loss() + model.aux_loss).sum()

    title = title or name
    return Case(
        "deepctr-torch",
        f"{title}, as published" if penalty else f"{title}, no penalty",
        make_model,
        make_batches,
        loss_of,
        note="a penalty on whole tables" if penalty else "",
        dense_of=dense_for(name, penalty),
        per_sample=not options.get("use_negsampling"),
        dtype=dtype,
    )


def columns_for(name: str) -> Callable[[], list]:
    if name == "CCPM":
        return fields_only
    if name in ("xDeepFM", "AutoInt", "FiBiNET", "AFN"):
        return columns_with_a_table_each
    return columns_without_dense if name in ("AFM", "NFM", "ONN") else click_columns


def dense_for(name: str, penalty: bool) -> Callable[[nn.Module], Iterable[str]]:
    """Return which tables a penalty makes the model use whole; some penalties cannot be switched off."""
    always = {"DCN": ["linear_model.*"], "DCNMix": ["linear_model.*"], "MLR": ["linear_model.*", "embedding_dict.*"]}
    if not penalty or name == "MLR":
        return tables_like(*always.get(name, []))
    return tables_like("embedding_dict.*") if name == "AutoInt" else all_tables


def cases(penalty: bool) -> list[Case]:
    history = {"penalty": penalty, "history_feature_list": ["item"]}
    evolving = {"use_negsampling": True, "gru_type": "AUGRU", "dtype": torch.float32}  # it makes float32 masks
    return [
        *(make_case(name, columns_for(name), penalty=penalty) for name in CLICK_MODELS),
        *(make_case(name, sequence_columns, **history) for name in SEQUENCE_MODELS),
        make_case("DIEN", sequence_columns, title="DIEN with negatives", **history, **evolving),
        *(make_case(name, click_columns, penalty=penalty, tasks=2) for name in MULTI_TASK_MODELS),
    ]


CASES = [*cases(penalty=False), *cases(penalty=True)]
