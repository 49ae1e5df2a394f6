"""One pass that is begun on 2 ranks, goes on on 3, on 1, and ends on 4: plain PyTorch's losses, each sample once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from adaloader import full_state_dict
from tests.resuming import OPTIMIZERS, Model, Script, Visits

GLOBAL_BATCH, BATCHES = 12, 8


def plain_losses(weights: dict[str, torch.Tensor], optimizer: str, seed: int, order: list[int]) -> list[float]:
    """Train a plain model from `weights` on the samples in this order; return the losses."""
    model = Model(torch.float64, 0.0, deferred=False)
    model.load_state_dict(weights)
    optim = OPTIMIZERS[optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optim, [2, 5, 9], gamma=0.7)
    data, losses = Visits(GLOBAL_BATCH * BATCHES, seed), []
    for at in range(0, len(order), GLOBAL_BATCH):
        samples = order[at : at + GLOBAL_BATCH]
        optim.zero_grad()
        loss = nn.functional.mse_loss(model({"ids": data.ids[samples]}), data.label[samples])
        loss.backward()
        optim.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_two_three_one_and_four_ranks_in_one_pass(comm, seed, shared_path, optimizer):
    if comm.size != 4:
        pytest.skip("needs 4 ranks")
    folder = shared_path
    order, losses, weights = [], [], {}
    _leave_group()  # of tests before, with all ranks
    for part, ranks in enumerate((2, 3, 1, 4)):
        own = comm.Split(int(comm.rank >= ranks), comm.rank)
        seen, lost = [], []
        if comm.rank < ranks:
            size = GLOBAL_BATCH // ranks
            script = Script(own, optimizer, torch.float64, 0.0, GLOBAL_BATCH * BATCHES, size, seed).start(seed + part)
            if part:
                script.load(folder / "saved")
            else:
                weights = full_state_dict(script.model)
            script.run(2)
            script.save(folder / "saved", asynchronous=True)
            seen, lost = script.seen, script.losses
            script.close()
        _leave_group()
        own.Free()
        of_ranks = list(zip(comm.allgather(seen)[:ranks], comm.allgather(lost)[:ranks], strict=True))
        for batch in range(2):
            share = GLOBAL_BATCH // ranks
            order += [at for ids, _ in of_ranks for at in ids[batch * share : (batch + 1) * share]]
            losses.append(float(np.mean([each[batch] for _, each in of_ranks])))
    assert sorted(order) == list(range(GLOBAL_BATCH * BATCHES))
    if comm.rank == 0:
        np.testing.assert_allclose(losses, plain_losses(weights, optimizer, seed, order), rtol=1e-9)


def _leave_group() -> None:
    """Leave the process group, so that other ranks can have one."""
    if dist.is_initialized():
        dist.destroy_process_group()
