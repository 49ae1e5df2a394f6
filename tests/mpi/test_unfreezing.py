"""Tables that an optimizer is given in mid-training, by `add_param_group`, end as in plain PyTorch on one process."""

import pytest
import torch

from adaloader import AdaLoader, ManagedTableError, full_optimizer_state_dict, full_state_dict
from tests.training import assert_same_optimizer_state, assert_same_tensors, close
from tests.unfreezing import OPTIMIZERS, Layers, batches, train

SHARE = 2


def build(seed, kind):
    torch.manual_seed(seed)
    model = Layers()
    return model, OPTIMIZERS[kind]([*model.last.parameters(), *model.out.parameters()])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradual_unfreezing(comm, seed, kind):
    whole = batches(seed, comm.size * SHARE)
    mine = slice(comm.rank * SHARE, (comm.rank + 1) * SHARE)
    model, optimizer = build(seed, kind)
    loader = AdaLoader.wrap(
        [(ids[mine], target[mine]) for ids, target in whole], model=model, optimizer=optimizer, min_rows=1
    )
    losses = train(model, optimizer, loader)
    weights, state = full_state_dict(model), full_optimizer_state_dict(model, optimizer)
    close(comm, loader)
    plain, plain_optimizer = build(seed, kind)
    plain_losses = train(plain, plain_optimizer, whole)
    total = sum(comm.allgather(losses[-1])) / comm.size
    assert total == pytest.approx(plain_losses[-1], rel=1e-9)
    if comm.rank == 0:
        assert_same_tensors(weights, plain.state_dict(), 1e-9)
        assert_same_optimizer_state(state, plain_optimizer.state_dict(), 1e-9)


def test_a_table_that_is_trained_but_in_no_optimizer(comm, seed):
    """Thawed without an optimizer's being told: an error, before anything is changed."""
    model, optimizer = build(seed, "SGD")
    loader = AdaLoader.wrap(batches(seed, SHARE), model=model, optimizer=optimizer, min_rows=1)
    batch = next(iter(loader))
    model.first.weight.requires_grad_(True)
    with pytest.raises((ManagedTableError, RuntimeError), match=r"first\.weight.*add_param_group"):
        model(batch[0]).sum().backward()
    close(comm, loader)
