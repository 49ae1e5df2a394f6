"""The user's own optimizer on managed rows, against the same optimizer in plain PyTorch."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam

from adaloader import AdaLoader, RowwiseAdagrad, deferred_init
from tests.adaloader.against_plain import assert_same_as_plain, weigh
from tests.adaloader.two_tables import DIM, ROWS, USUAL, Model, Sparse, batches

OPTIONS = {
    "SGD": lambda p: SGD(p, lr=0.2),
    "SGD, lr tensor": lambda p: SGD(p, lr=torch.tensor(0.2, dtype=torch.float64)),
    "SGD, maximize": lambda p: SGD(p, lr=0.01, maximize=True),
    "SGD, dampening without momentum": lambda p: SGD(p, lr=0.1, dampening=0.5),
    "SGD, foreach": lambda p: SGD(p, lr=0.1, foreach=True),
    "SGD, one by one": lambda p: SGD(p, lr=0.1, foreach=False),
    "SGD, fused": lambda p: SGD(p, lr=0.1, fused=True),
    "SGD, lr 0": lambda p: SGD(p, lr=0.0),
    "Adagrad": lambda p: Adagrad(p, lr=0.2),
    "Adagrad, lr tensor": lambda p: Adagrad(p, lr=torch.tensor(0.2, dtype=torch.float64)),
    "Adagrad, maximize": lambda p: Adagrad(p, lr=0.05, maximize=True),
    "Adagrad, lr_decay": lambda p: Adagrad(p, lr=0.2, lr_decay=0.3),
    "Adagrad, eps": lambda p: Adagrad(p, lr=0.2, eps=0.5),
    "Adagrad, initial": lambda p: Adagrad(p, lr=0.2, initial_accumulator_value=0.7),
    "Adagrad, all": lambda p: Adagrad(p, lr=0.2, lr_decay=0.1, eps=1e-3, initial_accumulator_value=0.1),
    "Adagrad, foreach": lambda p: Adagrad(p, lr=0.2, foreach=True),
    "Adagrad, fused": lambda p: Adagrad(p, lr=0.2, fused=True),
    "Adagrad, weight_decay": lambda p: Adagrad(p, lr=0.2, weight_decay=0.1, lr_decay=0.1, maximize=True),
    "SGD, momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "SGD, Nesterov": lambda p: SGD(p, lr=0.05, momentum=0.7, nesterov=True, weight_decay=0.02),
    "SGD, dampening": lambda p: SGD(p, lr=0.05, momentum=0.7, dampening=0.4, weight_decay=0.02),
    "SGD, momentum, maximize": lambda p: SGD(p, lr=0.001, momentum=0.7, weight_decay=0.02, maximize=True),
    "SGD, weight_decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "Adam": lambda p: Adam(p, lr=0.05),
    "Adam, lr tensor of float32": lambda p: Adam(p, lr=torch.tensor(0.05, dtype=torch.float32)),
    "Adam, weight_decay": lambda p: Adam(p, lr=0.05, weight_decay=0.1, eps=1e-4),
    "Adam, decoupled": lambda p: Adam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "Adam, AMSGrad": lambda p: Adam(p, lr=0.05, betas=(0.8, 0.7), amsgrad=True, maximize=True),
    "Adam, foreach": lambda p: Adam(p, lr=0.05, foreach=True),
    "Adam, fused": lambda p: Adam(p, lr=0.05, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.2, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05, momentum_decay=0.01, weight_decay=0.1),
    "NAdam, decoupled": lambda p: torch.optim.NAdam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05, betas=(0.8, 0.9)),
    "RAdam, decoupled": lambda p: torch.optim.RAdam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, weight_decay=0.1),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "RMSprop, momentum": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.6, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.7, weight_decay=0.1, maximize=True),
    "rowwise Adagrad": lambda p: RowwiseAdagrad(p, lr=0.1, initial_accumulator_value=0.1, eps=1e-6),
    "rowwise Adagrad, maximize": lambda p: RowwiseAdagrad(p, lr=torch.tensor(0.05), maximize=True),
}
DENSE_KINDS = ["SGD, Nesterov", "Adagrad, weight_decay", "Adam, weight_decay", "AdamW", "NAdam", "RAdam", "Adamax"]
DENSE_KINDS += ["RMSprop, momentum", "Adadelta"]


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(make, seed):
    assert_same_as_plain(Model, make, batches(seed), USUAL)


@pytest.mark.parametrize("kind", ["SGD", "Adagrad, all", *DENSE_KINDS])
def test_float32(kind, seed):
    assert_same_as_plain(Model, OPTIONS[kind], batches(seed), USUAL, dtype=torch.float32)


def groups(kind, parameters):
    emb, other, *dense = parameters
    return kind(
        [{"params": [emb], "lr": 0.3}, {"params": [other], "maximize": True}, {"params": dense, "lr": 0.01}], lr=0.1
    )


@pytest.mark.parametrize("kind", [SGD, Adagrad])
def test_parameter_groups(kind, seed):
    assert_same_as_plain(Model, lambda p: groups(kind, p), batches(seed), USUAL)


SCHEDULES = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "lambda by group": lambda o: torch.optim.lr_scheduler.LambdaLR(
        o, [lambda t: 1 / (1 + t), lambda t: 0.5**t, lambda t: 1.0]
    ),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    "warm-up": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        [3],
    ),
    "cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=20, cycle_momentum=False),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("kind", [SGD, Adagrad])
def test_schedules(schedule, kind, seed):
    def loop(model, optimizer, loader):
        scheduler = schedule(optimizer)
        losses = []
        for batch in loader:
            loss = weigh(model(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss)
        return losses

    assert_same_as_plain(Model, lambda p: groups(kind, p), batches(seed), loop)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.05),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    ],
    ids=["SGD", "AdamW", "NAdam", "RMSprop"],
)
def test_schedules_of_momentum_and_decay(make, seed):
    """One cycle of lr and momentum (or beta1), and a weight decay that begins, changes and ends on the way."""

    def loop(model, optimizer, loader):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=45)
        losses = []
        for number, batch in enumerate(loader):
            optimizer.param_groups[0]["weight_decay"] = [0.0, 0.1, 0.03][number % 3] if number < 25 else 0.0
            loss = weigh(model(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss)
        return losses

    assert_same_as_plain(Model, make, batches(seed, 30), loop)


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_clearing_gradients_to_zeros_or_to_none(kind, seed):
    """A gradient of zeros is one: rows move on; without a gradient nothing moves."""

    def loop(model, optimizer, loader):
        seen = []
        for number, batch in enumerate(loader):
            optimizer.zero_grad(set_to_none=number % 3 == 0)
            if number % 2 == 0:
                weigh(model(batch)).backward()
            optimizer.step()
            with torch.no_grad():
                seen += [model.emb(batch), model.other(torch.arange(ROWS + 5))]
        return seen

    assert_same_as_plain(Model, OPTIONS[kind], batches(seed, 20), loop)


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_rows_after_gaps_of_1_7_and_1000_steps(kind, seed):
    ids = torch.tensor([[3, 4, 5]])

    def loop(model, optimizer, loader):
        first, generator = True, torch.Generator().manual_seed(seed)
        for batch in loader:
            optimizer.zero_grad()
            out = model(batch)
            noise = torch.randn(out.shape, generator=generator)  # at a minimum 0 / 0 would make noise of roundings
            (noise * out).sum().backward()
            optimizer.step()
            if not first and torch.equal(batch, ids):
                optimizer.param_groups[0]["lr"] *= 0.9
            first = False
        return [model.emb(torch.arange(ROWS))]

    def make(parameters):
        optimizer = OPTIONS[kind](parameters)
        (group,) = optimizer.param_groups
        group["lr"] = 0.002
        # Coupled decay divided by its own root swings about zero, and makes noise of roundings: see tests/pm.
        group["weight_decay"] = 0.001 if kind.startswith(("SGD", "Adagrad", "AdamW")) else 0.0
        if "centered" in group:
            group["eps"] = 1e-3
        return optimizer

    data = [ids]
    for gap in (1, 7, 1000):
        data += [torch.tensor([[1, 2, 1]])] * gap + [ids]
    assert_same_as_plain(Model, make, data, loop)


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_max_norm_and_parameter_groups(kind, seed):
    class Limited(Model):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(ROWS, DIM, max_norm=0.8)

    def make(parameters):
        emb, other, *dense = parameters
        optimizer = OPTIONS[kind]([{"params": [emb, other]}, {"params": dense, "lr": 0.003}])
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.5})
        return optimizer

    assert_same_as_plain(Limited, make, batches(seed, 20), USUAL)


@pytest.mark.parametrize("kind", [*DENSE_KINDS, "rowwise Adagrad", "SGD, momentum"])
def test_state_goes_out_and_in_again(kind, seed):
    """Plain, managed with the state that was held, saved, and on in plain PyTorch and in another managed model."""
    torch.set_default_dtype(torch.float64)
    try:
        data = batches(seed, 24)
        torch.manual_seed(seed)
        plain, model = Model(), Model()
        model.load_state_dict(plain.state_dict())
        plain_optimizer, optimizer = (OPTIONS[kind](m.parameters()) for m in (plain, model))
        for each, its in ((plain, plain_optimizer), (model, optimizer)):
            USUAL(each, its, data[:8])
            its.zero_grad()
        USUAL(plain, plain_optimizer, data[8:])
        loader = AdaLoader.wrap(data[8:16], model=model, optimizer=optimizer, min_rows=1)
        USUAL(model, optimizer, loader)
        saved = deepcopy((model.state_dict(), optimizer.state_dict()))
        loader.close()
        for managed in (False, True):
            other = Model()
            its = OPTIONS[kind](other.parameters())
            rest = data[16:]
            if managed:
                rest = AdaLoader.wrap(rest, model=other, optimizer=its, min_rows=1)
            other.load_state_dict(saved[0])
            its.load_state_dict(deepcopy(saved[1]))  # PyTorch goes on in the tensors that it is given
            USUAL(other, its, rest)
            for name, value in plain.state_dict().items():
                torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-10, atol=1e-10)
            for index, entry in plain_optimizer.state_dict()["state"].items():
                for name, value in entry.items():
                    torch.testing.assert_close(its.state_dict()["state"][index][name], value, rtol=1e-9, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_the_state_of_an_optimizer_that_has_not_stepped_starts_anew(seed):
    model = Model().double()
    optimizer = Adam(model.parameters(), lr=0.1)
    unused = deepcopy(optimizer.state_dict())
    loader = AdaLoader.wrap(batches(seed), model=model, optimizer=optimizer, min_rows=1)
    USUAL(model, optimizer, loader)
    optimizer.zero_grad()
    plain = Model().double()
    plain.load_state_dict(model.state_dict())
    optimizer.load_state_dict(unused)
    assert not optimizer.state_dict()["state"]
    plain_optimizer = Adam(plain.parameters(), lr=0.1)
    for each, its in ((model, optimizer), (plain, plain_optimizer)):
        USUAL(each, its, batches(seed + 1))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-11, atol=1e-11)
    loader.close()


@pytest.mark.parametrize("kind", ["AdamW", "SGD, Nesterov", "Adamax", "rowwise Adagrad"])
def test_deferred_tables(kind, seed):
    """Rows made late have moved like the others since the first step; so have those that were never made."""

    def build(deferred):
        torch.manual_seed(seed)
        if not deferred:
            return Model()
        with deferred_init(min_rows=1):
            return Model()

    torch.set_default_dtype(torch.float64)
    try:
        model, plain = build(True), Model()
        optimizer = OPTIONS[kind](model.parameters())
        data = [batch % 9 for batch in batches(seed, 12)] + batches(seed + 1, 6)
        loader = AdaLoader.wrap(data, model=model, optimizer=optimizer, min_rows=1)
        plain.load_state_dict(model.state_dict())  # initial values, of which none is held by then
        assert len(model.emb.weight._managed.table.store) < ROWS
        plain_optimizer = OPTIONS[kind](plain.parameters())
        for each, its, given in ((model, optimizer, loader), (plain, plain_optimizer, data)):
            USUAL(each, its, given)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-10, atol=1e-10)
        for index, entry in plain_optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                torch.testing.assert_close(optimizer.state_dict()["state"][index][name], value, rtol=1e-9, atol=1e-9)
        loader.close()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_adam_moves_the_rows_that_were_looked_up_and_no_others(maximize, seed):
    """Also those whose gradient is zero; not those that a lookup without gradient, or padding, brought along."""

    def run(managed):
        torch.manual_seed(seed)
        model = Sparse().double()
        tables = torch.optim.SparseAdam([model.emb.weight, model.other.weight], lr=0.05, maximize=maximize)
        dense = Adam(model.linear.parameters(), lr=0.01)
        loader = data = batches(seed, 20)
        if managed:
            loader = AdaLoader.wrap(data, model=model, optimizer=[tables, dense], min_rows=1)
        for number, batch in enumerate(loader):
            for optimizer in (tables, dense):
                optimizer.zero_grad()
            weigh(model(batch)).backward()
            if number % 3 == 0:
                weigh(model(batch.flip(0))).backward()
            for optimizer in (tables, dense):
                optimizer.step()
        return model.state_dict(), tables.state_dict()

    ours, theirs = run(True), run(False)
    for name in theirs[0]:
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=1e-11, atol=1e-11)
    for index, entry in theirs[1]["state"].items():
        assert list(ours[1]["state"][index]) == list(entry) and type(ours[1]["state"][index]["step"]) is int
        for name in entry:
            assert_close = torch.testing.assert_close
            assert_close(torch.as_tensor(ours[1]["state"][index][name]), torch.as_tensor(entry[name]))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.05, momentum=0.9),
        lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        lambda p: Adagrad(p, lr=0.05),
        lambda p: RowwiseAdagrad(p, lr=0.05),
    ],
    ids=["momentum", "Nesterov", "Adagrad", "rowwise Adagrad"],
)
def test_sparse_gradients(make, seed):
    def run(managed):
        torch.manual_seed(seed)
        model = Sparse().double()
        optimizer = make(model.parameters())
        loader = data = batches(seed, 15)
        if managed:
            loader = AdaLoader.wrap(data, model=model, optimizer=optimizer, min_rows=1)
        USUAL(model, optimizer, loader)
        return model.state_dict()

    ours, theirs = run(True), run(False)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11)


def test_hyperparameters_changed_by_hand_between_steps(seed):
    def loop(model, optimizer, loader):
        for number, batch in enumerate(loader):
            group = optimizer.param_groups[0]
            group["lr"] = 0.3 / (1 + number)
            group["maximize"] = number == 2
            group["eps"] = 0.1 * (number + 1)
            weigh(model(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    assert_same_as_plain(Model, lambda p: Adagrad(p, lr=0.2), batches(seed), loop)


@pytest.mark.parametrize("kind", [SGD, Adagrad])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_closures(kind, clips, by_keyword, seed):
    def loop(model, optimizer, loader):
        losses = []
        for batch in loader:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = weigh(model(batch))
                loss.backward()
                if clips:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                return loss

            losses.append(optimizer.step(closure=closure) if by_keyword else optimizer.step(closure))
        return losses

    assert_same_as_plain(Model, lambda p: kind(p, lr=0.2), batches(seed), loop)


def test_a_closure_that_is_called_more_than_once_by_another_optimizer(seed):
    """L-BFGS for the dense parameters, SGD for the tables."""

    def loop(model, optimizer, loader):
        # With larger steps three batches in a hundred send it to infinity, and rounding decides what is NaN there.
        dense = torch.optim.LBFGS(model.linear.parameters(), lr=1e-3, max_iter=3)
        losses = []
        for batch in loader:

            def closure(batch=batch):
                model.zero_grad()
                loss = weigh(model(batch))
                loss.backward()
                return loss

            losses.append(dense.step(closure))
            optimizer.step()
        return losses

    assert_same_as_plain(Model, lambda p: SGD(list(p)[:2], lr=0.05), batches(seed), loop)


def test_adagrad_continues_from_steps_taken_in_plain_pytorch(seed):
    """State that the optimizer holds when the loader is built is taken over: values, and the count behind lr_decay."""

    def train_first(parameters):
        parameters = list(parameters)
        optimizer = Adagrad(parameters, lr=0.3, lr_decay=0.2, initial_accumulator_value=0.05)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        optimizer.zero_grad()
        return optimizer

    assert_same_as_plain(Model, train_first, batches(seed), USUAL)


def test_state_taken_over_is_freed(seed):
    model = Model()
    optimizer = Adagrad(model.parameters(), lr=0.3)
    weigh(model(batches(seed, 1)[0])).backward()
    optimizer.step()
    loader = AdaLoader.wrap(batches(seed), model=model, optimizer=optimizer, min_rows=1)
    held = optimizer.state[model.emb.weight]["sum"]
    assert held.untyped_storage().nbytes() > 4  # until the first step is over it may still be needed
    for batch in loader:
        weigh(model(batch)).backward()
        optimizer.step()
    held = optimizer.state[model.emb.weight]["sum"]
    assert held.shape == (ROWS, DIM) and held.untyped_storage().nbytes() == 4
    loader.close()


def test_an_optimizer_built_after_the_loader(seed):
    """A first loader without optimizer (for evaluation, say), then the optimizer, then a loader that has it."""
    torch.manual_seed(seed)
    model, plain = Model().double(), Model().double()
    plain.load_state_dict(model.state_dict())
    data = batches(seed)
    evaluation = AdaLoader.wrap(data, model=model, min_rows=1)
    for batch in evaluation:
        with torch.no_grad():
            torch.testing.assert_close(model(batch), plain(batch))
    for each, kind in ((model, "managed"), (plain, "plain")):
        optimizer = Adagrad(each.parameters(), lr=0.2, initial_accumulator_value=0.3)
        loader = data
        if kind == "managed":
            loader = AdaLoader.wrap(data, model=each, optimizer=optimizer, min_rows=1)
        USUAL(each, optimizer, loader)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-11, atol=1e-11)
    loader = None
    evaluation.close()


@pytest.mark.parametrize("as_tuple", [False, True])
def test_two_optimizers(as_tuple, seed):
    """One for the tables, another for the rest of the model, of a kind that tables do not take."""

    def run(managed):
        torch.manual_seed(seed)
        model = Model().double()
        tables = Adagrad([model.emb.weight, model.other.weight], lr=0.2)
        dense = Adam(model.linear.parameters(), lr=0.01, weight_decay=0.1)
        loader = data = batches(seed)
        if managed:
            both = (tables, dense) if as_tuple else [dense, tables]
            loader = AdaLoader.wrap(data, model=model, optimizer=both, min_rows=1)
        for number, batch in enumerate(loader):
            weigh(model(batch)).backward()
            for optimizer in (dense, tables) if number % 2 else (tables, dense):
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    ours, theirs = run(True), run(False)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11)


def test_tables_of_two_optimizers(seed):
    def run(managed):
        torch.manual_seed(seed)
        model = Model().double()
        first = Adagrad([model.emb.weight], lr=0.2)
        second = SGD([model.other.weight, *model.linear.parameters()], lr=0.1)
        loader = data = batches(seed)
        if managed:
            loader = AdaLoader.wrap(data, model=model, optimizer=[first, second], min_rows=1)
        for number, batch in enumerate(loader):
            weigh(model(batch)).backward()
            first.step()
            if number % 2:
                second.step()
                second.zero_grad()
            first.zero_grad()
        return model.state_dict()

    ours, theirs = run(True), run(False)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11)
