"""On several ranks: tables that are used as a whole, read as a whole, written outside the optimizer, and copied."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader, ManagedTableError, deferred_init, full_state_dict
from adaloader.tables.table_parameter import TableParameter

ROWS, DIM, BATCH_SIZE = 41, 3, 6


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM)
        self.bare = nn.Parameter(torch.randn(ROWS, DIM))
        self.hidden = nn.Linear(DIM, DIM)
        self.tied = tied

    def forward(self, ids):
        x = self.hidden(self.emb(ids).sum(1) + self.bare[ids[:, 0]])
        scores = x @ self.emb.weight.T if self.tied else x
        return scores.logsumexp(-1)


def train(comm, seed, managed, tied=False, write=None, samples=None, steps_before_tied=0, optimizer="Adagrad"):
    generator = torch.Generator().manual_seed(seed)
    samples = 4 * BATCH_SIZE * comm.size if samples is None else samples
    dataset = torch.utils.data.TensorDataset(
        torch.randint(0, ROWS, (samples, 2), generator=generator),
        torch.randn(samples, generator=generator, dtype=torch.float64),
    )
    torch.manual_seed(seed)
    model = Model(tied and not steps_before_tied).double()
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    if managed:
        loader = AdaLoader(dataset, batch_size=BATCH_SIZE, model=model, optimizer=optimizer, min_rows=1)
    else:
        loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE * comm.size)
    step = 0
    for _ in range(2):
        for ids, target in loader:
            optimizer.zero_grad()
            F.mse_loss(model(ids), target).backward()
            optimizer.step()
            step += 1
            if step == steps_before_tied:
                model.tied = True
            if write is not None:
                write(model)
    if not managed:
        return model.state_dict(), model
    state = full_state_dict(model)
    loader.close()
    return state, model


def assert_same_as_plain(comm, seed, **how):
    expected, _ = train(comm, seed, managed=False, **how)
    state, model = train(comm, seed, managed=True, **how)
    if comm.rank == 0:
        torch.testing.assert_close(dict(state), dict(expected), atol=1e-9, rtol=1e-9)
    return model


@pytest.mark.parametrize("optimizer", ["Adagrad", "AdamW"])
def test_a_tied_table_becomes_dense(comm, seed, optimizer):
    model = assert_same_as_plain(comm, seed, tied=True, optimizer=optimizer)
    assert type(model.emb.weight) is nn.Parameter and type(model.bare) is TableParameter


def test_a_tied_table_with_a_last_batch_that_does_not_divide(comm, seed):
    assert_same_as_plain(comm, seed, tied=True, samples=3 * BATCH_SIZE * comm.size + 2)


@pytest.mark.parametrize("samples", [None, "the last rank has none in the last batch"])
@pytest.mark.parametrize("optimizer", ["Adagrad", "AdamW"])
def test_a_use_as_a_whole_after_the_first_step_is_exact(comm, seed, optimizer, samples, caplog):
    samples = samples and 3 * BATCH_SIZE * comm.size + 1
    model = assert_same_as_plain(comm, seed, tied=True, steps_before_tied=2, optimizer=optimizer, samples=samples)
    said = [record.getMessage() for record in caplog.records if "is used as a whole" in record.getMessage()]
    if comm.size == 1:
        assert type(model.emb.weight) is nn.Parameter
        return
    assert type(model.emb.weight) is TableParameter and len(said) == 1
    assert "'emb.weight'" in said[0] and "test_whole_use.py" in said[0] and "'emb.weight': 'dense'" in said[0]


def penalty(model):
    """Of a table, of a view of it, and of what has no lookup in between."""
    (model.emb.weight.square().sum() * 1e-2 + model.bare[:-1].abs().sum() * 1e-3).backward()


@pytest.mark.parametrize("options", [{}, {"shared_memory": False}], ids=["shared", "apart"])
@pytest.mark.parametrize("optimizer", ["Adagrad", "Adam"])
def test_a_penalty_that_begins_later_is_exact(comm, seed, optimizer, options):
    torch.manual_seed(seed)
    plain = Model(False).double()
    model = copy.deepcopy(plain)
    dataset = torch.randint(0, ROWS, (4 * BATCH_SIZE * comm.size, 2), generator=torch.Generator().manual_seed(seed))
    plain_optimizer, optimizer = (getattr(torch.optim, optimizer)(m.parameters(), lr=0.1) for m in (plain, model))
    loader = AdaLoader(dataset, batch_size=BATCH_SIZE, model=model, optimizer=optimizer, min_rows=1, **options)
    for made, its, batches in (
        (plain, plain_optimizer, dataset.split(BATCH_SIZE * comm.size)),
        (model, optimizer, loader),
    ):
        for step, ids in enumerate(batches):
            its.zero_grad()
            made(ids).mean().backward()
            if step in (1, 3):
                penalty(made)
            its.step()
    if comm.size > 1:
        assert type(model.emb.weight) is TableParameter
    state = full_state_dict(model)
    if comm.rank == 0:
        torch.testing.assert_close(dict(state), plain.state_dict(), atol=1e-9, rtol=1e-9)
    loader.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", ["managed", None])
def test_a_use_as_a_whole_of_what_is_to_stay_managed_is_refused(comm, seed, strategy):
    with deferred_init(min_rows=1, seed=seed) if strategy is None else contextlib.nullcontext():
        model = Model(False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategies = {} if strategy is None else {"emb.weight": strategy}
    loader = AdaLoader.wrap(
        [torch.tensor([[1, 2]])] * 3, model=model, optimizer=optimizer, min_rows=1, strategy=strategies
    )
    with pytest.raises(ManagedTableError, match=r"emb\.weight.*(deferred_init|strategy=).*under torch\.no_grad"):
        for step, ids in enumerate(loader):
            model(ids).mean().backward()
            optimizer.step()
            if step == 1:
                model.emb.weight.square().sum()
    comm.barrier()
    loader.close()


def test_a_constraint_while_gradients_are_recorded(comm, seed):
    """Nothing goes backward through it, but that is not known when it reads the table."""

    def constrain(model):
        model.emb.weight.data = F.normalize(model.emb.weight, dim=-1)

    assert_same_as_plain(comm, seed, write=constrain)
    assert_same_as_plain(comm, seed, write=torch.no_grad()(constrain))


def normalise(model):
    model.emb.weight.data = F.normalize(model.emb.weight.data, dim=-1)


def divide_by_norm(model):
    model.emb.weight.data.div_(model.emb.weight.data.norm(dim=1, keepdim=True))


def clamp(model):
    with torch.no_grad():
        model.emb.weight.clamp_(-0.5, 0.5)
        model.bare.mul_(0.99)


def some_rows(model):
    with torch.no_grad():
        model.emb.weight[0] = 0
        model.bare[[3, 5, 3]] = 0.5
        model.emb.weight.data[4:7] = F.normalize(model.emb.weight.data[4:7], dim=-1)


def renorm(model):
    model.emb.weight.data.renorm_(2, 0, 0.7)


@pytest.mark.parametrize("optimizer", ["Adagrad", "AdamW"])
@pytest.mark.parametrize("write", [normalise, divide_by_norm, clamp, some_rows, renorm])
def test_writes_after_each_step_count(comm, seed, write, optimizer):
    assert_same_as_plain(comm, seed, write=write, optimizer=optimizer)


def test_rows_that_ranks_write_by_themselves(comm):
    model, loader = made(comm)
    with torch.no_grad():
        model.emb.weight[torch.tensor([comm.rank, 20 + comm.rank])] = float(comm.rank + 1)
    after = model.emb(torch.arange(ROWS)).detach()
    for rank in range(comm.size):
        assert (after[rank] == rank + 1).all() and (after[20 + rank] == rank + 1).all()
    loader.close()


def test_one_rank_alone_reads_and_copies(comm, seed):
    model, loader = made(comm)
    expected = copy.deepcopy(model)
    everything = torch.arange(ROWS)
    if comm.rank == comm.size - 1:
        whole = model.emb.weight.detach().clone()
        assert torch.equal(whole, expected.emb(everything).detach())
        assert type(expected.emb.weight) is nn.Parameter
    comm.barrier()
    loader.close()


def test_a_state_dict_is_loaded_by_all(comm, seed):
    model, loader = made(comm)
    other = Model(False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.emb(torch.arange(ROWS)), other.emb(torch.arange(ROWS)))
    loader.close()


def made(comm):
    torch.manual_seed(comm.rank)  # rank 0's values count
    model = Model(False)
    loader = AdaLoader(
        torch.utils.data.TensorDataset(torch.zeros(8, 2, dtype=torch.int64)),
        batch_size=2,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        min_rows=1,
    )
    return model, loader
