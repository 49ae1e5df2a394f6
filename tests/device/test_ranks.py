"""Models on a device on several ranks: rows are on the hosts, and results are those of one process."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader, full_state_dict

ROWS, DIM, BATCH = 40, 3, 6


class Factors(nn.Module):
    """Two tables and nothing else: dense parameters on that device have no backend of `torch.distributed`."""

    def __init__(self):
        super().__init__()
        self.left = nn.Embedding(ROWS, DIM, dtype=torch.float64)
        self.right = nn.Embedding(ROWS, DIM, dtype=torch.float64)

    def forward(self, ids):
        ids = ids.to(self.left.weight.device)
        return (self.left(ids[:, 0]) * self.right(ids[:, 1])).sum(1)


def train(model, optimizer, batches, device):
    for ids, target in batches:
        optimizer.zero_grad()
        F.mse_loss(model(ids), target.to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


OPTIMIZERS = {
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_one_process(name, device):
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    seed = comm.bcast(np.random.SeedSequence().entropy % 2**31 if comm.rank == 0 else None)
    print(f"seed {seed}")
    random = torch.Generator().manual_seed(seed)
    samples = 8 * BATCH * comm.size
    ids = torch.randint(0, ROWS, (samples, 2), generator=random)
    target = torch.randn(samples, generator=random, dtype=torch.float64)
    torch.manual_seed(seed)
    plain = Factors().to(device)
    optimizer = OPTIMIZERS[name](plain.parameters())
    whole = BATCH * comm.size
    train(plain, optimizer, zip(ids.split(whole), target.split(whole), strict=True), device)
    torch.manual_seed(seed)
    model = Factors().to(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    data = torch.utils.data.TensorDataset(ids, target)
    loader = AdaLoader(data, BATCH, model=model, optimizer=optimizer, min_rows=1)
    train(model, optimizer, loader, device)
    weights = full_state_dict(model)
    comm.Barrier()
    loader.close()
    for key, value in weights.items():
        torch.testing.assert_close(value, plain.state_dict()[key].cpu(), rtol=1e-11, atol=1e-11)
