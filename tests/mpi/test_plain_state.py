"""On several ranks: `state_dict()` of models and optimizers as trainers call it that know nothing of ranks."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

import adaloader
from adaloader import AdaLoader, ManagedTableError
from adaloader.ranks import table_values
from tests.training import OPTIMIZERS, Shop, Visits, assert_same_optimizer_state, assert_same_tensors, close, step

BATCH = 4
MAKE = {**OPTIMIZERS, "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02, weight_decay=0.01)}


@pytest.fixture(params=sorted(MAKE))
def make_optimizer(request):
    return MAKE[request.param]


def managed(comm, make_optimizer, data, **options):
    torch.manual_seed(0)
    model = Shop()
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, AdaLoader(data, BATCH, model=model, optimizer=optimizer, min_rows=1, **options)


def plain(comm, make_optimizer, data):
    torch.manual_seed(0)
    model = Shop()
    return model, make_optimizer(model.parameters()), DataLoader(data, BATCH * comm.size)


def state_of(model, optimizer):
    return copy.deepcopy([model.state_dict(), optimizer.state_dict()])


def assert_same_state(ours, theirs):
    assert_same_tensors(ours[0], theirs[0], 1e-9)
    assert_same_optimizer_state(ours[1], theirs[1], 1e-9)


@pytest.mark.parametrize("options", [{}, {"shared_memory": False}, {"techniques": "none"}], ids=str)
@pytest.mark.parametrize("remainder", [0, 1])
def test_every_rank_gets_what_plain_pytorch_has(comm, seed, make_optimizer, options, remainder):
    """Before the first step, in the midst of a pass and after it, where a rank may have had no last batch."""
    data = Visits(comm.size * BATCH * 4 + remainder, seed)
    model, optimizer, loader = managed(comm, make_optimizer, data, **options)
    twin, twin_optimizer, plain_loader = plain(comm, make_optimizer, data)
    assert_same_state(state_of(model, optimizer), state_of(twin, twin_optimizer))
    for _ in range(2):
        ours, theirs = [], []
        for number, batch in enumerate(loader):
            step(model, optimizer, batch)
            if number == 2:
                ours.append(state_of(model, optimizer))
        for number, batch in enumerate(plain_loader):
            step(twin, twin_optimizer, batch)
            if number == 2:
                theirs.append(state_of(twin, twin_optimizer))
        ours.append(state_of(model, optimizer)), theirs.append(state_of(twin, twin_optimizer))
        for mine, expected in zip(ours, theirs, strict=True):
            assert_same_state(mine, expected)
    close(comm, loader)


def test_a_rank_may_ask_alone(comm, seed, make_optimizer):
    """`if rank == 0: torch.save(...)`, while the others go on."""
    data = Visits(comm.size * BATCH * 2 * comm.size, seed)
    model, optimizer, loader = managed(comm, make_optimizer, data)
    twin, twin_optimizer, plain_loader = plain(comm, make_optimizer, data)
    asked = []
    for number, batch in enumerate(loader):
        step(model, optimizer, batch)
        if number % comm.size == comm.rank:
            asked.append(state_of(model, optimizer))
    expected = []
    for number, batch in enumerate(plain_loader):
        step(twin, twin_optimizer, batch)
        if number % comm.size == comm.rank:
            expected.append(state_of(twin, twin_optimizer))
    assert len(asked) == len(expected) > 1
    for ours, theirs in zip(asked, expected, strict=True):
        assert_same_state(ours, theirs)
    close(comm, loader)


def test_the_best_weights_are_kept_and_put_back(comm, seed, make_optimizer):
    """As early stopping does: all ranks keep a copy, train on, and load it."""
    data = Visits(comm.size * BATCH * 4, seed)
    model, optimizer, loader = managed(comm, make_optimizer, data)
    twin, twin_optimizer, plain_loader = plain(comm, make_optimizer, data)
    for made, its, batches in ((model, optimizer, loader), (twin, twin_optimizer, plain_loader)):
        for _ in range(2):
            best = copy.deepcopy(made.state_dict())
            for batch in batches:
                step(made, its, batch)
        made.load_state_dict(best)
    weights = adaloader.full_state_dict(model)
    assert_same_tensors(model.state_dict(), twin.state_dict(), 1e-9)
    if comm.rank == 0:
        assert_same_tensors(weights, twin.state_dict(), 1e-9)
    close(comm, loader)


@pytest.mark.parametrize("options", [{}, {"shared_memory": False}], ids=str)
@pytest.mark.parametrize("in_midst", [False, True])
def test_training_goes_on_from_what_was_loaded(comm, seed, make_optimizer, options, in_midst):
    """All ranks load weights and optimizer state of some steps ago, or of before the first, and train on."""
    data = Visits(comm.size * BATCH * 4, seed)
    model, optimizer, loader = managed(comm, make_optimizer, data, **options)
    twin, twin_optimizer, plain_loader = plain(comm, make_optimizer, data)
    for made, its, batches in ((model, optimizer, loader), (twin, twin_optimizer, plain_loader)):
        kept = [state_of(made, its)]
        for _ in range(4):
            for number, batch in enumerate(batches):
                if in_midst and number == 2 and kept:
                    weights, state = kept.pop()
                    made.load_state_dict(weights), its.load_state_dict(state)
                step(made, its, batch)
            if kept:
                weights, state = kept.pop()
                made.load_state_dict(weights), its.load_state_dict(state)
            else:
                kept.append(state_of(made, its))
    assert_same_state(state_of(model, optimizer), state_of(twin, twin_optimizer))
    close(comm, loader)


def test_a_rank_that_builds_anew_loads_what_another_job_saved(comm, seed, make_optimizer):
    data = Visits(comm.size * BATCH * 4, seed)
    twin, twin_optimizer, plain_loader = plain(comm, make_optimizer, data)
    for batch in plain_loader:
        step(twin, twin_optimizer, batch)
    weights, state = state_of(twin, twin_optimizer)
    model, optimizer, loader = managed(comm, make_optimizer, data)
    model.load_state_dict(weights), optimizer.load_state_dict(state)
    for made, its, batches in ((model, optimizer, loader), (twin, twin_optimizer, plain_loader)):
        for batch in batches:
            step(made, its, batch)
    assert_same_state(state_of(model, optimizer), state_of(twin, twin_optimizer))
    close(comm, loader)


@pytest.mark.ranks(2)
def test_state_that_does_not_fit_is_refused_before_ranks_meet(comm, seed):
    model, optimizer, loader = managed(comm, OPTIMIZERS["adagrad"], Visits(40, seed))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["params"][0]
    with pytest.raises(ValueError, match="parameter groups have"):
        optimizer.load_state_dict(saved)
    close(comm, loader)


@pytest.mark.parametrize("options", [{}, {"shared_memory": False}], ids=str)
@pytest.mark.parametrize("staleness", [2, None])
def test_with_staleness_all_see_the_same_after_a_pass(comm, seed, staleness, options):
    data = Visits(comm.size * BATCH * 4, seed)
    model, optimizer, loader = managed(comm, OPTIMIZERS["adagrad"], data, staleness=staleness, **options)
    for batch in loader:
        step(model, optimizer, batch)
    ours = state_of(model, optimizer)
    everyones = [comm.bcast(ours, root) for root in range(comm.size)]
    for theirs in everyones:
        assert_same_state(ours, theirs)
    whole = adaloader.full_state_dict(model), adaloader.full_optimizer_state_dict(model, optimizer)
    if comm.rank == 0:
        assert_same_state(ours, whole)
    close(comm, loader)


@pytest.mark.ranks(2)
def test_state_that_only_homes_have_is_gathered_by_all(comm, seed):
    """With staleness Adam's is."""
    model, optimizer, loader = managed(comm, MAKE["adam"], Visits(40, seed), staleness=2)
    for batch in loader:
        step(model, optimizer, batch)
    assert set(model.state_dict()) == set(Shop().state_dict())
    with pytest.raises(RuntimeError, match=r"adaloader\.full_optimizer_state_dict\("):
        optimizer.state_dict()
    close(comm, loader)


