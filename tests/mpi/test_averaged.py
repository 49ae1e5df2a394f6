"""Parameters beside the model, and those that come after the first loader, are averaged as the model's are."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaloader
from adaloader import AdaLoader, ManagedTableError
from tests.training import close

ROWS, DIM, BATCH_SIZE, BATCHES = 37, 3, 5, 4


class Scaled(nn.Module):
    """A loss with weights of its own, which are no tables' and no model's."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, scores, target):
        return F.mse_loss(scores * self.scale + self.shift, target)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM)
        self.layer = nn.Linear(DIM, DIM)

    def forward(self, ids):
        return self.layer(self.table(ids)).tanh()


class Job:
    """What is trained with plain loaders of the global batch (`managed` False), and with ours."""

    def __init__(self, comm, seed: int, managed: bool, optimizer: str = "Adagrad", strategy=None):
        self.comm, self.managed, self.strategy = comm, managed, strategy
        generator = torch.Generator().manual_seed(seed)
        samples = BATCH_SIZE * comm.size * BATCHES
        self.data = torch.utils.data.TensorDataset(
            torch.randint(0, ROWS, (samples,), generator=generator),
            torch.randint(0, ROWS, (samples,), generator=generator),
            torch.randn(samples, generator=generator, dtype=torch.float64),
        )
        # Ranks draw other numbers: what they do not begin with alike is rank 0's.
        torch.manual_seed(seed + (comm.rank if managed else 0))
        self.model, self.loss = Tower().double(), Scaled().double()
        self.other = Tower().double()
        self.make = getattr(torch.optim, optimizer)
        self.loaders = []

    def load(self, model, optimizer):
        if not self.managed:
            return torch.utils.data.DataLoader(self.data, batch_size=BATCH_SIZE * self.comm.size)
        options = {"model": model, "optimizer": optimizer, "min_rows": 1, "strategy": self.strategy}
        loader = AdaLoader(self.data, batch_size=BATCH_SIZE, **options)
        self.loaders.append(loader)
        return loader

    def epoch(self, loader, *optimizers):
        for left, right, target in loader:
            scores = (self.model(left) * self.other(right)).sum(-1)
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.loss(scores, target).backward()
            for optimizer in optimizers:
                optimizer.step()

    def parameters(self):
        return [p for module in (self.model, self.other, self.loss) for p in module.parameters()]

    def values(self):
        """Every tensor: whole tables on rank 0, and on each rank what it holds itself."""
        whole = adaloader.full_state_dict(self.model) if self.managed else self.model.state_dict()
        values = {f"model.{name}": value.clone() for name, value in whole.items()}
        for module, name in ((self.other, "other"), (self.loss, "loss")):
            for key, parameter in module.named_parameters():
                values[f"{name}.{key}"] = parameter.detach().clone()
        return values

    def close(self):
        for loader in self.loaders:
            close(self.comm, loader)


def assert_equal(comm, seed: int, train, **options) -> Job:
    plain, job = Job(comm, seed, False, **options), Job(comm, seed, True, **options)
    train(plain)
    train(job)
    expected = plain.values()
    ours = job.values()
    assert comm.rank or set(ours) == set(expected)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")
    job.close()
    return job


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "Adam"])
def test_a_loss_and_a_tower_beside_the_model(comm, seed, optimizer):
    def train(job):
        optimizer = job.make(job.parameters(), lr=0.05)
        loader = job.load(job.model, optimizer)
        for _ in range(2):
            job.epoch(loader, optimizer)

    assert_equal(comm, seed, train, optimizer=optimizer)


def test_optimizers_of_their_own(comm, seed):
    def train(job):
        optimizers = [job.make(module.parameters(), lr=0.05) for module in (job.model, job.other, job.loss)]
        job.epoch(job.load(job.model, optimizers), *optimizers)

    assert_equal(comm, seed, train)


def test_a_later_loader_makes_a_model_of_what_was_beside_another(comm, seed):
    def train(job):
        optimizer = job.make(job.parameters(), lr=0.05)
        first = job.load(job.model, optimizer)
        job.epoch(first, optimizer)
        second = job.load(job.other, optimizer)
        for (left, _, target), (_, right, _) in zip(first, second, strict=True):
            optimizer.zero_grad()
            job.loss((job.model(left) * job.other(right)).sum(-1), target).backward()
            optimizer.step()
        if job.managed:
            state = adaloader.full_state_dict(job.other)
            job.other = Tower().double()
            if comm.rank == 0:
                job.other.load_state_dict(state)
            for parameter in job.other.parameters():
                comm.Bcast(parameter.detach().numpy())

    assert_equal(comm, seed, train)


