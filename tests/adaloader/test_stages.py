"""Another optimizer in the next stage: a later loader brings it, and tables go on under it as in plain PyTorch."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader

import adaloader
from adaloader import AdaLoader, ManagedTableError, full_optimizer_state_dict, full_state_dict
from tests.stages import DIM, OPTIMIZERS, ROWS, Layers, data, run, run_plain, train
from tests.training import assert_same_optimizer_state, assert_same_tensors

BATCH = 6


def managed(samples, model, optimizer, **options) -> AdaLoader:
    return AdaLoader(samples, BATCH, model=model, optimizer=optimizer, min_rows=1, **options)


def assert_same_runs(ours, plain) -> None:
    model, optimizer, losses = ours
    torch.testing.assert_close(losses, plain[2], rtol=1e-9, atol=0)
    assert_same_tensors(full_state_dict(model), plain[0].state_dict(), 1e-9)
    assert_same_optimizer_state(full_optimizer_state_dict(model, optimizer), plain[1].state_dict(), 1e-9)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(OPTIMIZERS, OPTIMIZERS)))
def test_two_stages(seed, first, second):
    assert_same_runs(run(seed, [first, second], managed), run_plain(seed, [first, second], BATCH))


KINDS = {"others": ["Adam", "SGD", "AdamW", "Adagrad"], "the same": ["Adagrad", "Adagrad again", "Adagrad"]}


@pytest.mark.parametrize("options", [{"frozen": 1}, {"most_steps": 4}, {"most_steps": 0}], ids=str)
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_stages_that_leave_out_a_table_or_end_early(seed, kinds, options):
    """A table that a stage leaves out stands still; a loop that is left has planned batches, and a gradient to
    apply."""
    assert_same_runs(run(seed, kinds, managed, **options), run_plain(seed, kinds, BATCH, **options))


def test_an_optimizer_that_comes_with_state(seed):
    """The state that the second stage's optimizer has loaded is its own, not what the first stage's left."""
    kinds = ["Adam", "Adam"]
    loaded = run_plain(seed, ["Adam"], BATCH)[1].state_dict()

    def stages(make_loader):
        torch.manual_seed(seed)
        model = Layers()
        for _ in kinds:
            optimizer = OPTIMIZERS["Adam"](model.parameters())
            optimizer.load_state_dict(copy.deepcopy(loaded))
            losses = train(model, optimizer, make_loader(data(seed), model, optimizer))
        return model, optimizer, losses

    assert_same_runs(stages(managed), stages(lambda samples, model, optimizer: DataLoader(samples, BATCH)))


def test_the_optimizer_before(seed):
    """It is refused, in a step and in a later loader, before anything is changed; it holds nothing for tables."""
    torch.manual_seed(seed)
    model = Layers()
    before, after = optim.Adam(model.parameters(), lr=0.1), optim.SGD(model.parameters(), lr=0.1)
    train(model, before, managed(data(seed), model, before))
    loader = managed(data(seed), model, after)
    assert set(before.state_dict()["state"]) == {3, 4}  # the linear layer's
    weights = full_state_dict(model)
    with pytest.raises(ManagedTableError, match=r"Adam trained table .* until a later loader was given another"):
        before.step()
    with pytest.raises(ValueError, match=r"this Adam trained table .* until a later loader.*build a new optimizer"):
        managed(data(seed), model, before)
    with pytest.raises(ValueError, match=r"held by SGD and Adam"):
        managed(data(seed), model, [after, optim.Adam(model.parameters())])
    assert_same_tensors(full_state_dict(model), weights, 0)
    train(model, after, loader)
    managed(data(seed), model, optim.Adam(model.parameters()))  # a new one of that kind


def test_an_optimizer_that_can_train_no_table(seed):
    model = Layers()
    first = optim.Adam(model.parameters(), lr=0.1)
    loader = managed(data(seed), model, first)
    train(model, first, loader)
    with pytest.raises(adaloader.UnsupportedOptimizerError, match="Rprop"):
        managed(data(seed), model, optim.Rprop(model.parameters()))
    train(model, first, loader)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_deferred_tables(seed, kind):
    """Rows that are first touched in the second stage start as they would have; where the first stage's steps have
    moved them, which nobody has noted under the second's rule, that is an error."""

    def stages(rows: int):
        torch.manual_seed(seed)
        with adaloader.deferred_init(min_rows=2, seed=seed):
            table = nn.Embedding(rows, DIM).double()
        model = nn.Sequential(table, nn.Flatten(0), nn.Linear(DIM, 1, dtype=torch.float64))
        for stage, name in enumerate([kind, "Adam"]):
            optimizer = OPTIMIZERS[name](model.parameters())
            ids = torch.arange(10 * stage, 10 * stage + 16)
            for (batch,) in managed(torch.utils.data.TensorDataset(ids), model, optimizer):
                optimizer.zero_grad()
                model[0](batch).square().sum().backward()
                optimizer.step()
        return full_state_dict(model)["0.weight"]

    if kind == "SGD, decay":
        with pytest.raises(ValueError, match=r"cannot go on under this Adam: its 3 steps under .* never looked up"):
            stages(ROWS)
        return
    whole = stages(ROWS)
    torch.manual_seed(seed)
    with adaloader.deferred_init(min_rows=2, seed=seed):
        declared = nn.Embedding(ROWS, DIM).double()
    model = nn.Sequential(declared)
    loader = AdaLoader([torch.tensor(0)], model=model, optimizer=None)
    plain = nn.Embedding.from_pretrained(full_state_dict(model)["0.weight"], freeze=False)
    loader.close()
    for stage, name in enumerate([kind, "Adam"]):
        optimizer = OPTIMIZERS[name](plain.parameters())
        for (batch,) in DataLoader(torch.utils.data.TensorDataset(torch.arange(10 * stage, 10 * stage + 16)), BATCH):
            optimizer.zero_grad()
            plain(batch).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(whole, plain.weight.detach(), rtol=1e-9, atol=1e-12)


def test_a_checkpoint_of_the_second_stage(seed, tmp_path):
    """A run that is resumed in its second stage goes on from its own loader and optimizer alone."""
    kinds = ["Adam", "Adagrad"]
    model, optimizer, _ = run(seed, kinds, managed)
    loader = managed(data(seed + 2), model, optimizer)
    adaloader.save(tmp_path / "saved", loader)
    resumed = Layers()
    optimizer = OPTIMIZERS["Adagrad"](resumed.parameters())
    loader = managed(data(seed + 2), resumed, optimizer)
    adaloader.load(tmp_path / "saved", loader)
    train(resumed, optimizer, loader)
    plain, plain_optimizer, _ = run_plain(seed, kinds, BATCH)
    train(plain, plain_optimizer, DataLoader(data(seed + 2), BATCH))
    assert_same_tensors(full_state_dict(resumed), plain.state_dict(), 1e-9)
