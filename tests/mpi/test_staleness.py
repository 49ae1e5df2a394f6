"""Loaders with staleness: what None and s promise, and what stays as it is; in memory that ranks share, and apart.

Where a loss is linear in the rows, its gradients do not depend on how old they are: plain SGD then gives the values
of plain PyTorch, whatever arrives when.
"""

import pytest
import torch
from torch import nn

import adaloader
from adaloader import AdaLoader

ROWS, DIM = 120, 3
SHARED_OR_APART = pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])
TECHNIQUES = ["all", "relocation", "replication", "none"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.2),
    "rowwise": lambda p: adaloader.RowwiseAdagrad(p, lr=0.2),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.05),
}


def table(seed: int, sparse: bool = False) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(ROWS, DIM, sparse=sparse).double()


def sample_set(seed: int, samples: int = 240, fields: int = 4) -> torch.utils.data.TensorDataset:
    """Ids, some of them hot, and a coefficient for each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ROWS, (samples, fields), generator=generator)
    ids[:, 0] = ids[:, 0] % 5
    return torch.utils.data.TensorDataset(ids, torch.randn(samples, fields, dtype=torch.float64, generator=generator))


def everything_seen(model: nn.Embedding, comm) -> list[torch.Tensor]:
    """All rows as each rank sees them now."""
    with torch.no_grad():
        mine = model(torch.arange(ROWS)).numpy().copy()
    return [torch.from_numpy(each) for each in comm.allgather(mine)]


def train(loader, model, optimizer, epochs: int = 1) -> list[float]:
    losses = []
    for _ in range(epochs):
        for ids, coefficients in loader:
            optimizer.zero_grad()
            loss = (model(ids).sum(-1) * coefficients).sum(-1).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("techniques", [*TECHNIQUES, "shared"])
@pytest.mark.parametrize("staleness", [None, 2])
def test_no_update_is_lost_or_applied_twice(comm, seed, staleness, techniques):
    model, plain = table(seed), table(seed)
    data = sample_set(seed)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    options = {"techniques": techniques, "shared_memory": False} if techniques != "shared" else {}
    loader = AdaLoader(data, 7, model=model, optimizer=optimizer, min_rows=1, staleness=staleness, **options)
    train(loader, model, optimizer, epochs=2)
    seen = everything_seen(model, comm)
    train(torch.utils.data.DataLoader(data, 7 * comm.size), plain, plain_sgd := OPTIMIZERS["sgd"](plain.parameters()))
    train(torch.utils.data.DataLoader(data, 7 * comm.size), plain, plain_sgd)
    for each in seen:  # the pass is over: every rank sees all of it
        torch.testing.assert_close(each, plain.weight.detach(), rtol=1e-12, atol=1e-12)
    state = adaloader.full_state_dict(model)
    if comm.rank == 0:
        torch.testing.assert_close(state["weight"], plain.weight.detach(), rtol=1e-12, atol=1e-12)
    loader.close()


@SHARED_OR_APART
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_all_ranks_agree_at_the_end_of_a_pass(comm, seed, shared_memory, optimizer_name):
    model = table(seed, sparse=optimizer_name == "sparse_adam")
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    data = sample_set(seed)
    loader = AdaLoader(
        data, 8, shuffle=True, model=model, optimizer=optimizer, min_rows=1, staleness=None, shared_memory=shared_memory
    )

    def squared(b):
        return (model(b[0]).sum(-1) - b[1]).square().mean()

    means = []
    for _ in range(4):
        total = []
        for batch in loader:
            optimizer.zero_grad()
            loss = squared(batch)
            loss.backward()
            optimizer.step()
            total.append(loss.item())
        means.append(sum(comm.allgather(sum(total) / len(total))))  # some ranks' samples are harder than others'
        seen = everything_seen(model, comm)
        for other in seen[1:]:
            torch.testing.assert_close(other, seen[0], rtol=1e-9, atol=1e-12)
    assert means[-1] < 0.9 * means[0]
    state = adaloader.full_state_dict(model)
    optimizer_state = adaloader.full_optimizer_state_dict(model, optimizer)
    if comm.rank == 0:
        torch.testing.assert_close(state["weight"], seen[0], rtol=1e-9, atol=1e-12)
        for held in optimizer_state["state"].values():
            assert all(torch.isfinite(part).all() for part in held.values() if torch.is_tensor(part))
    loader.close()


@SHARED_OR_APART
def test_adagrad_of_rows_that_one_rank_alone_uses_is_plain(comm, seed, shared_memory):
    """Each rank has rows of its own: what moves there is updated as one process would."""
    model, plain = table(seed), table(seed)
    own = torch.arange(ROWS)[torch.arange(ROWS) % comm.size == comm.rank]
    torch.manual_seed(seed + comm.rank)
    batches = [own[torch.randint(0, len(own), (6,))] for _ in range(20)]
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    loader = AdaLoader.wrap(
        batches, model=model, optimizer=optimizer, min_rows=1, staleness=None, shared_memory=shared_memory
    )
    plain_optimizer = OPTIMIZERS["adagrad"](plain.parameters())
    for ids in loader:
        optimizer.zero_grad()
        out = model(ids)
        torch.testing.assert_close(out, plain(ids), rtol=1e-12, atol=1e-12)
        out.square().mean().backward()
        optimizer.step()
        plain_optimizer.zero_grad()
        (plain(ids).square().mean() / comm.size).backward()
        plain_optimizer.step()
    torch.testing.assert_close(model(own), plain(own), rtol=1e-12, atol=1e-12)
    loader.close()


@SHARED_OR_APART
@pytest.mark.parametrize("staleness", [1, 3])
def test_a_rank_is_never_further_behind_than_it_may_be(comm, seed, shared_memory, staleness):
    """Every rank adds 1 to its own column of a row that all use, at every step."""
    columns = comm.size
    model = nn.Embedding(4, columns).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [torch.tensor([1])] * 40
    loader = AdaLoader.wrap(
        batches, model=model, optimizer=optimizer, min_rows=1, staleness=staleness, shared_memory=shared_memory
    )
    for step, ids in enumerate(loader):
        optimizer.zero_grad()
        out = model(ids)
        counts = out[0].detach().clone()
        for rank in range(comm.size):
            least = step if rank == comm.rank else step - staleness
            assert least <= counts[rank] <= step + staleness + 1, (step, rank, counts)
        (-comm.size * out[0, comm.rank]).backward()
        optimizer.step()
    assert everything_in(model, comm) == [[40.0] * columns] * comm.size
    loader.close()


def everything_in(model: nn.Embedding, comm) -> list[list[float]]:
    return comm.allgather(model(torch.tensor([1]))[0].tolist())


@SHARED_OR_APART
@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
def test_values_loaded_in_mid_training_are_what_every_rank_goes_on_from(comm, seed, shared_memory, optimizer_name):
    model, other = table(seed), table(seed + 1)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    loader = AdaLoader(
        sample_set(seed), 8, model=model, optimizer=optimizer, min_rows=1, staleness=None, shared_memory=shared_memory
    )
    train(loader, model, optimizer)
    adaloader.load_full_state_dict(model, other.state_dict() if comm.rank == 0 else None)
    for each in everything_seen(model, comm):
        torch.testing.assert_close(each, other.weight.detach())
    train(loader, model, optimizer)
    seen = everything_seen(model, comm)
    assert not torch.equal(seen[0], other.weight.detach())
    for each in seen[1:]:
        torch.testing.assert_close(each, seen[0], rtol=1e-9, atol=1e-12)
    loader.close()


@SHARED_OR_APART
def test_ranks_with_different_numbers_of_batches(comm, seed, shared_memory):
    model, plain = table(seed), table(seed)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    torch.manual_seed(seed + comm.rank)
    batches = [(torch.randint(0, ROWS, (3, 2)), torch.randn(3, 2).double()) for _ in range(5 + 3 * comm.rank)]
    loader = AdaLoader.wrap(
        batches, model=model, optimizer=optimizer, min_rows=1, staleness=None, shared_memory=shared_memory
    )
    train(loader, model, optimizer)
    seen = everything_seen(model, comm)
    total = torch.zeros(ROWS, DIM, dtype=torch.float64)
    for of_rank in comm.allgather([(ids.numpy(), c.numpy()) for ids, c in batches]):
        for number, (ids, coefficients) in enumerate(of_rank):
            ranks = sum(number < 5 + 3 * rank for rank in range(comm.size))
            gradient = torch.from_numpy(coefficients).reshape(-1, 1).expand(-1, DIM) / 3 / ranks
            total.index_add_(0, torch.from_numpy(ids).reshape(-1), gradient.contiguous())
    expected = plain.weight.detach() - 0.5 * total
    for each in seen:
        torch.testing.assert_close(each, expected, rtol=1e-11, atol=1e-11)
    loader.close()


@SHARED_OR_APART
def test_changes_below_a_threshold_wait_for_the_end_of_the_pass(comm, seed, shared_memory):
    model, plain = table(seed), table(seed)
    data = sample_set(seed)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    loader = AdaLoader(
        data,
        8,
        model=model,
        optimizer=optimizer,
        min_rows=1,
        staleness=None,
        shared_memory=shared_memory,
        update_threshold=1e6,
    )
    train(loader, model, optimizer)
    train(torch.utils.data.DataLoader(data, 8 * comm.size), plain, OPTIMIZERS["sgd"](plain.parameters()))
    for each in everything_seen(model, comm):
        torch.testing.assert_close(each, plain.weight.detach(), rtol=1e-12, atol=1e-12)
    loader.close()


@SHARED_OR_APART
def test_dense_parameters_stay_exact(comm, seed, shared_memory):
    """They are summed at every step whatever the staleness of tables: all ranks have the same."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"table": nn.Embedding(ROWS, DIM), "layer": nn.Linear(DIM, 1)}).double()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    loader = AdaLoader(
        sample_set(seed), 8, model=model, optimizer=optimizer, min_rows=1, staleness=None, shared_memory=shared_memory
    )
    for ids, coefficients in loader:
        optimizer.zero_grad()
        (model["layer"](model["table"](ids))[..., 0] * coefficients).square().mean().backward()
        optimizer.step()
    weights = comm.allgather(model["layer"].weight.detach().numpy().copy())
    assert all((each == weights[0]).all() for each in weights)
    assert loader.stats()["on_demand"] <= 8 * 4  # those of the batch from which keys were learned
    loader.close()