def test_layers_and_tables_that_are_replaced(comm, seed):
    def train(job):
        optimizer = job.make(job.parameters(), lr=0.05)
        job.epoch(job.load(job.model, optimizer), optimizer)
        torch.manual_seed(seed + (comm.rank if job.managed else 0))
        job.model.layer = nn.Linear(DIM, DIM).double()
        job.model.table = nn.Embedding(ROWS + 5, DIM).double()
        optimizer.param_groups[0]["params"] = job.parameters()
        job.epoch(job.load(job.model, optimizer), optimizer)

    job = assert_equal(comm, seed, train)
    if comm.size > 1:
        assert "it came into the model after its first loader" in str(job.loaders[-1].explain())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("beside", [True, False])
def test_what_came_after_the_last_loader_is_not_stepped_apart(comm, seed, beside):
    job = Job(comm, seed, True)
    job.loss, job.other = Scaled().double(), Tower().double()
    optimizer = job.make(job.model.parameters(), lr=0.05)
    loader = job.load(job.model, optimizer)
    if beside:
        optimizer.add_param_group({"params": list(job.loss.parameters())})
    else:
        job.model.layer = nn.Linear(DIM, DIM).double()
        optimizer.add_param_group({"params": list(job.model.layer.parameters())})
    before = [p.detach().clone() for p in optimizer.param_groups[1]["params"]]
    names = "one of shape .1,. beside the model" if beside else "layer.weight, layer.bias"
    with pytest.raises(ManagedTableError, match=f"Adagrad has gradients .*{names}.*Build another AdaLoader"):
        job.epoch(loader, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(optimizer.param_groups[1]["params"], before, strict=True))
    loader = job.load(job.model, optimizer)
    job.epoch(loader, optimizer)
    for parameter in optimizer.param_groups[1]["params"]:
        others = comm.allgather(parameter.detach())
        assert all(torch.equal(other, parameter) for other in others)
    job.close()


@pytest.mark.ranks(2)
def test_an_optimizer_that_no_loader_was_given(comm, seed):
    job = Job(comm, seed, True)
    optimizer, own = job.make(job.model.parameters(), lr=0.05), torch.optim.SGD(job.loss.parameters(), lr=0.1)
    loader = job.load(job.model, optimizer)
    with pytest.warns(UserWarning, match=r"SGD trains 2 parameters .*optimizer=\[...\]"):
        job.epoch(loader, optimizer, own)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        job.epoch(loader, optimizer, own)
        for each in (torch.optim.SGD(job.model.layer.parameters(), lr=0.0), copy.deepcopy(own)):
            each.step()  # what is averaged, and what has no gradient
    job.close()


def test_a_step_inside_of_backward(comm, seed):
    job = Job(comm, seed, True)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in job.model.parameters()}
    loader = job.load(job.model, list(optimizers.values()))

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    hooks = [parameter.register_post_accumulate_grad_hook(step) for parameter in job.model.parameters()]
    ids, _, _ = next(iter(loader))
    if comm.size == 1:
        job.model(ids).sum().backward()
    else:
        with pytest.raises(ManagedTableError, match="inside backward.*Step after backward"):
            job.model(ids).sum().backward()
    for hook in hooks:  # which hold what holds them
        hook.remove()
    job.close()


@pytest.mark.ranks(2)
def test_gradients_applied_by_hand(comm, seed):
    """Without an optimizer: equal where all ranks have a part in all batches, and a warning that they must."""

    def train(job):
        loader = job.load(job.model, None)
        for left, _, target in loader:
            F.mse_loss(job.model.layer(job.model.table.weight[left]).sum(-1), target).backward()
            with torch.no_grad():
                for parameter in job.model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None

    plain, job = Job(comm, seed, False), Job(comm, seed, True, strategy={"table.weight": "dense"})
    train(plain)
    with pytest.warns(UserWarning, match="no loader was given an optimizer.*drop_last=True") as found:
        train(job)
    assert sum("optimizer" in str(warning.message) for warning in found) == 1
    for ours, theirs in zip(job.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    job.close()
