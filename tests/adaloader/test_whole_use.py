"""Tables used as a whole: in training they become dense, without gradient they are read, and writes to them count."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader, ManagedTableError, deferred_init, full_state_dict
from adaloader.tables.table_parameter import TableParameter
from tests.adaloader.against_plain import assert_same_as_plain

ROWS, DIM = 37, 4


class Tied(nn.Module):
    """Looks up, and uses the same table as its output layer."""

    def __init__(self, penalty=0.0, first_dense_step=0):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM)
        self.other = nn.Embedding(ROWS, DIM)
        self.hidden = nn.Linear(DIM, DIM)
        self.first_dense_step = first_dense_step
        self.step = 0

    def forward(self, ids):
        x = self.hidden(self.emb(ids) + self.other(ids))
        if self.step >= self.first_dense_step:
            return F.linear(x, self.emb.weight).logsumexp(-1)
        return x.sum(-1)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.02),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.02, momentum=0.5, centered=True),
}


def batches(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (5, 2), generator=generator) for _ in range(count)]


def train(model, optimizer, loader):
    losses = []
    for ids in loader:
        loss = model(ids).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.step = getattr(model, "step", 0) + 1
        losses.append(loss)
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first_dense_step", [0, 1, 3])
def test_a_tied_table_becomes_dense_whenever_that_is_seen(seed, name, first_dense_step):
    models = []

    def make():
        models.append(Tied(first_dense_step=first_dense_step))
        return models[-1]

    assert_same_as_plain(make, OPTIMIZERS[name], batches(seed), train)
    assert type(models[-1].emb.weight) is nn.Parameter
    assert type(models[-1].other.weight) is TableParameter


@pytest.mark.parametrize(
    "penalty",
    [
        lambda w: w.norm(),
        lambda w: w.square().sum() * 0.1,
        lambda w: sum(p.abs().sum() for p in [w]),
        lambda w: F.cosine_similarity(w, w.roll(1, 0)).mean(),
    ],
)
def test_a_penalty_on_the_table(seed, penalty):
    def loop(model, optimizer, loader):
        for ids in loader:
            loss = model.hidden(model.emb(ids)).square().mean() + penalty(model.emb.weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss

    assert_same_as_plain(Tied, OPTIMIZERS["adagrad"], batches(seed), loop)


def test_accumulated_gradients_go_along(seed):
    """Two backwards without, then one with a use of the whole table, then the step."""

    def loop(model, optimizer, loader):
        for number, ids in enumerate(loader):
            x = model.hidden(model.emb(ids))
            loss = x.square().mean() if number % 3 < 2 else (x @ model.emb.weight.T).square().mean()
            loss.backward()
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            yield loss

    assert_same_as_plain(Tied, OPTIMIZERS["adagrad"], batches(seed), loop)


def test_why_it_is_dense_is_known(seed):
    model = Tied()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = AdaLoader.wrap(batches(seed), model=model, optimizer=optimizer, min_rows=1)
    train(model, optimizer, loader)
    (why,) = loader._session.managed.dense_because.values()
    assert "linear at" in why and __file__ in why
    loader.close()


def test_a_deferred_table_says_where_it_was_used(seed):
    with deferred_init(min_rows=ROWS):
        model = Tied()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = AdaLoader.wrap(batches(seed), model=model, optimizer=optimizer)
    with pytest.raises(ManagedTableError, match=r"linear at .*test_whole_use.py:\d+ .*'emb.weight'.*deferred_init"):
        train(model, optimizer, loader)
    loader.close()


# --- strategy= ---


def made(strategy, min_rows=1, **keywords):
    model = Tied()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = AdaLoader.wrap(
        batches(1), model=model, optimizer=optimizer, min_rows=min_rows, strategy=strategy, **keywords
    )
    return model, optimizer, loader


def test_strategy_decides():
    model, optimizer, loader = made({"emb": "dense", "other.weight": "managed"}, min_rows=1000)
    assert type(model.emb.weight) is nn.Parameter and type(model.other.weight) is TableParameter
    train(model, optimizer, loader)
    loader.close()
    model, optimizer, loader = made({"emb.weight": "managed"})
    with pytest.raises(ManagedTableError, match="strategy"):
        train(model, optimizer, loader)
    loader.close()


def test_strategy_makes_a_table_of_a_bare_parameter():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.randn(ROWS, DIM))

        def forward(self, ids):
            return self.rows[ids]

    model = Bare()
    loader = AdaLoader.wrap(
        batches(1),
        model=model,
        optimizer=OPTIMIZERS["sgd"](model.parameters()),
        strategy={"rows": "managed"},
    )
    assert type(model.rows) is TableParameter
    loader.close()


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        ({"nothing": "dense"}, ValueError, "'nothing'.*no parameter"),
        ({"emb": "sparse"}, ValueError, "'emb'.*'sparse'"),
        ("dense", TypeError, "strategy must map"),
        ({1: "dense"}, TypeError, "strategy must map"),
        ({"hidden.bias": "managed"}, ValueError, "hidden.bias.*two dimensions"),
        ({"emb": "managed", "emb.weight": "dense"}, ValueError, "both"),
    ],
)
def test_bad_strategies(strategy, error, message):
    with pytest.raises(error, match=message):
        made(strategy)


def test_later_loaders_share_the_strategy():
    model, optimizer, loader = made({"emb": "dense"})
    AdaLoader.wrap(batches(2), model=model, min_rows=1).close()
    AdaLoader.wrap(batches(2), model=model, min_rows=1, strategy={"emb.weight": "dense"}).close()
    with pytest.raises(ValueError, match="first loader had strategy"):
        AdaLoader.wrap(batches(2), model=model, min_rows=1, strategy={"emb": "managed"})
    loader.close()


# --- reading without gradient ---

READS = {
    "no_grad norm": lambda w: torch.no_grad()(lambda: w.norm())(),
    "detach sum": lambda w: w.detach().sum(0),
    "data mean": lambda w: w.data.mean(),
    "scores": lambda w: w.data @ w.data.T,
    "cdist": lambda w: torch.cdist(w.detach()[:3], w.detach()),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "clone": lambda w: w.data.clone(),
    "isnan": lambda w: torch.isnan(w).any(),
    "compare": lambda w: (w == w).all(),
    "view": lambda w: w.data.view(-1),
    "vector": lambda w: nn.utils.parameters_to_vector([w.data]),
    "topk": lambda w: torch.topk(w.detach()[:, 0], 3).values,
    "mask": lambda w: w.detach()[torch.arange(ROWS) % 2 == 0],
    "columns": lambda w: w.detach()[:, 1:],
    "copied out": lambda w: torch.empty(ROWS, DIM).copy_(w.detach()),
    "foreach": lambda w: torch._foreach_norm([w.detach()])[0],
    "tolist": lambda w: torch.tensor(w.tolist()),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_the_whole_table(read, trained):
    torch.manual_seed(3)
    model = Tied(first_dense_step=100)
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    loader = AdaLoader.wrap(batches(3), model=model, optimizer=optimizer, min_rows=1)
    if trained:
        train(model, optimizer, loader), train(twin, twin_optimizer, batches(3))
    torch.testing.assert_close(read(model.emb.weight), read(twin.emb.weight), atol=1e-6, rtol=1e-6)
    assert type(model.emb.weight) is TableParameter
    loader.close()


def test_what_was_read_cannot_be_written():
    model, _, loader = made(None)
    with torch.no_grad():
        for write in (
            lambda: model.emb.weight[3][:1].zero_(),
            lambda: torch._foreach_add_([model.emb.weight.data], 1.0),
        ):
            with pytest.raises(ManagedTableError, match=r"emb\.weight"):
                write()
    loader.close()


# --- writing ---


def normalise_by_data(model):
    model.emb.weight.data = F.normalize(model.emb.weight.data, dim=-1)


def normalise_in_place(model):
    weight = model.emb.weight.data
    weight.div_(weight.norm(dim=1, keepdim=True))


def renorm_in_place(model):
    model.emb.weight.data.renorm_(2, 0, 0.7)


def normalise_out(model):
    F.normalize(model.emb.weight.data, p=2, dim=-1, out=model.emb.weight.data)


def clamp(model):
    with torch.no_grad():
        model.emb.weight.clamp_(-0.5, 0.5)


def padding_row(model):
    with torch.no_grad():
        model.emb.weight[0] = 0
        model.emb.weight[[3, 5]] = torch.ones(2, DIM, dtype=model.emb.weight.dtype)
        model.emb.weight[7:9, 1] = 2.0
        model.emb.weight.data[torch.tensor([-1])] = 3.0
        model.emb.weight.data[torch.arange(ROWS) % 11 == 4] = -1.0


def touched_rows(model):
    ids = torch.tensor([3, 1, 3, 8])
    model.emb.weight.data[ids] = F.normalize(model.emb.weight.data[ids], dim=-1)


def index_functions(model):
    weight, ids = model.emb.weight.data, torch.tensor([4, 2])
    weight.index_fill_(0, ids, 0.25)
    weight.index_add_(0, ids, torch.ones(2, DIM, dtype=weight.dtype), alpha=0.5)
    weight.index_copy_(0, torch.tensor([9]), torch.full((1, DIM), 0.125, dtype=weight.dtype))


def decay(model):
    with torch.no_grad():
        model.emb.weight *= 0.9
        model.emb.weight.sub_(0.01 * torch.arange(DIM))


def noise(model):
    model.emb.weight.data.add_(torch.linspace(-1, 1, ROWS * DIM, dtype=model.emb.weight.dtype).view(ROWS, DIM))


def init_again(model):
    nn.init.uniform_(model.emb.weight, -0.1, 0.1)


def whole_assignment(model):
    with torch.no_grad():
        model.emb.weight[:] = model.emb.weight * 2
        model.emb.weight[...] = model.emb.weight - 0.1


def columns(model):
    with torch.no_grad():
        model.emb.weight[:, 1] = 0.5


def state_dict_again(model):
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


WRITES = [
    normalise_by_data,
    normalise_in_place,
    renorm_in_place,
    normalise_out,
    clamp,
    padding_row,
    touched_rows,
    index_functions,
    decay,
    noise,
    init_again,
    whole_assignment,
    columns,
    state_dict_again,
]


@pytest.mark.parametrize("when", ["before training", "after each step", "between forward and backward"])
@pytest.mark.parametrize("name", ["adagrad", "adamw", "momentum"])
@pytest.mark.parametrize("write", WRITES)
def test_writes_count(seed, write, name, when):
    def loop(model, optimizer, loader):
        if when == "before training":
            write(model)
        for ids in loader:
            loss = model.hidden(model.emb(ids) + model.other(ids)).square().mean()
            if when == "between forward and backward" and write is not state_dict_again:  # which changes dense ones too
                write(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if when == "after each step":
                write(model)
            yield loss

    assert_same_as_plain(lambda: Tied(first_dense_step=100), OPTIMIZERS[name], batches(seed), loop)


def test_writes_to_deferred_tables_reach_rows_made_later():
    with deferred_init(min_rows=ROWS, seed=2):
        model = Tied(first_dense_step=100)
    loader = AdaLoader.wrap(batches(1), model=model, optimizer=OPTIMIZERS["sgd"](model.parameters()))
    everything = torch.arange(ROWS)
    some = model.emb(everything[:5]).detach()
    with torch.no_grad():
        model.emb.weight.mul_(2).clamp_(-1, 1)
    after = model.emb(everything).detach()
    assert torch.equal(after[:5], (some * 2).clamp(-1, 1)) and after.abs().max() <= 1
    assert torch.equal(full_state_dict(model)["emb.weight"], after)
    loader.close()


def test_rows_that_an_optimizer_moves_but_nobody_holds_cannot_be_written(seed):
    with deferred_init(min_rows=ROWS, seed=2):
        model = Tied(first_dense_step=100)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    loader = AdaLoader.wrap([torch.tensor([[1, 2]])], model=model, optimizer=optimizer)
    train(model, optimizer, loader)
    before = full_state_dict(model)["emb.weight"].clone()
    with pytest.raises(ManagedTableError, match=r"mul_.*emb\.weight.*deferred_init"), torch.no_grad():
        model.emb.weight.mul_(2)
    assert torch.equal(full_state_dict(model)["emb.weight"], before)
    loader.close()


def test_writes_while_gradients_are_recorded_are_refused():
    model, _, loader = made(None)
    for write in (lambda w: w.mul_(2), lambda w: w.__setitem__(0, 1.0), lambda w: nn.init._no_grad_fill_ and w.zero_()):
        with pytest.raises(ManagedTableError, match=r"emb\.weight.*no_grad"):
            write(model.emb.weight)
    assert type(model.emb.weight) is TableParameter
    loader.close()


# --- copies ---


@pytest.mark.parametrize("trained", [False, True])
def test_copies_are_plain_models_of_their_own(seed, trained):
    torch.manual_seed(seed)
    model = Tied(first_dense_step=100)
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    loader = AdaLoader.wrap(batches(seed), model=model, optimizer=optimizer, min_rows=1)
    if trained:
        train(model, optimizer, loader)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        torch.optim.swa_utils.AveragedModel(model).module,
    ]
    train(model, optimizer, loader)
    assert not torch.equal(model.state_dict()["emb.weight"], state["emb.weight"])
    for other in copies:
        assert type(other.emb.weight) is nn.Parameter and other.emb.weight.requires_grad
        torch.testing.assert_close(dict(other.state_dict()), state, atol=0, rtol=0)
        assert torch.equal(other(batches(seed)[0]), copies[0](batches(seed)[0]))
    other = copies[0]
    train(other, OPTIMIZERS["sgd"](other.parameters()), batches(seed))  # a copy trains by itself
    model.load_state_dict(copies[1].state_dict())
    torch.testing.assert_close(dict(model.state_dict()), state, atol=0, rtol=0)
    loader.close()


def test_a_tied_parameter_is_tied_in_the_copy():
    model = Tied(first_dense_step=100)
    model.other.weight = model.emb.weight
    loader = AdaLoader.wrap(batches(1), model=model, optimizer=OPTIMIZERS["sgd"](model.parameters()), min_rows=1)
    other = copy.deepcopy(model)
    assert other.other.weight is other.emb.weight
    loader.close()


def test_an_average_of_weights(seed):
    def loop(model, optimizer, loader):
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        yield from train(model, optimizer, _each(loader, lambda: averaged.update_parameters(model)))
        yield averaged.module.emb.weight

    assert_same_as_plain(lambda: Tied(first_dense_step=100), OPTIMIZERS["sgd"], batches(seed), loop)


def _each(loader, call):
    for batch in loader:
        yield batch
        call()


def test_a_read_after_a_lookup_that_scales_rows_down():
    model = nn.Embedding(ROWS, DIM, max_norm=0.5)
    loader = AdaLoader.wrap([torch.arange(5)] * 2, model=model, min_rows=1)
    with torch.no_grad():
        for ids in loader:
            model(ids)
            model.weight.clone()  # which is kept until rows change
            model(ids + 9)
            norms = model.weight.norm(dim=1)
            assert norms[9:14].max() <= 0.5
    loader.close()
