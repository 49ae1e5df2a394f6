"""Taking tables over: what optimizers hold by then, declared tables, and parameters that cannot become tables."""

import copy

import pytest
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader, DeferredInitError
from adaloader.overrides.constant import constant_tensor
from tests.training import OPTIMIZERS, Shop, Visits, assert_same_optimizer_state, assert_same_tensors, train


def load(model, optimizer, data, **options):
    return AdaLoader(data, batch_size=5, model=model, optimizer=optimizer, min_rows=1, **options)


def declared_shop(**options):
    with adaloader.deferred_init(min_rows=2, **options):
        return Shop()


def plain_twin(model, make_optimizer):
    """A plain model with the values that `model` has, and its optimizer."""
    twin = Shop()
    twin.load_state_dict(model.state_dict())
    return twin, make_optimizer(twin.parameters())


def batches(data):
    return torch.utils.data.DataLoader(data, batch_size=5)


# --- state that an optimizer holds ---


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_state_of_earlier_steps_is_taken_in(seed, steps):
    data = Visits(33, seed)
    torch.manual_seed(seed)
    model = Shop()
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    twin = Shop()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = OPTIMIZERS["adagrad"](twin.parameters())
    for _ in range(steps):
        train(model, optimizer, batches(data)), train(twin, twin_optimizer, batches(data))
    loader = load(model, optimizer, data)
    train(model, optimizer, loader)
    assert all(value.untyped_storage().nbytes() <= 8 for value in optimizer.state[model.user.weight].values())
    train(twin, twin_optimizer, batches(data))
    assert_same_tensors(model.state_dict(), twin.state_dict())
    assert_same_optimizer_state(optimizer.state_dict(), twin_optimizer.state_dict())


@pytest.mark.parametrize("where", ["inside the context", "after it", "after the loader"])
def test_rows_start_from_the_state_that_the_optimizer_was_built_with(seed, where):
    """Its hyperparameter may be another by the time a row is first touched; PyTorch reads it once."""

    def build(parameters):
        return torch.optim.Adagrad(parameters, lr=0.2, initial_accumulator_value=0.37)

    data = Visits(33, seed)
    if where == "inside the context":
        with adaloader.deferred_init(min_rows=2, seed=seed):
            model = Shop()
            optimizer = build(model.parameters())
    else:
        model = declared_shop(seed=seed)
        optimizer = build(model.parameters()) if where == "after it" else None
    loader = load(model, optimizer, data)
    if optimizer is None:
        optimizer = build(model.parameters())
        loader = load(model, optimizer, data)
    optimizer.param_groups[0]["initial_accumulator_value"] = 5.0
    twin, twin_optimizer = plain_twin(model, build)
    twin_optimizer.param_groups[0]["initial_accumulator_value"] = 5.0
    train(model, optimizer, loader), train(twin, twin_optimizer, batches(data))
    assert_same_tensors(model.state_dict(), twin.state_dict())
    assert_same_optimizer_state(optimizer.state_dict(), twin_optimizer.state_dict())


def test_an_optimizer_given_to_a_later_loader_brings_its_state(seed):
    data = Visits(33, seed)
    torch.manual_seed(seed)
    model = Shop()
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    train(model, optimizer, batches(data))
    twin, twin_optimizer = plain_twin(model, OPTIMIZERS["adagrad"])
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    evaluation = load(model, None, data)
    with torch.no_grad():
        for batch in evaluation:
            torch.testing.assert_close(model(batch), twin(batch))
    loader = load(model, optimizer, data)
    train(model, optimizer, loader), train(twin, twin_optimizer, batches(data))
    assert_same_tensors(model.state_dict(), twin.state_dict())
    assert_same_optimizer_state(optimizer.state_dict(), twin_optimizer.state_dict())


def test_deferred_state_that_is_no_constant_is_refused():
    with adaloader.deferred_init(min_rows=2, seed=0):
        model = Shop()
        optimizer = OPTIMIZERS["adagrad"](model.parameters())
        optimizer.state[model.user.weight]["sum"].uniform_(1, 2)
    with pytest.raises(adaloader.UnsupportedOptimizerError, match=r"'sum' \[41, 4\] is a deferred tensor"):
        load(model, optimizer, Visits(5, 0))


