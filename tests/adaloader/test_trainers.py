"""Trainers that others have written, with a managed model in them: as with a plain loader, or an error that says what
to do.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from adaloader import AdaLoader, ManagedTableError, full_state_dict
from tests.training import OPTIMIZERS, Shop, Visits, assert_same_tensors

SAMPLES, BATCH = 42, 4
NEEDS_LIGHTNING = "Lightning is not installed (extra trainers)"
NEEDS_ACCELERATE = "accelerate is not installed (extra trainers)"


def loader_of(module, seed: int, *, managed: bool, **keywords):
    """Return a loader for training, its order drawn after the model was made."""
    data = Visits(SAMPLES, seed)
    torch.manual_seed(seed + 1)
    if not managed:
        return DataLoader(data, BATCH, shuffle=True)
    options = {"shuffle": True, "model": module, "optimizer": module.optimizer, "min_rows": 1}
    return AdaLoader(data, BATCH, **{**options, **keywords})


def weights_of(module, loader) -> dict[str, torch.Tensor]:
    return full_state_dict(module) if isinstance(loader, AdaLoader) else module.state_dict()


# --- Lightning ---


@pytest.fixture
def lightning():
    pytest.importorskip("lightning", reason=NEEDS_LIGHTNING)
    from tests import lightning_module

    environment = dict(os.environ)
    yield lightning_module
    os.environ.clear()  # of what its strategies have set
    os.environ.update(environment)


def fit(lightning, seed: int, *, managed: bool, kind: str = "ShopModule", options=None, **keywords):
    """Train; return the module with its losses, and its weights."""
    torch.manual_seed(seed)
    module = getattr(lightning, kind)(**(options or {}))
    loader = loader_of(module, seed, managed=managed)
    test = Visits(11, seed + 2)
    validation = AdaLoader(test, BATCH, model=module, min_rows=1) if managed else DataLoader(test, BATCH)
    trainer = lightning.make_trainer(**keywords)
    trainer.fit(module, loader, validation)
    assert trainer.train_dataloader is loader
    assert not managed or loader.stats()["intent_coverage"] > 0.8  # all but the first, watched step
    predicted = torch.cat(trainer.predict(module, DataLoader(test, BATCH)))
    weights = weights_of(module, loader)
    if managed:
        loader.close()
        validation.close()
    return module, weights, predicted


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05, "options": {"schedules": True}},
        {"limit_train_batches": 5, "val_check_interval": 2, "max_epochs": 3},
        {"kind": "ManualModule"},
        {"detect_anomaly": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_as_with_a_plain_loader(lightning, keywords, seed):
    theirs, their_weights, their_predictions = fit(lightning, seed, managed=False, **keywords)
    ours, weights, predictions = fit(lightning, seed, managed=True, **keywords)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(ours.validations, theirs.validations, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(predictions, their_predictions, rtol=1e-10, atol=1e-11)
    assert_same_tensors(weights, their_weights)


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_from_its_checkpoint(lightning, seed, tmp_path):
    def train(managed: bool, *, interrupted: bool):
        torch.manual_seed(seed)
        module = lightning.ShopModule(schedules=True)
        loader = loader_of(module, seed, managed=managed)
        path = tmp_path / f"{managed}.ckpt"
        if not interrupted:
            lightning.make_trainer(max_epochs=3).fit(module, loader)
            return module.losses, weights_of(module, loader)
        first = lightning.make_trainer(max_epochs=1)
        first.fit(module, loader)
        first.save_checkpoint(path)
        order = torch.get_rng_state()
        torch.manual_seed(seed + 5)  # another start, which the checkpoint replaces
        again = lightning.ShopModule(schedules=True)
        second = loader_of(again, seed, managed=managed)
        torch.set_rng_state(order)
        lightning.make_trainer(max_epochs=3).fit(again, second, ckpt_path=path, weights_only=False)
        return module.losses + again.losses, weights_of(again, second)

    losses, weights = train(False, interrupted=False)
    for managed in (False, True):
        resumed, resumed_weights = train(managed, interrupted=True)
        torch.testing.assert_close(resumed, losses, rtol=1e-10, atol=1e-11)
        assert_same_tensors(resumed_weights, weights)


@pytest.mark.filterwarnings("ignore")
def test_lightning_may_not_average_gradients_too(lightning, seed):
    torch.manual_seed(seed)
    module = lightning.ShopModule()
    loader = loader_of(module, seed, managed=True)
    trainer = lightning.make_trainer(strategy="ddp")
    try:
        with pytest.raises(ManagedTableError, match=r"DistributedDataParallel.*devices=1"):
            trainer.fit(module, loader)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_an_optimizer_that_the_loader_does_not_know(lightning, seed):
    torch.manual_seed(seed)
    module = lightning.ShopModule()
    loader = loader_of(module, seed, managed=True)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ManagedTableError, match=r"SGD holds table 'net.*Adagrad.*configure_optimizers"):
        lightning.make_trainer().fit(module, loader)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [{}, {"shuffle": None, "sampler": list(range(7))}], ids=str)
def test_lightning_may_not_replace_the_sampler(lightning, order, seed):
    torch.manual_seed(seed)
    module = lightning.ShopModule()
    loader = loader_of(module, seed, managed=True, **order)
    with pytest.raises(ManagedTableError, match=r"AdaLoader\.wrap"):
        lightning.make_trainer().predict(module, loader)
    if not order:
        with pytest.raises(ManagedTableError, match=r"overfit_batches"):
            lightning.make_trainer(overfit_batches=2).fit(module, loader)
    wrapped = AdaLoader.wrap(DataLoader(Visits(11, seed), BATCH), model=module, min_rows=1)
    predicted = torch.cat(lightning.make_trainer().predict(module, wrapped))
    with torch.no_grad():
        assert torch.equal(predicted, torch.cat([module.net(b) for b in DataLoader(Visits(11, seed), BATCH)]))


@pytest.mark.filterwarnings("ignore")
def test_lightning_builds_the_loader_in_a_hook(lightning, seed):
    def train(managed: bool):
        torch.manual_seed(seed)
        module = lightning.ShopModule()
        made = []
        module.train_dataloader = lambda: made.append(loader_of(module, seed, managed=managed)) or made[0]
        lightning.make_trainer().fit(module)
        return module.losses, weights_of(module, made[0])

    losses, weights = train(False)
    ours, our_weights = train(True)
    torch.testing.assert_close(ours, losses, rtol=1e-10, atol=1e-11)
    assert_same_tensors(our_weights, weights)


@pytest.mark.filterwarnings("ignore")
def test_lightning_may_build_an_unmanaged_loader_anew(lightning, seed):
    torch.manual_seed(seed)
    module = lightning.ShopModule()
    predicted = lightning.make_trainer().predict(module, AdaLoader(Visits(11, seed), BATCH))
    with torch.no_grad():
        assert torch.equal(torch.cat(predicted), torch.cat([module.net(b) for b in DataLoader(Visits(11, seed), 4)]))


# --- accelerate ---


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate", reason=NEEDS_ACCELERATE)
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


def work(accelerator, model, optimizer, scheduler, batch) -> float:
    with accelerator.accumulate(model):
        loss = nn.functional.mse_loss(model(batch), batch["label"])
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return loss.item()


def accelerated(accelerate, seed: int, *, managed: bool, data=None, epochs: int = 3, lookahead=5, **options):
    """Train; return the losses and the weights."""
    torch.manual_seed(seed)
    model = Shop()
    model.optimizer = OPTIMIZERS["adagrad"](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(model.optimizer, 3, gamma=0.7)
    keywords = {"lookahead": lookahead} if managed else {}
    loader = loader_of(model, seed, managed=managed, **keywords) if data is None else data(model, managed)
    accelerator = accelerate.Accelerator(cpu=True, **options)
    net, optimizer, prepared, scheduler = accelerator.prepare(model, model.optimizer, loader, schedule)
    assert (prepared is loader) == managed
    losses = []
    for epoch in range(epochs):
        for number, batch in enumerate(prepared):
            losses.append(work(accelerator, net, optimizer, scheduler, batch))
            if epoch == 1 and number == 4:
                break
    weights = weights_of(model, loader)
    if managed:
        assert loader.stats()["intent_coverage"] > (0.8 if lookahead else 0.0)
        assert not accelerator.gradient_state.in_dataloader
        loader.close()
    return losses, weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lookahead", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 4}], ids=str)
def test_accelerate_trains_as_with_a_plain_loader(accelerate, options, lookahead, seed):
    theirs, their_weights = accelerated(accelerate, seed, managed=False, **options)
    ours, weights = accelerated(accelerate, seed, managed=True, lookahead=lookahead, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    assert_same_tensors(weights, their_weights)


class Stream(torch.utils.data.IterableDataset):
    """Samples in another order in each epoch, of whose number it is told."""

    def __init__(self, seed: int):
        self.visits, self.epoch = Visits(22, seed), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(22, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter([self.visits[at] for at in order])


@pytest.mark.filterwarnings("ignore")
def test_accelerate_tells_a_stream_of_its_epochs(accelerate, seed):
    def loader(model, managed):
        if managed:
            return AdaLoader(Stream(seed), BATCH, model=model, optimizer=model.optimizer, min_rows=1)
        return DataLoader(Stream(seed), BATCH)

    both = [
        accelerated(accelerate, seed, managed=managed, data=loader, gradient_accumulation_steps=4)
        for managed in (False, True)
    ]
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-10, atol=1e-11)
    assert_same_tensors(both[1][1], both[0][1])


@pytest.mark.filterwarnings("ignore")
def test_a_loader_may_be_given_what_accelerate_has_prepared(accelerate, seed):
    def train(managed: bool):
        torch.manual_seed(seed)
        model = Shop()
        accelerator = accelerate.Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(model, OPTIMIZERS["adagrad"](model.parameters()))
        net.optimizer = optimizer
        loader = loader_of(net, seed, managed=managed)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 3, gamma=0.7)
        losses = [work(accelerator, net, optimizer, scheduler, batch) for batch in loader]
        return losses, weights_of(net, loader)

    (theirs, their_weights), (ours, weights) = train(False), train(True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    assert_same_tensors(weights, their_weights)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_saves_and_loads(accelerate, seed, tmp_path):
    torch.manual_seed(seed)
    model = Shop()
    model.optimizer = OPTIMIZERS["adagrad"](model.parameters())
    accelerator = accelerate.Accelerator(cpu=True)
    loader = loader_of(model, seed, managed=True, shuffle=False)
    net, optimizer, loader = accelerator.prepare(model, model.optimizer, loader)
    steady = torch.optim.lr_scheduler.StepLR(model.optimizer, 1, gamma=1.0)

    def epoch():
        return [work(accelerator, net, optimizer, steady, batch) for batch in loader]

    epoch()
    accelerator.save_state(tmp_path / "state")
    before = full_state_dict(model)
    losses, after = epoch(), full_state_dict(model)
    accelerator.load_state(tmp_path / "state")
    assert_same_tensors(full_state_dict(model), before, 0.0)
    torch.testing.assert_close(epoch(), losses, rtol=1e-12, atol=1e-12)
    assert_same_tensors(full_state_dict(model), after, 1e-12)
    loader.close()


# --- wrappers and optimizers that the loader does not know ---


def test_a_managed_model_may_not_be_wrapped_in_data_parallel():
    model = Shop()
    model.optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = loader_of(model, 0, managed=True)
    with pytest.raises(ManagedTableError, match="DataParallel was given a model whose tables AdaLoader manages"):
        nn.DataParallel(nn.Sequential(model))
    loader.close()
    nn.DataParallel(Shop())
    assert isinstance(copy.deepcopy(nn.Sequential(Shop())), nn.Sequential)


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_that_the_loader_does_not_know(with_closure, seed):
    torch.manual_seed(seed)
    model = Shop()
    model.optimizer = OPTIMIZERS["adagrad"](model.parameters())
    loader = loader_of(model, seed, managed=True)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = next(iter(loader))

    def closure():
        loss = nn.functional.mse_loss(model(batch), batch["label"])
        loss.backward()
        return loss

    before = full_state_dict(model)
    with pytest.raises(
        ManagedTableError, match=r"SGD holds table '(user.weight|shelf)'.*given Adagrad.*the next loader"
    ):
        other.step(closure) if with_closure else (closure(), other.step())
    assert_same_tensors(full_state_dict(model), before, 0.0)
    dense = torch.optim.SGD(model.out.parameters(), lr=0.1)
    dense.step()  # one that holds no table is nobody's business
    loader.close()
