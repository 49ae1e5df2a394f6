"""What autograd offers around `backward()`, with managed tables: as plain PyTorch, or an error that says what to do."""

import copy

import pytest
import torch
from torch import nn

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
        return self.linear(self.emb(ids).sum(1) + self.bag(ids)) + self.emb(ids[:, :2]).sum()


def batches(seed: int, count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (4, 3), generator=generator) for _ in range(count)]


def dense(gradient):
    return torch.zeros(ROWS, DIM) if gradient is None else gradient.to_dense().detach().clone()


def stepping(work, prepare=lambda model: None):
    """A loop that runs `work(model, ids, seen)` for each batch, then steps."""

    def loop(model, optimizer, loader):
        seen = []
        prepare(model)
        for ids in loader:
            work(model, ids, seen)
            optimizer.step()
            optimizer.zero_grad()
        return seen

    return loop


def inputs_with_a_table(model, ids, seen):
    weigh(model(ids)).backward(inputs=[model.emb.weight, model.linear.bias])
    assert model.bag.weight.grad is None and model.linear.weight.grad is None
    seen.append(dense(model.emb.weight.grad))


def inputs_without_tables(model, ids, seen):
    weigh(model(ids)).backward(inputs=[model.linear.weight])
    assert model.bag.weight.grad is None and model.emb.weight.grad is None
    seen.append(model.linear.weight.grad)


def gradient_of_tables(model, ids, seen):
    """`autograd.grad` leaves `.grad` alone; what it gives may be assigned."""
    loss = weigh(model(ids))
    found = torch.autograd.grad(loss, [model.emb.weight, model.linear.weight, model.bag.weight])
    assert all(p.grad is None for p in model.parameters())
    seen += [dense(found[0]), found[1], dense(found[2])]
    for parameter, gradient in zip((model.emb.weight, model.linear.weight), found[:2], strict=True):
        parameter.grad = gradient * 0.5


def unused_table(model, ids, seen):
    loss = weigh(model.bag(ids))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(loss, model.emb.weight, retain_graph=True)
    (nothing,) = torch.autograd.grad(loss, model.emb.weight, retain_graph=True, allow_unused=True)
    assert nothing is None
    (zero,) = torch.autograd.grad(loss, model.emb.weight, retain_graph=True, materialize_grads=True)
    seen.append(zero.norm())
    loss.backward()


def penalty_on_the_table(model, ids, seen):
    """A gradient penalty: differentiated twice."""
    loss = weigh(model(ids).tanh())
    (gradient,) = torch.autograd.grad(loss, model.emb.weight, create_graph=True)
    penalty = gradient.pow(2).sum() + gradient.norm() + (gradient * gradient).mean() + gradient.abs().max()
    (loss + 0.1 * penalty).backward()
    seen.append(penalty)


def penalty_on_the_rows(model, ids, seen):
    rows = model.emb(ids)
    loss = weigh(model.linear(rows.tanh().sum(1)))
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    (loss + gradient.square().sum()).backward()
    seen.append(gradient.norm())


def graph_of_backward(model, ids, seen):
    loss = weigh(model(ids).tanh())
    loss.backward(create_graph=True)
    penalty = model.emb.weight.grad.norm()
    seen.append(penalty)
    gradients = [dense(p.grad) for p in (model.emb.weight, model.bag.weight)]
    for parameter in model.parameters():
        parameter.grad = None
    penalty.backward()
    seen += gradients


def retained(model, ids, seen):
    loss = weigh(model(ids))
    loss.backward(retain_graph=True)
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    seen.append(dense(model.emb.weight.grad))


def norm_of_a_copy(model, ids, seen):
    weigh(model(ids)).backward()
    kept = model.emb.weight.grad.clone()
    model.emb.weight.grad.mul_(0.25).add_(kept, alpha=0.5).sub_(copy.deepcopy(kept) / 8)
    model.bag.weight.grad.copy_((model.bag.weight.grad - model.bag.weight.grad * 0.5).clamp(max=0.3))
    seen += [
        kept.norm(),
        (-kept).min(),
        kept.mean(),
        model.emb.weight.grad.sum(),
        kept.abs().max(),
        kept.square().sum(),
    ]


WORK = [
    inputs_with_a_table,
    inputs_without_tables,
    gradient_of_tables,
    unused_table,
    penalty_on_the_table,
    penalty_on_the_rows,
    graph_of_backward,
    retained,
    norm_of_a_copy,
]


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}, {"padding_idx": 2}], ids=str)
def test_as_plain(work, options, seed):
    if options and work in (penalty_on_the_table, penalty_on_the_rows, graph_of_backward) and "scale" in str(options):
        pytest.skip("PyTorch's own embedding with scale_grad_by_freq has no second derivative")
    assert_same_as_plain(lambda: Model(**options), OPTIMIZERS["sgd"], batches(seed), stepping(work))


# --- hooks ---


def halved(model):
    model.emb.weight.register_hook(lambda grad: grad * 0.5)
    model.emb.weight.register_hook(lambda grad: -grad / 2)


