"""`.grad` of a managed table: read, scaled, clipped and cleared as the gradient of plain PyTorch is."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from adaloader import AdaLoader, ManagedTableError
from tests.adaloader.against_plain import OPTIMIZERS, assert_same_as_plain, weigh

ROWS, DIM = 30, 3


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM, **options)
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.linear = nn.Linear(DIM, 1)

    def forward(self, ids):
        return self.linear(self.emb(ids).sum(1) + self.bag(ids))


def batches(seed: int, count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (4, 3), generator=generator) for _ in range(count)]


def steps(change):
    """A loop that lets `change(model, optimizer, number)` do something to gradients between backward and step."""

    def loop(model, optimizer, loader):
        seen = []
        for number, batch in enumerate(loader):
            loss = weigh(model(batch)) * 3
            loss.backward()
            returned = change(model, optimizer, number)
            seen += [loss] + ([] if returned is None else [returned])
            optimizer.step()
            optimizer.zero_grad()
        return seen

    return loop


def scale_all(model, factor):
    for p in model.parameters():
        p.grad.mul_(factor)


def clip_by_hand(model):
    for p in model.parameters():
        p.grad.data.clamp_(-0.5, 0.25)


def divide_all(model):
    for p in model.parameters():
        p.grad /= 4
        p.grad *= torch.tensor(2.0)


def clear(model, optimizer, how):
    if how == "none":
        optimizer.zero_grad(set_to_none=True)
    elif how == "zero":
        optimizer.zero_grad(set_to_none=False)
    elif how == "zero foreach":
        model.zero_grad(set_to_none=False)
    elif how == "by hand":
        for p in model.parameters():
            p.grad = None
    elif how == "del":
        for p in model.parameters():
            del p.grad
    elif how == "zero_":
        for p in model.parameters():
            p.grad.detach_().zero_()


CHANGES = {
    "clip_grad_norm_": lambda m, o, n: clip_grad_norm_(m.parameters(), 0.5),
    "clip_grad_norm_ not reached": lambda m, o, n: clip_grad_norm_(m.parameters(), 1e6),
    "clip_grad_norm_ foreach": lambda m, o, n: clip_grad_norm_(m.parameters(), 0.5, foreach=True),
    "clip_grad_norm_ one by one": lambda m, o, n: clip_grad_norm_(m.parameters(), 0.5, foreach=False),
    "clip_grad_norm_ 1": lambda m, o, n: clip_grad_norm_(m.parameters(), 0.5, norm_type=1),
    "clip_grad_norm_ 3.5": lambda m, o, n: clip_grad_norm_(m.parameters(), 0.5, norm_type=3.5),
    "clip_grad_norm_ inf": lambda m, o, n: clip_grad_norm_(m.parameters(), 0.5, norm_type="inf"),
    "clip_grad_norm_ strict": lambda m, o, n: clip_grad_norm_(m.parameters(), 0.5, error_if_nonfinite=True),
    "clip_grad_norm_ of the table": lambda m, o, n: clip_grad_norm_(m.emb.weight, 0.5),
    "clipped twice": lambda m, o, n: clip_grad_norm_(m.parameters(), 0.5) + clip_grad_norm_(m.parameters(), 0.1),
    "get_total_norm": lambda m, o, n: get_total_norm([p.grad for p in m.parameters()]),
    "clip_grad_value_": lambda m, o, n: clip_grad_value_(m.parameters(), 0.3),
    "clip_grad_value_ foreach": lambda m, o, n: clip_grad_value_(m.parameters(), 0.3, foreach=True),
    "clip_grad_value_ one by one": lambda m, o, n: clip_grad_value_(m.parameters(), 0.3, foreach=False),
    "clamp by hand": lambda m, o, n: clip_by_hand(m),
    "scaled": lambda m, o, n: scale_all(m, 0.25),
    "scaled by a tensor": lambda m, o, n: scale_all(m, torch.tensor(0.25)),
    "divided": lambda m, o, n: divide_all(m),
    "scaled, then clipped": lambda m, o, n: [scale_all(m, 2.0), clip_grad_norm_(m.parameters(), 0.5)][1],
    "norm": lambda m, o, n: m.emb.weight.grad.norm() + torch.norm(m.bag.weight.grad, 1),
    "linalg": lambda m, o, n: torch.linalg.norm(m.emb.weight.grad) + torch.linalg.vector_norm(m.emb.weight.grad, 0),
    "finite": lambda m, o, n: float(all(torch.isfinite(p.grad).all() for p in m.parameters())),
    "not a number": lambda m, o, n: float(any(p.grad.isnan().any() for p in m.parameters())),
    "clear, none": lambda m, o, n: clear(m, o, "none") if n == 2 else None,
    "clear, zero": lambda m, o, n: clear(m, o, "zero") if n == 2 else None,
    "clear, zero foreach": lambda m, o, n: clear(m, o, "zero foreach") if n == 2 else None,
    "clear, by hand": lambda m, o, n: clear(m, o, "by hand") if n == 2 else None,
    "clear, del": lambda m, o, n: clear(m, o, "del") if n == 2 else None,
    "clear, zero_": lambda m, o, n: clear(m, o, "zero_") if n == 2 else None,
    "zero, then norm": lambda m, o, n: [clear(m, o, "zero"), clip_grad_norm_(m.parameters(), 1.0, norm_type=2.0)][1],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_between_backward_and_step(change, optimizer, seed):
    assert_same_as_plain(Model, OPTIMIZERS[optimizer], batches(seed), steps(change))


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "scaled", "norm"])
@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"padding_idx": 3}, {"sparse": False}], ids=str)
def test_changes_to_the_gradients_of_other_lookups(name, options, seed):
    assert_same_as_plain(lambda: Model(**options), OPTIMIZERS["adagrad"], batches(seed), steps(CHANGES[name]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("clear_every", [0, 3])
def test_gradients_accumulate_until_they_are_cleared(clear_every, options, optimizer, seed):
    """With `clear_every` 0 they never are: each step applies the sum of all backward passes so far."""

    def loop(model, optimizer, loader):
        losses = []
        for number, batch in enumerate(loader):
            if clear_every and number % clear_every == 0:
                optimizer.zero_grad()
            loss = weigh(model(batch)) / 10
            loss.backward()
            if number % 2:
                optimizer.step()
            losses.append(loss)
        return losses

    assert_same_as_plain(lambda: Model(**options), OPTIMIZERS[optimizer], batches(seed, 8), loop)


def test_clearing_between_forward_and_backward(seed):
    """zero_grad after the forward pass, in a loop that accumulates two batches, with lookups counted by frequency."""

    def loop(model, optimizer, loader):
        losses = []
        for number, batch in enumerate(loader):
            loss = weigh(model(batch)) / 10
            if number % 2 == 0:
                optimizer.zero_grad()
            loss.backward()
            if number % 2:
                optimizer.step()
            losses.append(loss)
        return losses

    for options in ({}, {"scale_grad_by_freq": True}):
        assert_same_as_plain(lambda options=options: Model(**options), OPTIMIZERS["sgd"], batches(seed, 6), loop)


def test_a_loop_that_never_clears_keeps_one_part():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = AdaLoader.wrap(batches(0, 20), model=model, optimizer=optimizer, min_rows=1)
    for batch in loader:
        model(batch).sum().backward()
        optimizer.step()
    assert len(model.emb.weight._managed.parts) == 1
    assert len(model.emb.weight.grad.rows) <= ROWS
    loader.close()


# --- reading ---


@pytest.fixture
def with_gradient(seed):
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = batches(seed, 1)[0]
    plain = nn.Embedding(ROWS, DIM)
    plain.weight.data.copy_(model.emb.weight.data)
    loader = AdaLoader.wrap([ids], model=model, optimizer=optimizer, min_rows=1)
    weigh(model.emb(ids)).backward()
    weigh(plain(ids)).backward()
    model.expected, model.optimizer = plain.weight.grad, optimizer
    yield model
    loader.close()


def test_rows_and_values_are_the_gradient(with_gradient):
    gradient, expected = with_gradient.emb.weight.grad, with_gradient.expected
    dense = torch.zeros(ROWS, DIM).index_add(0, gradient.rows, gradient.values)
    torch.testing.assert_close(dense, expected)
    assert gradient.rows.dtype == torch.int64 and len(gradient.rows.unique()) == len(gradient.rows)
    assert gradient.shape == expected.shape and gradient.dtype == expected.dtype and gradient.device == expected.device
    assert len(gradient) == ROWS and gradient.numel() == ROWS * DIM and not gradient.requires_grad
    for text in (repr(gradient), f"{gradient}", str([gradient])):
        assert "emb.weight" in text and "nan" not in text


def test_values_may_be_changed_in_place(with_gradient):
    before = with_gradient.emb.weight.data[torch.arange(ROWS)]
    rows = with_gradient.emb.weight.grad.rows
    with_gradient.emb.weight.grad.values.fill_(2.0)
    with_gradient.optimizer.step()
    after = with_gradient.emb.weight.data[torch.arange(ROWS)]
    changed = torch.zeros(ROWS, DIM).index_fill(0, rows, 2.0)
    torch.testing.assert_close(after, before - 0.5 * changed)


def test_no_gradient_is_none_and_zero_has_no_rows(with_gradient):
    weight = with_gradient.emb.weight
    assert with_gradient.bag.weight.grad is None
    with_gradient.optimizer.zero_grad(set_to_none=False)
    assert len(weight.grad.rows) == 0 and weight.grad.values.shape == (0, DIM) and weight.grad.norm() == 0
    assert weight.grad.norm(float("inf")) == 0
    with_gradient.optimizer.zero_grad()
    assert weight.grad is None
    weight.grad = None
    del weight.grad


REFUSED = {
    "add": lambda g: g + 1,
    "radd": lambda g: torch.ones(ROWS, 1) + g,
    "radd of a number": lambda g: 1.0 + g,
    "add_": lambda g: g.add_(torch.ones(ROWS, DIM)),
    "addcmul": lambda g: torch.addcmul(torch.ones(1), g, g),
    "mul_ by a matrix": lambda g: g.mul_(torch.ones(ROWS, 1)),
    "mul_ by itself": lambda g: g.mul_(g),
    "div_ by a matrix": lambda g: g.div_(torch.ones(ROWS, 1)),
    "index": lambda g: g[3],
    "numpy": lambda g: g.numpy(),
    "cat": lambda g: torch.cat([g.detach(), torch.ones(1, DIM)]),
    "keyword": lambda g: torch.sum(input=g, dim=1),
    "norm of rows": lambda g: g.norm(dim=1),
    "norm, kept": lambda g: torch.linalg.vector_norm(g, 2, dim=0),
    "spectral norm": lambda g: torch.linalg.norm(g, 2),
    "nuclear norm": lambda g: torch.norm(g, "nuc"),
    "least value": lambda g: g.norm(float("-inf")),
    "clamp to positive": lambda g: g.clamp_(min=0.1),
    "data": lambda g: setattr(g, "data", torch.zeros(ROWS, DIM)),
    "foreach by a list": lambda g: torch._foreach_mul_([g], [2.0]),
    "other dtype": lambda g: g.double(),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED.keys())
def test_other_operations_name_the_table(with_gradient, use):
    with pytest.raises(ManagedTableError, match=r"emb\.weight"):
        use(with_gradient.emb.weight.grad)


def test_a_tensor_of_its_shape_plus_the_gradient(with_gradient):
    gradient, ones = with_gradient.emb.weight.grad, torch.ones(ROWS, DIM)
    assert torch.equal(ones + gradient, ones + gradient.to_dense())
    assert torch.equal(torch.sub(ones, gradient, alpha=2), ones - 2 * gradient.to_dense())


def test_other_gradients_cannot_be_assigned(with_gradient):
    weight = with_gradient.emb.weight
    for value in (torch.zeros(ROWS, DIM), with_gradient.linear.weight):
        with pytest.raises(ManagedTableError, match=r"emb\.weight"):
            weight.grad = value
    weight.grad = weight.grad
    assert len(weight.grad.rows)


def test_division_by_zero_is_infinite_as_in_pytorch(with_gradient):
    with_gradient.emb.weight.grad.div_(0)
    assert not torch.isfinite(with_gradient.emb.weight.grad).any()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(with_gradient.parameters(), 1.0, error_if_nonfinite=True)
