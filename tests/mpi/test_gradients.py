"""Gradients of tables as user code sees them on several ranks: what plain PyTorch on one process gives."""

import pytest
import torch
from torch import nn

from adaloader import AdaLoader, ManagedTableError
from tests import gradient_loops
from tests.loop_cases import Case
from tests.mpi.test_loops import SAMPLES
from tests.training import close


@pytest.mark.parametrize("name", gradient_loops.ALL)
def test_loop_is_plain(name, comm, seed):
    """Where the last batch is shared unevenly: with ranks that have no part of it, or parts of two sizes."""
    for samples in SAMPLES.get(comm.size, (4 * comm.size * 3 + 1,)):
        Case(samples, seed=seed, comm=comm).compare(gradient_loops.ALL[name])


@pytest.mark.parametrize("name", ["clip", "clip values", "with_scaler", "infinite_in_some_rows", "counting_batches"])
def test_loop_is_plain_with_two_optimizers(name, comm, seed):
    Case(4 * comm.size * 3 + 1, seed=seed, optimizer="two", comm=comm).compare(gradient_loops.ALL[name])


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(30, 2)
        self.out = nn.Linear(2, 1)


@pytest.mark.ranks(2)
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_what_would_be_of_one_rank_alone_is_refused(comm, seed):
    """A gradient that autograd gives away, or differentiates again, is of this rank's loss alone."""
    torch.manual_seed(seed)
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 30, (4, 3), generator=torch.Generator().manual_seed(seed + comm.rank))
    loader = AdaLoader.wrap([ids] * 2, model=model, optimizer=optimizer, min_rows=1, comm=comm)
    for batch in loader:
        loss = model.out(model.emb(batch)).square().mean()
        with pytest.raises(ManagedTableError, match=r"emb\.weight.*one of .*parameter\.grad"):
            torch.autograd.grad(loss, model.emb.weight, retain_graph=True)
        (rows,) = torch.autograd.grad(loss, model.out.weight, retain_graph=True)
        assert rows.shape == (1, 2) and model.out.weight.grad is None
        loss.backward(create_graph=True)
        with pytest.raises(ManagedTableError, match=r"cannot be differentiated again.*create_graph=True"):
            model.emb.weight.grad.norm()
        break
    close(comm, loader)


@pytest.mark.ranks(2)
def test_one_backward_over_batches_with_different_shares(comm, seed):
    """Of the last batch rank 0 has two samples, the others one each: no factor is right for both."""
    model, optimizers, _, data, _ = Case(4 * comm.size + comm.size + 1, seed=seed, comm=comm).build()
    loader = AdaLoader(data, 4, model=model, optimizer=optimizers, min_rows=50, comm=comm)
    for _ in range(2):
        for batch in loader:  # one by one; keys are derived here
            model.loss(batch).backward()
            optimizers[0].zero_grad()
    first, last = loader
    with pytest.raises(ManagedTableError, match=r"one backward\(\) over several batches.*drop_last"):
        (model.loss(first) + model.loss(last)).backward()
    close(comm, loader)
