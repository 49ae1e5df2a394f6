"""Models on a device: rows stay on the host, and everything is as in plain PyTorch with the model there."""

from contextlib import closing

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaloader
from adaloader import AdaLoader, full_state_dict
from adaloader.errors import ManagedTableError
from tests.device.against_plain import Clicks, clicks, plain_and_managed, train

ROWS, DIM = 60, 5
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.8, weight_decay=1e-3),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.005),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_plain_pytorchs(name, device, seed):
    data = clicks(ROWS, 4, 136, seed, skew=0.8)
    stats = plain_and_managed(lambda: Clicks(ROWS, DIM), OPTIMIZERS[name], data, train(1), device)
    assert stats["intent_coverage"] > 0.8
    assert stats["device_cache"] == {}


def test_in_float32_too(device, seed):
    data = clicks(ROWS, 4, 100, seed, skew=0.0, dtype=torch.float32)
    make = lambda: Clicks(ROWS, DIM, torch.float32)  # noqa: E731
    plain_and_managed(make, OPTIMIZERS["adagrad"], data, train(), device)


def clip_norm(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def clip_value(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.02)


def scale_by_hand(model):
    gradient = model.table.weight.grad
    assert gradient.device == model.out.weight.device and gradient.values.device == gradient.rows.device
    gradient.mul_(0.5)
    gradient.values.add_(0.001)


@pytest.mark.parametrize("change", [clip_norm, clip_value, scale_by_hand])
def test_what_changes_gradients_before_a_step(change, device, seed):
    data = clicks(ROWS, 4, 80, seed, skew=0.8)
    if change is not scale_by_hand:
        plain_and_managed(lambda: Clicks(ROWS, DIM), OPTIMIZERS["sgd"], data, train(before_step=change), device)
        return
    model = Clicks(ROWS, DIM).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.table.weight.detach().cpu().clone()
    with closing(AdaLoader(data, 80, model=model, optimizer=optimizer, min_rows=1)) as loader:
        ids, _ = next(iter(loader))
        model(ids).sum().backward()
        raw = model.table.weight.grad.to_dense().cpu()
        scale_by_hand(model)
        rows = model.table.weight.grad.rows.cpu()
        optimizer.step()
        step = before - full_state_dict(model)["table.weight"]
    torch.testing.assert_close(step[rows], 0.1 * (0.5 * raw[rows] + 0.001), rtol=1e-9, atol=1e-12)


def test_gradients_of_several_batches_add_up(device, seed):
    def loop(model, optimizer, loader):
        losses = []
        for number, (ids, target) in enumerate(loader):
            loss = F.mse_loss(model(ids), target.to(device))
            loss.backward()
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    data = clicks(ROWS, 4, 112, seed, skew=0.8)
    plain_and_managed(lambda: Clicks(ROWS, DIM), OPTIMIZERS["adagrad"], data, loop, device)


class Ways(nn.Module):
    """Reaches one table in the way that it is given."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.randn(ROWS, DIM, dtype=torch.float64))
        self.out = nn.Linear(DIM, 1, dtype=torch.float64)

    def forward(self, ids):
        return self.out(self.way(self.weight, ids.to(self.weight.device))).flatten()


def bag(mode):
    def way(weight, ids):
        factors = torch.linspace(0.5, 1.5, ids.numel(), dtype=weight.dtype, device=weight.device).view(ids.shape)
        return F.embedding_bag(ids, weight, mode=mode, per_sample_weights=factors if mode == "sum" else None)

    return way


WAYS = {
    "index": lambda weight, ids: weight[ids].sum(1),
    "index of the rest": lambda weight, ids: F.pad(weight[ids, 1:].sum(1), (1, 0)),
    "negative ids": lambda weight, ids: weight[ids - ROWS].sum(1),
    "index_select": lambda weight, ids: weight.index_select(0, ids.flatten()).view(*ids.shape, DIM).sum(1),
    "bag, sum": bag("sum"),
    "bag, mean": bag("mean"),
    "bag, max": bag("max"),
    "max_norm": lambda weight, ids: F.embedding(ids, weight, max_norm=1.5).sum(1),
    "by frequency": lambda weight, ids: F.embedding(ids, weight, scale_grad_by_freq=True).sum(1),
    "a view": lambda weight, ids: weight[2:][ids % (ROWS - 2)].sum(1),
    "a view of columns": lambda weight, ids: F.pad(weight[:, 1:3][ids].sum(1), (0, DIM - 2)),
    "gather": lambda weight, ids: (
        torch.gather(weight, 0, ids.flatten()[:, None].expand(-1, DIM)).view(-1, 4, DIM).sum(1)
    ),
    "detached": lambda weight, ids: weight.detach()[ids].sum(1) + weight[ids[:, 0]],
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_a_table(name, device, seed):
    data = clicks(ROWS, 4, 64, seed, skew=0.5)
    plain_and_managed(lambda: Ways(WAYS[name]), OPTIMIZERS["adagrad"], data, train(1), device)


class Tied(nn.Module):
    """Uses its table as a whole from its third forward pass on."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM, dtype=torch.float64)
        self.out = nn.Linear(DIM, 1, dtype=torch.float64)
        self.passes = 0

    def forward(self, ids):
        self.passes += 1
        rows = self.table(ids.to(self.out.weight.device)).sum(1)
        if self.passes > 2:
            rows = rows + self.table.weight.pow(2).mean()
        return self.out(rows).flatten()


@pytest.mark.parametrize("name", ["adagrad", "adam"])
def test_a_table_that_becomes_dense_does_so_on_its_device(name, device, seed):
    data = clicks(ROWS, 4, 96, seed, skew=0.5)
    plain_and_managed(Tied, OPTIMIZERS[name], data, train(1), device)


def test_rows_of_a_deferred_table_are_made_on_the_host(device, seed):
    data = clicks(ROWS, 4, 64, seed, skew=0.5)
    with adaloader.deferred_init(min_rows=20):
        model = Clicks(ROWS, DIM).to(device)
    assert model.table.weight.device == device
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    with closing(AdaLoader(data, 16, model=model, optimizer=optimizer, min_rows=1)) as loader:
        losses = train(3)(model, optimizer, loader)
    assert sum(losses[8:]) < sum(losses[:4]) and all(loss == loss for loss in losses)


def test_writes_in_mid_training(device, seed):
    def loop(model, optimizer, loader):
        losses = []
        for number, (ids, target) in enumerate(loader):
            with torch.no_grad():
                if number == 2:
                    model.table.weight[torch.arange(3, device=device)] = torch.ones(3, DIM, dtype=torch.float64).to(
                        device
                    )
                if number == 3:
                    model.bag.weight.mul_(torch.full((3,), 0.5, dtype=torch.float64).to(device))
                if number == 4:
                    model.table.weight.copy_(model.table.weight.clone() * 0.9)
            optimizer.zero_grad()
            loss = F.mse_loss(model(ids), target.to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    data = clicks(ROWS, 4, 128, seed, skew=0.5)
    plain_and_managed(lambda: Clicks(ROWS, DIM), OPTIMIZERS["adagrad"], data, loop, device)


def test_ids_may_be_on_the_host_where_the_table_is_on_a_device(device, seed):
    data = clicks(ROWS, 4, 32, seed, skew=0.5)
    model = Clicks(ROWS, DIM).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with closing(AdaLoader(data, 16, model=model, optimizer=optimizer, min_rows=1)) as loader:
        for ids, _ in loader:
            rows = model.table(ids[:, 0])
            assert rows.device == device
            torch.testing.assert_close(rows.cpu(), model.table(ids[:, 0].to(device)).cpu())


def test_a_managed_table_stays_where_it_is(device, seed):
    data = clicks(ROWS, 4, 32, seed, skew=0.5)
    model = Clicks(ROWS, DIM).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with closing(AdaLoader(data, 16, model=model, optimizer=optimizer, min_rows=1)):
        assert model.to(device).table.weight.device == device
        with pytest.raises(ManagedTableError, match=r"on far:0 and stays there; convert the model .* on cpu before"):
            model.cpu()


def test_ids_on_a_device_are_refused_by_a_table_on_the_host(device, seed):
    data = clicks(ROWS, 4, 32, seed, skew=0.5)
    model = Clicks(ROWS, DIM)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with closing(AdaLoader(data, 16, model=model, optimizer=optimizer, min_rows=1)) as loader:
        ids, _ = next(iter(loader))
        with pytest.raises(RuntimeError, match=r"on the CPU, got ids on far:0; move the model"):
            model.table(ids.to(device))


@pytest.mark.parametrize("name", ["adagrad", "adam"])
@pytest.mark.parametrize("cache_bytes", [0, 6000])
def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(name, cache_bytes, device, seed, tmp_path):
    data = clicks(ROWS, 4, 48, seed, skew=0.5)

    def run(passes, resume):
        torch.manual_seed(3)
        model = Clicks(ROWS, DIM).to(device)
        optimizer = OPTIMIZERS[name](model.parameters())
        keywords = {"model": model, "optimizer": optimizer, "min_rows": 1, "device_cache_bytes": cache_bytes}
        with closing(AdaLoader(data, 16, **keywords)) as loader:
            if resume:
                adaloader.load(tmp_path, loader)
            losses = train(passes)(model, optimizer, loader)
            if passes == 1 and not resume:
                adaloader.save(tmp_path, loader)
            return losses, full_state_dict(model)

    whole, weights = run(2, resume=False)
    first, _ = run(1, resume=False)
    second, resumed = run(1, resume=True)
    assert first + second == whole
    assert all(torch.equal(resumed[name].cpu(), value.cpu()) for name, value in weights.items())