@pytest.mark.ranks(2)
def test_what_does_not_fit_into_memory_says_so(comm, seed, monkeypatch):
    model, optimizer, loader = managed(comm, OPTIMIZERS["adagrad"], Visits(40, seed))
    for batch in loader:
        step(model, optimizer, batch)
    comm.Barrier()
    monkeypatch.setattr(table_values, "free_bytes", lambda: 100)
    for call in (model.state_dict, optimizer.state_dict):
        with pytest.raises(MemoryError, match="where 100 are free.*adaloader.save"):
            call()
    close(comm, loader)


@pytest.mark.ranks(2)
def test_ranks_that_have_parted_are_not_asked(comm, seed):
    model, optimizer, loader = managed(comm, OPTIMIZERS["adagrad"], Visits(40, seed))
    for batch in loader:
        step(model, optimizer, batch)
    loader.close()
    for call in (model.state_dict, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="have parted; call .* before loader.close"):
            call()


@pytest.mark.ranks(2)
def test_ranks_that_have_no_batch_left_cannot_load_with_the_others(comm, seed):
    """Rank 0 waits for the end of the pass, and does not have the state that the others load."""
    torch.manual_seed(0)
    model = Shop()
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    batches = list(DataLoader(Visits(BATCH * 5, seed), BATCH))[: 2 + 3 * comm.rank]
    loader = AdaLoader.wrap(batches, model=model, optimizer=optimizer, min_rows=1, timeout_seconds=60)
    with pytest.raises(ManagedTableError, match="on rank 1.* alone.*load it when the pass is over"):
        for number, batch in enumerate(loader):
            step(model, optimizer, batch)
            if number == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    close(comm, loader)
