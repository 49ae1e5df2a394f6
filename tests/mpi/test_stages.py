"""Another optimizer in the next stage, on several ranks: see `tests/adaloader/test_stages.py`."""

from __future__ import annotations

import itertools

import pytest
import torch

from adaloader import AdaLoader, full_optimizer_state_dict, full_state_dict
from tests.stages import OPTIMIZERS, SAMPLES, data, run, run_plain, train
from tests.training import assert_same_optimizer_state, assert_same_tensors, close

PAIRS = [
    *itertools.product(["Adagrad", "Adam", "SGD"], OPTIMIZERS),
    ("SGD, decay", "Adagrad"),
    ("AdamW", "SGD"),
    ("SGD, momentum", "RMSprop"),
]


class Loaders:
    """Builds loaders, and keeps them open."""

    def __init__(self, batch_size: int, **options):
        self.made = []
        self._batch_size, self._options = batch_size, options

    def __call__(self, samples, model, optimizer) -> AdaLoader:
        options = {"model": model, "optimizer": optimizer, "min_rows": 1, **self._options}
        self.made.append(AdaLoader(samples, self._batch_size, **options))
        return self.made[-1]

    def close(self, comm) -> None:
        *others, last = self.made
        for loader in others:
            loader.close()
        close(comm, last)


def check(comm, seed, kinds, loaders, **options):
    model, optimizer, losses = run(seed, kinds, loaders, **options)
    weights, state = full_state_dict(model), full_optimizer_state_dict(model, optimizer)
    plain, plain_optimizer, plain_losses = run_plain(seed, kinds, 2 * comm.size, **options)
    ours = torch.tensor(comm.allgather(losses)).mean(0)
    torch.testing.assert_close(ours, torch.tensor(plain_losses), rtol=1e-6, atol=0)
    if comm.rank == 0:
        assert_same_tensors(weights, plain.state_dict(), 1e-8)
        assert_same_optimizer_state(state, plain_optimizer.state_dict(), 1e-8)
    loaders.close(comm)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_stages(comm, seed, first, second):
    assert SAMPLES % (2 * comm.size) == 0
    check(comm, seed, [first, second], Loaders(2))


@pytest.mark.parametrize("options", [{"frozen": 1}, {"most_steps": 3}, {"most_steps": 0}], ids=str)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_stages_that_leave_out_a_table_or_end_early(comm, seed, shared_memory, options):
    kinds = ["Adam", "SGD", "AdamW", "Adagrad", "Adagrad again"]
    check(comm, seed, kinds, Loaders(2, shared_memory=shared_memory), **options)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_same_kind_with_staleness(comm, seed, kind, shared_memory):
    """The state begins anew on all ranks, and training goes on; all ranks end with the same."""
    loaders = Loaders(2, staleness=None, shared_memory=shared_memory)
    model, optimizer, _ = run(seed, [kind, kind, kind], loaders)
    state = full_optimizer_state_dict(model, optimizer)
    weights = full_state_dict(model)
    steps = SAMPLES // (2 * comm.size)
    if comm.rank == 0:
        assert all(bool(value.isfinite().all()) for value in weights.values())
        counts = {int(entry["step"]) for entry in state["state"].values() if "step" in entry}
        assert all(steps <= count <= comm.size * steps for count in counts)  # of the last stage alone
    loaders.close(comm)


@pytest.mark.ranks(2)
def test_another_kind_with_staleness(comm, seed):
    """Refused on all ranks where rows of several tables lie together, before anything is changed."""
    loaders = Loaders(2, staleness=None)
    model, optimizer, _ = run(seed, ["Adagrad"], loaders)
    with pytest.raises(ValueError, match=r"cannot go on under this Adam: with several ranks and staleness"):
        loaders(data(seed), model, OPTIMIZERS["Adam"](model.parameters()))
    train(model, optimizer, loaders.made[0])
    loaders.close(comm)


@pytest.mark.ranks(2)
def test_ranks_that_bring_other_optimizers(comm, seed):
    loaders = Loaders(2)
    model, optimizer, _ = run(seed, ["Adagrad"], loaders)
    kind = "SGD" if comm.rank == 0 else "Adam"
    with pytest.raises(ValueError, match=r"other optimizers for the next stage than rank 0"):
        loaders(data(seed), model, OPTIMIZERS[kind](model.parameters()))
    train(model, optimizer, loaders.made[0])
    loaders.close(comm)