# --- declared tables ---


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_a_declared_model_trains_as_a_plain_one_that_starts_alike(seed, kind):
    data = Visits(33, seed)
    model = declared_shop(seed=seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    loader = load(model, optimizer, data)
    twin, twin_optimizer = plain_twin(model, OPTIMIZERS[kind])
    assert torch.equal(twin.user.weight[0], torch.zeros(4).double())
    assert 0.8 < twin.item.weight.std() < 1.2
    train(model, optimizer, loader), train(twin, twin_optimizer, batches(data))
    assert_same_tensors(model.state_dict(), twin.state_dict())
    assert_same_optimizer_state(optimizer.state_dict(), twin_optimizer.state_dict())


def test_a_seed_decides_and_none_is_drawn_from(seed):
    first, again, other = (declared_shop(seed=s) for s in (seed, seed, seed + 1))
    for model in (first, again, other):
        load(model, None, Visits(5, 0))
    a, b, c = (model.state_dict() for model in (first, again, other))
    assert torch.equal(a["item.weight"], b["item.weight"]) and not torch.equal(a["item.weight"], c["item.weight"])
    assert not torch.equal(a["item.weight"][:41], a["user.weight"])


@pytest.mark.parametrize("seed", [-(1 << 63), -1, 0, (1 << 64) - 1])
def test_every_seed_of_64_bits_will_do(seed):
    model = declared_shop(seed=seed)
    load(model, None, Visits(5, 0))
    assert torch.isfinite(model.state_dict()["item.weight"]).all()


def test_declared_rows_without_a_value_are_refused_at_construction():
    with adaloader.deferred_init(min_rows=2):
        model = Shop()
        model.bare = nn.Parameter(torch.empty(30, 4, dtype=torch.float64))
        with torch.no_grad():
            model.bare[:10].normal_()
    with pytest.raises(DeferredInitError, match=r"rows 10 to 29 of table 'bare' \[30, 4\].*test_adoption.py"):
        load(model, None, Visits(5, 0))
    nn.init.ones_(model.bare)  # nothing was taken over yet
    load(model, None, Visits(5, 0))
    assert torch.equal(model.state_dict()["bare"], torch.ones(30, 4).double())


def test_a_declared_tensor_that_is_no_parameter_is_refused():
    with adaloader.deferred_init(min_rows=2):
        model = Shop()
        model.register_buffer("memory", torch.zeros(30, 4))
    with pytest.raises(DeferredInitError, match=r"buffer 'memory' \[30, 4\]"):
        load(model, None, Visits(5, 0))
    with adaloader.deferred_init(min_rows=2):
        model = Shop()
        model.part = nn.Parameter(torch.zeros(30, 4)[:10])
    with pytest.raises(DeferredInitError, match=r"parameter 'part' \[10, 4\] is a view"):
        load(model, None, Visits(5, 0))


def test_a_table_once_taken_over_cannot_be_initialised_through_an_old_alias():
    model = declared_shop()
    alias = model.item.weight.detach()
    load(model, None, Visits(5, 0))
    with pytest.raises(DeferredInitError, match="a loader manages the table by now"):
        alias.normal_()


# --- memory that two tensors share ---


def test_two_parameters_over_one_memory_are_refused():
    model = Shop()
    model.related.weight = nn.Parameter(model.item.weight.data)
    with pytest.raises(
        ValueError, match="'item.weight' and table 'related.weight' are two tensors over the same memory"
    ):
        load(model, None, Visits(5, 0))
    with adaloader.deferred_init(min_rows=2):
        model = Shop()
        model.related.weight = nn.Parameter(model.item.weight.data)
    with pytest.raises(ValueError, match="'item.weight' and table 'related.weight'"):
        load(model, None, Visits(5, 0))
    model = Shop()
    model.register_buffer("first_rows", model.user.weight.detach()[:3])
    with pytest.raises(ValueError, match="'first_rows' and table 'user.weight'"):
        load(model, None, Visits(5, 0))


def test_neighbours_in_one_memory_are_not_two_tensors_over_it(seed):
    """As after `vector_to_parameters`, and as flattening optimizers leave them."""
    model = Shop()
    vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, model.parameters())
    before = copy.deepcopy(model.state_dict())
    load(model, None, Visits(5, 0))
    assert_same_tensors(model.state_dict(), before, 0)


def test_a_table_of_two_models_with_two_loaders_is_refused():
    first, second = Shop(), Shop()
    second.item.weight = second.related.weight = first.item.weight
    load(first, None, Visits(5, 0))
    with pytest.raises(ValueError, match=r"table 'item.weight' \[53, 4\] is managed already"):
        load(second, None, Visits(5, 0))


def test_a_table_of_another_dtype_stays_dense(caplog):
    model = Shop()
    model.tags = nn.EmbeddingBag(20, 4, dtype=torch.bfloat16)
    load(model, None, Visits(5, 0))
    assert "table 'tags.weight' stays dense: its dtype is torch.bfloat16" in caplog.text
    assert type(model.tags.weight) is nn.Parameter


def test_an_expanded_tensor_is_no_declared_one(seed):
    """A table that is one number everywhere has that value in every row."""
    model = Shop()
    model.item.weight = nn.Parameter(constant_tensor((53, 4), 0.5, dtype=torch.float64, device="cpu"))
    model.related.weight = model.item.weight
    load(model, None, Visits(5, 0))
    assert torch.equal(model.state_dict()["related.weight"], torch.full((53, 4), 0.5).double())


@pytest.mark.parametrize("built", [lambda: nn.Linear(4, 1), lambda: nn.Embedding(60, 4)], ids=["Linear", "Embedding"])
def test_building_a_loader_computes_no_parametrization(built):
    """What a module's `weight` is computed from may change each time that it is (`spectral_norm`)."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return weight

    other = built()
    nn.utils.parametrize.register_parametrization(other, "weight", Counted())
    model = nn.ModuleList([nn.Embedding(60, 4), other])
    before = Counted.calls
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader([1, 2], model=model, optimizer=optimizer, min_rows=1, keys={"0": lambda batch: batch})
    str(loader.explain())
    assert Counted.calls == before
    loader.close()
