"""Optimizers, options and gradients that managed tables do not take, and the errors that say so."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam

from adaloader import AdaLoader, UnsupportedOptimizerError
from tests.adaloader.against_plain import assert_same_as_plain, weigh
from tests.adaloader.two_tables import DIM, ROWS, USUAL, Model, Sparse, batches


class Odd(SGD):
    def step(self, closure=None):
        return super().step(closure)


REFUSED = {
    "LBFGS": (lambda p: torch.optim.LBFGS(p), "LBFGS"),
    "ASGD": (lambda p: torch.optim.ASGD(p), "ASGD"),
    "Rprop": (lambda p: torch.optim.Rprop(p), "Rprop"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p), "sparse=False"),
    "a step of its own": (lambda p: Odd(p, lr=0.1), "Odd"),
}


@pytest.mark.parametrize(("make", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_optimizers_are_named_before_anything_changes(make, named):
    model = Model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = make(model.parameters())
    with pytest.raises(UnsupportedOptimizerError) as raised:
        AdaLoader.wrap([torch.zeros(2, 2, dtype=torch.int64)], model=model, optimizer=optimizer, min_rows=1)
    text = str(raised.value)
    assert named in text and "emb.weight" in text and "SGD" in text and "Adagrad" in text
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_differentiable_optimizers_are_refused(kind):
    model = Model()
    with pytest.raises(UnsupportedOptimizerError, match=r"emb\.weight.*differentiable=True.*leave it out"):
        AdaLoader.wrap(
            batches(0), model=model, optimizer=kind(model.parameters(), lr=0.1, differentiable=True), min_rows=1
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Adam(p),
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.RAdam(p),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.Adamax(p),
        lambda p: Adagrad(p, weight_decay=0.1),
        lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_what_pytorch_refuses_of_sparse_gradients_is_refused_before_anything_changes(make):
    model = Sparse()
    optimizer = make(model.parameters())
    weigh(model(batches(0, 1)[0])).backward()
    with pytest.raises(RuntimeError):
        optimizer.step()
    model.zero_grad()
    with pytest.raises(UnsupportedOptimizerError, match=r"emb\.weight.*'emb' has sparse=True.*set sparse=False"):
        AdaLoader.wrap(batches(0), model=model, optimizer=make(model.parameters()), min_rows=1)
    assert type(model.emb.weight) is nn.Parameter


class Bare(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.table, self.sparse = nn.Parameter(torch.randn(ROWS, DIM)), sparse

    def forward(self, ids):
        return nn.functional.embedding(ids, self.table, sparse=self.sparse)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_lookup_of_a_bare_parameter_with_the_wrong_kind_of_gradient_is_refused(sparse):
    model = Bare(sparse)
    optimizer = Adam(model.parameters()) if sparse else torch.optim.SparseAdam(model.parameters())
    loader = AdaLoader.wrap(batches(0), model=model, optimizer=optimizer, min_rows=1)
    with pytest.raises(UnsupportedOptimizerError, match=f"'table': embedding has sparse={sparse}"):
        for batch in loader:
            model(batch)
    with torch.no_grad():
        model(batches(0)[0])
    loader.close()


def test_subclasses_that_only_set_defaults_are_known(seed):
    class Mine(torch.optim.AdamW):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.03, weight_decay=0.2)

    assert_same_as_plain(Model, Mine, batches(seed), USUAL)


CHANGES = {
    "momentum": (lambda p: SGD(p, lr=0.1), "momentum", 0.9),
    "momentum beside weight decay": (lambda p: SGD(p, lr=0.1, weight_decay=0.1), "momentum", 0.9),
    "Adagrad's weight decay": (lambda p: Adagrad(p, lr=0.1), "weight_decay", 0.1),
    "amsgrad": (lambda p: Adam(p), "amsgrad", True),
    "centered": (lambda p: torch.optim.RMSprop(p), "centered", True),
    "RMSprop's momentum": (lambda p: torch.optim.RMSprop(p), "momentum", 0.5),
}


@pytest.mark.parametrize(("make", "name", "value"), CHANGES.values(), ids=CHANGES.keys())
def test_options_that_need_other_state_are_refused_when_they_change(make, name, value):
    model = Model()
    optimizer = make(model.parameters())
    loader = AdaLoader.wrap(batches(0), model=model, optimizer=optimizer, min_rows=1)
    weigh(model(batches(0)[0])).backward()
    optimizer.step()
    before = model.state_dict()
    optimizer.param_groups[0][name] = value
    with pytest.raises(UnsupportedOptimizerError, match=f"emb.weight.*{name}={value}.*before the loader is built"):
        optimizer.step()
    assert all(torch.equal(each, before[of]) for of, each in model.state_dict().items())
    loader.close()


def test_any_optimizer_may_train_the_rest_of_the_model():
    model = Model()
    model.emb.weight.requires_grad_(False)
    model.other.weight.requires_grad_(False)
    optimizer = Adam(model.linear.parameters())
    loader = AdaLoader.wrap(batches(0), model=model, optimizer=optimizer, min_rows=1)
    USUAL(model, optimizer, loader)
    loader.close()


def test_a_table_held_by_two_optimizers_is_refused():
    model = Model()
    both = [SGD(model.parameters(), lr=0.1), Adagrad([model.emb.weight], lr=0.1)]
    with pytest.raises(ValueError, match=r"emb\.weight.*one optimizer"):
        AdaLoader.wrap(batches(0), model=model, optimizer=both, min_rows=1)


def test_a_gradient_without_an_optimizer_is_an_error():
    model = Model()
    loader = AdaLoader.wrap(batches(0), model=model, min_rows=1)
    with pytest.raises(RuntimeError, match=r"emb\.weight|other\.weight"):
        weigh(model(batches(0)[0])).backward()
    model.requires_grad_(False)
    assert not model(batches(0)[0]).requires_grad
    loader.close()


def test_options_changed_to_unsupported_ones_later_are_refused():
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = AdaLoader.wrap(batches(0), model=model, optimizer=optimizer, min_rows=1)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    weigh(model(batches(0)[0])).backward()
    with pytest.raises(UnsupportedOptimizerError, match=r"weight_decay=0\.1"):
        optimizer.step()
    loader.close()


def test_a_step_without_any_gradient_changes_nothing_but_dense_state(seed):
    def loop(model, optimizer, loader):
        for number, batch in enumerate(loader):
            if number % 2:
                weigh(model(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.step()
        return []

    assert_same_as_plain(Model, lambda p: Adagrad(p, lr=0.2, lr_decay=0.5), batches(seed), loop)
