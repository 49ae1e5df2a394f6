"""The user's own optimizer on managed rows, against the same optimizer in plain PyTorch."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam

from adaloader import AdaLoader, UnsupportedOptimizerError
from tests.adaloader.against_plain import assert_same_as_plain, train, weigh

ROWS, DIM = 30, 3


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM, padding_idx=0)
        self.other = nn.Embedding(ROWS + 5, DIM)
        self.linear = nn.Linear(DIM, 1)

    def forward(self, ids):
        return self.linear(self.emb(ids).sum(1) * self.other(ids).mean(1))


def batches(seed: int, count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (4, 3), generator=generator) for _ in range(count)]


USUAL = train(lambda model, batch: weigh(model(batch)))

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
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(make, seed):
    assert_same_as_plain(Model, make, batches(seed), USUAL)


@pytest.mark.parametrize("make", [OPTIONS["SGD"], OPTIONS["Adagrad, all"]], ids=["SGD", "Adagrad"])
def test_float32(make, seed):
    assert_same_as_plain(Model, make, batches(seed), USUAL, dtype=torch.float32)


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
        dense = torch.optim.LBFGS(model.linear.parameters(), lr=0.1, max_iter=3)
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


# --- what is refused ---


class Odd(SGD):
    def step(self, closure=None):
        return super().step(closure)


REFUSED = {
    "momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9), "momentum=0.9"),
    "SGD weight_decay": (lambda p: SGD(p, lr=0.1, weight_decay=0.1), "weight_decay=0.1"),
    "nesterov": (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), "momentum"),
    "Adagrad weight_decay": (lambda p: Adagrad(p, lr=0.1, weight_decay=0.1), "weight_decay=0.1"),
    "Adam": (lambda p: Adam(p), "Adam"),
    "AdamW": (lambda p: torch.optim.AdamW(p), "AdamW"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p), "SparseAdam"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p), "RMSprop"),
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
