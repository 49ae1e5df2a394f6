"""What deferred tables refuse, and the operation, line and remedy that the error names."""

import inspect
import io
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaloader.deferred.context import (
    DeferredInitError,
    deferred_init,
    program_of,
)
from tests.adaloader.deferred_tables import D, N, declared

# --- what is refused ---

REFUSED_INITIALISATION = {
    "nn.init.orthogonal_": nn.init.orthogonal_,
    "nn.init.sparse_": lambda w: nn.init.sparse_(w, 0.1),
    "nn.init.eye_": nn.init.eye_,
    "exponential_": lambda w: w.exponential_(),
    "bernoulli_": lambda w: w.bernoulli_(),
    "log_normal_": lambda w: w.log_normal_(),
    "random_": lambda w: w.random_(),
    "copy_": lambda w: w.copy_(torch.ones(D)),
    "data.__set__": lambda w: setattr(w, "data", torch.ones(1, D).expand(N, D)),
    "mul_": lambda w: w.mul_(torch.ones(D)),
    "div_": lambda w: w.div_(2.0, rounding_mode="floor"),
    "add_": lambda w: w.add_(w),
    "pow_": lambda w: w.pow_(2),
    "renorm_": lambda w: w.renorm_(2, 0, 1.0),
    "__setitem__": lambda w: w.__setitem__(torch.tensor([1, 2]), 0.0),
    "__setitem__ ": lambda w: w.__setitem__((slice(None), 0), 0.0),
    "__setitem__  ": lambda w: w.__setitem__(slice(0, 10, 2), 0.0),
    "__setitem__   ": lambda w: w.__setitem__(0, torch.ones(D)),
    "__setitem__    ": lambda w: w.__setitem__(True, 0.0),
    "normalize": lambda w: F.normalize(w),
    "linalg": lambda w: torch.linalg.svd(w),
    "half": lambda w: w.half(),
    "view": lambda w: w.view(-1),
    "cat": lambda w: torch.cat([w, w]),
    "uniform_": lambda w: w.uniform_(2.0, 1.0),
}


@pytest.mark.parametrize("name", REFUSED_INITIALISATION)
def test_initialisation_that_is_not_row_by_row(name):
    with deferred_init(seed=0):
        weight = torch.randn(N, D)
        with pytest.raises(DeferredInitError) as caught:
            REFUSED_INITIALISATION[name](weight)
    message = str(caught.value)
    assert name.strip().removeprefix("nn.init.").split(".")[0] in message
    function = REFUSED_INITIALISATION[name]
    line = function.__code__.co_firstlineno if function.__name__ == "<lambda>" else r"\d+"
    assert re.search(rf" at {re.escape(__file__)}:{line} cannot be done row by row", message)
    assert "min_rows" in message and f"[{N}, {D}]" in message


def test_the_line_of_an_initialisation_is_the_users():
    weight = declared(lambda: nn.Parameter(torch.empty(N, D)))
    with pytest.raises(DeferredInitError) as caught:
        nn.init.orthogonal_(weight)
    line = inspect.currentframe().f_lineno - 1
    assert f"torch.nn.init.orthogonal_ (in torch.linalg.qr) at {__file__}:{line}" in str(caught.value)


USES = {
    "embedding": lambda w: F.embedding(torch.tensor([1]), w),
    "embedding_bag": lambda w: F.embedding_bag(torch.tensor([[1]]), w),
    "index_select": lambda w: w.index_select(0, torch.tensor([1])),
    "__getitem__": lambda w: w[torch.tensor([1])],
    "linear": lambda w: F.linear(torch.ones(2, D), w),
    "matmul": lambda w: torch.ones(2, N) @ w,
    "sum": lambda w: w.sum(),
    "norm": lambda w: w.norm(),
    "mul": lambda w: w * 2.0,
    "clone": lambda w: w.clone(),
    "numpy": lambda w: w.detach().numpy(),
    "tolist": lambda w: w.tolist(),
    "item": lambda w: w.detach()[0].max().item(),
    "data_ptr": lambda w: w.data_ptr(),
    "__iter__": lambda w: list(w),
    "__reduce_ex__": lambda w: torch.save(w, io.BytesIO()),
    "_foreach_add": lambda w: torch._foreach_add([w, w], 1.0),
    "rand_like": lambda w: torch.rand_like(w),
}


@pytest.mark.parametrize("name", USES)
def test_use_before_a_loader_names_the_remedy(name):
    weight = declared(lambda: nn.Embedding(N, D)).weight
    with pytest.raises(DeferredInitError) as caught:
        USES[name](weight)
    message = str(caught.value)
    assert "construct AdaLoader(model=model, ...) before the model runs" in message
    assert f"{__file__}:" in message
    assert {"item": "max", "__iter__": "unbind"}.get(name, name) in message


def test_a_model_run_inside_the_context_names_both_remedies():
    with deferred_init(seed=0):
        layer = nn.Embedding(N, D)
        with pytest.raises(DeferredInitError, match=r"embedding at .*min_rows.*construct AdaLoader"):
            layer(torch.tensor([1]))


def test_leaves_that_require_a_gradient_change_under_no_grad_only():
    weight = declared(lambda: nn.Parameter(torch.randn(N, D)))
    for change in (lambda w: w.mul_(2.0), lambda w: w.__setitem__(0, 0.0), lambda w: w[0].zero_()):
        with pytest.raises(RuntimeError):
            change(weight)
        with pytest.raises(RuntimeError):
            change(nn.Parameter(torch.randn(3, D)))
    assert program_of(weight).describe().endswith("normal(0.0, 1.0)")