def clamped(model):
    model.emb.weight.register_hook(lambda grad: grad.clamp(-0.1, 0.2))
    model.bag.weight.register_hook(lambda grad: None)


def removed(model):
    handle = model.emb.weight.register_hook(lambda grad: grad * 100)
    model.emb.weight.register_post_accumulate_grad_hook(lambda p: [p.grad.mul_(0.5)].clear())
    handle.remove()


def on_modules(model):
    model.emb.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    model.emb.register_forward_hook(lambda module, args, output: output * 1.5)
    model.linear.register_full_backward_hook(lambda module, given, out: (given[0] * 0.5,))
    model.bag.register_full_backward_hook(lambda module, given, out: None)
    model.register_full_backward_pre_hook(lambda module, out: (out[0] * 2,))


def through_the_gradient(model, ids, seen):
    weigh(model(ids)).backward()
    seen.append(dense(model.emb.weight.grad))
    weigh(model(ids)).backward()  # the hooks see the gradient of this backward alone
    seen.append(dense(model.emb.weight.grad))


@pytest.mark.parametrize("prepare", [halved, clamped, removed, on_modules], ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("late", [False, True], ids=["before the loader", "after it"])
def test_hooks_as_plain(prepare, late, seed):
    def make():
        model = Model()
        if not late:
            prepare(model)
        return model

    loop = stepping(through_the_gradient, prepare if late else lambda model: None)
    assert_same_as_plain(make, OPTIMIZERS["sgd"], batches(seed), loop)


def test_an_optimizer_that_steps_in_hooks(seed):
    def loop(model, optimizer, loader):
        by_parameter = {p: torch.optim.SGD([p], lr=0.1) for p in (model.linear.weight, model.linear.bias)}

        def step(parameter):
            by_parameter[parameter].step()
            by_parameter[parameter].zero_grad()

        for parameter in by_parameter:
            parameter.register_post_accumulate_grad_hook(step)

        def step_all(parameter):
            optimizer.step()
            optimizer.zero_grad()

        model.emb.weight.register_post_accumulate_grad_hook(step_all)
        losses = []
        for ids in loader:
            loss = weigh(model.linear(model.emb(ids).sum(1)))
            loss.backward()
            losses.append(loss)
        return losses

    assert_same_as_plain(Model, OPTIMIZERS["sgd"], batches(seed), loop)


def test_a_hook_is_called_once_per_backward_that_reaches_the_table(seed):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model.emb.weight.register_hook(lambda grad: calls.append(len(grad.rows)))
    loader = AdaLoader.wrap(batches(seed, 3), model=model, optimizer=optimizer, min_rows=1)
    for ids in loader:
        weigh(model(ids)).backward()
        weigh(model.bag(ids)).backward()
        with pytest.raises(ZeroDivisionError):
            out = weigh(model(ids))
            out.register_hook(lambda grad: 1 / 0)
            out.backward()
    assert len(calls) == 3
    loader.close()


@pytest.fixture
def managed(seed):
    model = Model()
    loader = AdaLoader.wrap(
        batches(seed, 1), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), min_rows=1
    )
    model.loss = weigh(model(next(iter(loader))))
    yield model
    loader.close()


def test_what_a_hook_may_return(managed):
    managed.emb.weight.register_hook(lambda grad: torch.ones(ROWS, DIM))
    with pytest.raises(ManagedTableError, match=r"emb\.weight.*returned Tensor"):
        managed.loss.backward()


def test_hooks_need_a_gradient(managed):
    managed.emb.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="doesn't require gradient"):
        managed.emb.weight.register_hook(print)


def test_gradients_in_batches_are_refused(managed):
    with pytest.raises(ManagedTableError, match=r"is_grads_batched.*emb\.weight"):
        torch.autograd.grad(managed.loss, managed.emb.weight, torch.ones(2), is_grads_batched=True)


# --- mixed precision ---


def test_autocast_as_plain(seed):
    def loop(model, optimizer, loader):
        losses = []
        for ids in loader:
            with torch.autocast("cpu", torch.bfloat16):
                looked_up = model.emb(ids)
                out = model(ids)
                loss = weigh(out.float())
            assert looked_up.dtype == torch.float32
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        return losses

    assert_same_as_plain(Model, OPTIMIZERS["adagrad"], batches(seed), loop, dtype=torch.float32)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["", "fused"])
def test_scaler_as_plain(unscales, options, seed):
    """Infinite gradients in the third batch; a fused optimizer unscales by itself."""

    def loop(model, optimizer, loader):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        seen = []
        for number, ids in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16):
                loss = weigh(model(ids).float())
            scaler.scale(loss * (float("inf") if number == 2 else 1.0)).backward()
            if unscales:
                scaler.unscale_(optimizer)
                seen.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).nan_to_num(posinf=0.0))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen += [loss, scaler.get_scale()]
        return seen

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.05, **options)

    assert_same_as_plain(Model, optimizer, batches(seed), loop, dtype=torch.float32)
