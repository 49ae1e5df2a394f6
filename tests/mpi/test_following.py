"""A rank without a sample in the last batch ends the epoch with the dense state that the others have."""

import pytest
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader

BATCH_SIZE = 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 4)
        self.dense = nn.Linear(12, 1)

    def forward(self, ids):
        return self.dense(self.table(ids).flatten(1)).squeeze(1)


def train(ranks, seed, managed):
    generator = torch.Generator().manual_seed(seed)
    samples = 2 * BATCH_SIZE * ranks + 1  # the last global batch is one sample, on rank 0
    dataset = torch.utils.data.TensorDataset(
        torch.randint(0, 1000, (samples, 3), generator=generator),
        torch.rand(samples, generator=generator, dtype=torch.float64) * 50,
    )
    torch.manual_seed(seed)
    model = Model().double()
    optimizers = [
        torch.optim.Adagrad(model.table.parameters(), lr=0.1),
        torch.optim.Adam(model.dense.parameters(), lr=0.01),
    ]
    if managed:
        loader = AdaLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, model=model, optimizer=optimizers)
    else:
        loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE * ranks, shuffle=True)
    for _ in range(3):
        for ids, target in loader:
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.mse_loss(model(ids), target).backward()
            nn.utils.clip_grad_norm_(model.dense.parameters(), 0.5)
            for optimizer in optimizers:
                optimizer.step()
    if not managed:
        return model.state_dict(), optimizers[1].state_dict()
    own = {name: p.detach().clone() for name, p in model.dense.named_parameters(prefix="dense")}
    state = adaloader.full_state_dict(model)
    loader.close()
    return own | state, optimizers[1].state_dict()


@pytest.mark.ranks(2)
def test_gradients_clipped_in_the_loop(comm, seed):
    weights, adam = train(comm.size, seed, managed=True)
    expected, expected_adam = train(comm.size, seed, managed=False)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=0)
    torch.testing.assert_close(adam["state"], expected_adam["state"], atol=1e-10, rtol=0)
