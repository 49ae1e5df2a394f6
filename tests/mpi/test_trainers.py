"""Trainers that others have written, one on each rank, with AdaLoader between the ranks: what one process gives, or an
error that says what to do.
"""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from adaloader import AdaLoader, ManagedTableError, full_state_dict
from tests.training import OPTIMIZERS, Shop, Visits, assert_same_tensors, close

BATCH = 3


@pytest.fixture
def lightning():
    pytest.importorskip("lightning", reason="Lightning is not installed (extra trainers)")
    from tests import lightning_module

    environment = dict(os.environ)
    yield lightning_module
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("remainder", [0, 1, -1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"max_epochs": 3, "limit_train_batches": 3},
    ],
    ids=str,
)
def test_lightning_on_every_rank(lightning, comm, seed, options, remainder):
    """Each rank runs a trainer of its own, of one device. The last batch may be shared unevenly, or be on some."""
    data = Visits(comm.size * BATCH * 4 + remainder, seed)

    def train(managed: bool):
        torch.manual_seed(seed)
        module = lightning.ShopModule(schedules=True)
        torch.manual_seed(seed + 1)
        if managed:
            keywords = {"model": module, "optimizer": module.optimizer, "min_rows": 1, "timeout_seconds": 60}
            loader = AdaLoader(data, BATCH, shuffle=True, comm=comm if comm.size > 1 else None, **keywords)
        else:
            loader = DataLoader(data, BATCH * comm.size, shuffle=True)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        lightning.make_trainer(**options).fit(module, loader)
        return module, loader

    ours, loader = train(True)
    weights = full_state_dict(ours)
    close(comm, loader)
    theirs, _ = train(False)
    first = np.array(ours.losses[:1])  # of whole batches, of which each rank has as much
    total = first.copy()
    comm.Allreduce(first, total)
    np.testing.assert_allclose(total / comm.size, theirs.losses[:1], rtol=1e-10)
    if comm.rank == 0:
        assert_same_tensors(weights, theirs.state_dict(), 1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.ranks(2)
def test_accelerate_is_for_one_process(comm, seed):
    """It takes the processes of mpirun for its own, and would share out batches and average gradients too."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (extra trainers)")
    torch.manual_seed(seed)
    model = Shop()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = AdaLoader(Visits(20, seed), 2, model=model, optimizer=optimizer, min_rows=1, comm=comm)
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("PMI", "OMPI", "MPI_"))}
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        assert accelerator.num_processes == 1
        with pytest.raises(ManagedTableError, match=rf"{comm.size} ranks of AdaLoader.*without accelerate"):
            accelerator.prepare(model, optimizer, loader)
    finally:
        os.environ.update(hidden)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    close(comm, loader)
