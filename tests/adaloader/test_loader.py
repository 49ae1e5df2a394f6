"""The loader as a loader: batches, length, passes, statistics, errors; on one process."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from adaloader import AdaLoader
from tests.adaloader.id_loaders import ROWS, Lookup, Pairs, Stream, managed, numbers, train


def squared_sum(samples):
    first, second = zip(*samples, strict=True)
    return [torch.stack(first) ** 2, torch.stack(second)]


WAYS = {
    "defaults": lambda: ((Pairs(),), {}),
    "shuffled": lambda: ((Pairs(), 4), {"shuffle": True}),
    "positional": lambda: ((Pairs(), 4, True), {}),
    "drop_last": lambda: ((Pairs(), 4), {"drop_last": True, "shuffle": True}),
    "unbatched": lambda: ((Pairs(), None), {"shuffle": True}),
    "collated": lambda: ((Pairs(), 5), {"collate_fn": squared_sum}),
    "generator": lambda: ((Pairs(), 4), {"shuffle": True, "generator": torch.Generator().manual_seed(3)}),
    "generator, in order": lambda: ((Pairs(), 4), {"generator": torch.Generator().manual_seed(3)}),
    "sampler": lambda: ((Pairs(), 4), {"sampler": SubsetRandomSampler(range(3, 19))}),
    "batch_sampler": lambda: ((Pairs(),), {"batch_sampler": BatchSampler(range(4, 20), 3, drop_last=False)}),
    "stream": lambda: ((Stream(), 4), {}),
    "stream, unbatched": lambda: ((Stream(), None), {}),
    "dataset is a list": lambda: (([(torch.tensor(i), torch.tensor([i])) for i in range(9)], 2), {"shuffle": True}),
    "one batch": lambda: ((Pairs(3), 50), {"shuffle": True}),
    "no sample": lambda: ((Pairs(0), 5), {}),
    "workers": lambda: ((Pairs(), 4), {"shuffle": True, "num_workers": 2}),
    "persistent workers": lambda: ((Pairs(), 4), {"shuffle": True, "num_workers": 2, "persistent_workers": True}),
    "workers, stream": lambda: ((Stream(), 4), {"num_workers": 2, "prefetch_factor": 1}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lookahead", [0, 3])
def test_batches_are_those_of_a_plain_loader(way, lookahead, seed):
    """Over two passes, one of them left early, with the loop's own random draws in between."""

    def seen(build):
        args, keywords = WAYS[way]()
        torch.manual_seed(seed)
        loader, work = build(*args, **keywords)
        found = []
        for stop_after in (None, 2, None):
            for batch in itertools.islice(loader, stop_after):
                found.append((batch[0].tolist(), batch[1].tolist(), float(torch.rand(1))))
                work(batch)
            found.append(float(torch.rand(1)))
        length = None if isinstance(args[0], Stream) else len(loader)
        return found, length

    def build_managed(*args, **keywords):
        state = torch.get_rng_state()
        loader, model, optimizer = managed(*args, lookahead=lookahead, **keywords)
        torch.set_rng_state(state)
        return loader, lambda batch: train(model, optimizer, batch)

    plain = seen(lambda *args, **keywords: (DataLoader(*args, **keywords), lambda batch: None))
    assert seen(build_managed) == plain


def test_without_a_model_it_is_torchdatas_loader():
    loader = AdaLoader(Pairs(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    theirs = StatefulDataLoader(Pairs(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    assert isinstance(loader, StatefulDataLoader) and isinstance(loader, DataLoader)
    assert numbers(itertools.islice(loader, 2)) == numbers(itertools.islice(theirs, 2))
    assert loader.state_dict().keys() == theirs.state_dict().keys()
    assert loader.state_dict()["_num_yielded"] == 2
    loader.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert numbers(loader) == numbers(theirs)
    assert numbers(AdaLoader(Pairs())) == numbers(DataLoader(Pairs()))
    with pytest.raises(RuntimeError, match="without model="):
        loader.stats()
    loader.close()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="optimizer but no model"):
        AdaLoader(Pairs(), optimizer=optimizer)


def test_it_refuses_what_a_plain_loader_refuses():
    with pytest.raises(ValueError, match="mutually exclusive"):
        managed(Pairs(), shuffle=True, sampler=range(3))
    with pytest.raises(ValueError, match="shuffle"):
        managed(Stream(), shuffle=True)
    with pytest.raises(ValueError, match="batch_size"):
        managed(Pairs(), batch_size=0)
    with pytest.raises(TypeError):
        managed(Pairs(), no_such_argument=1)
    loader, _, _ = managed(Pairs(), 4)
    with pytest.raises(ValueError, match="batch_size"):
        loader.batch_size = 3


def test_attributes_stay_those_of_a_loader():
    dataset = Pairs()
    loader, _, _ = managed(dataset, 4, shuffle=True, drop_last=True)
    assert loader.dataset is dataset and loader.batch_size == 4 and loader.drop_last
    assert len(loader) == 5 and len(iter(loader)) == 5
    assert len(loader.sampler) == 23


def test_the_source_advances_on_the_callers_thread():
    threads = set()

    class Noting(Pairs):
        def __getitem__(self, index):
            threads.add(threading.get_ident())
            return super().__getitem__(index)

    def batches():
        for batch in DataLoader(Noting(), 4):
            threads.add(threading.get_ident())
            yield batch

    class Source:
        def __iter__(self):
            return batches()

    for loader in (managed(Noting(), 4)[0], managed(Source(), wrap=True)[0]):
        assert len(list(loader)) == 6
    assert threads == {threading.get_ident()}


def test_a_dataset_that_draws_random_numbers_is_repeatable(seed):
    class Noise(Pairs):
        def __getitem__(self, index):
            number, ids = super().__getitem__(index)
            return torch.rand(()), ids

    def run(loader):
        torch.manual_seed(seed)
        return [(batch[0].tolist(), float(torch.rand(()))) for _ in range(2) for batch in loader]

    loader, _, _ = managed(Noise(), 4, shuffle=True, lookahead=3)
    assert run(loader) == run(loader)
    wrapped, _, _ = managed(DataLoader(Noise(), 4, shuffle=True), wrap=True, lookahead=3)
    assert run(wrapped) == run(wrapped)


# --- several passes at a time, several loaders ---


def test_two_passes_over_one_loader_at_a_time():
    loader, model, optimizer = managed(Pairs(), 4, lookahead=2)
    expected = numbers(DataLoader(Pairs(), 4))
    pairs = []
    for first, second in zip(loader, loader, strict=True):
        train(model, optimizer, first)
        pairs.append((first[0].tolist(), second[0].tolist()))
    assert pairs == [(batch, batch) for batch in expected]
    for batch in loader:
        assert numbers(loader) == expected
        train(model, optimizer, batch)


def test_an_iterator_that_is_dropped_late_disturbs_no_later_one():
    loader, model, optimizer = managed(Pairs(), 4, lookahead=4)
    kept = iter(loader)
    next(kept)
    later = iter(loader)
    train(model, optimizer, next(later))
    del kept
    gc.collect()
    assert numbers(later) == numbers(DataLoader(Pairs(), 4))[1:]


def test_a_loader_that_only_its_iterator_holds():
    model = Lookup()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for batch in AdaLoader(Pairs(), 4, model=model, optimizer=optimizer, min_rows=1):
        if not seen:
            gc.collect()
        train(model, optimizer, batch)
        seen.append(batch)
    assert numbers(seen) == numbers(DataLoader(Pairs(), 4))
    for number, batch in enumerate(AdaLoader.wrap(seen, model=model, min_rows=1)):
        if number == 1:
            gc.collect()
        model(batch[1])


@pytest.mark.parametrize("with_optimizer", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_second_loader_reuses_what_was_learned(with_optimizer, num_workers):
    loader, model, optimizer = managed(Pairs(), 4)
    for batch in loader:
        train(model, optimizer, batch)
    before = loader.stats()
    validation = AdaLoader(
        Pairs(17),
        5,
        model=model,
        optimizer=optimizer if with_optimizer else None,
        min_rows=1,
        num_workers=num_workers,
    )
    for _ in range(2):
        with torch.no_grad():
            assert numbers(batch for batch in validation if model(batch[1]) is not None) == numbers(
                DataLoader(Pairs(17), 5)
            )
    after = validation.stats()
    assert after["on_demand"] == before["on_demand"] and after["lookups"] > before["lookups"]
    assert after["steps"] == before["steps"]
    validation.close()
    for batch in loader:  # goes on though the other is closed
        train(model, optimizer, batch)


def test_batches_do_not_pile_up_in_loops_without_steps():
    """Evaluation, and loops that only look at batches, hold a bounded number of them."""
    loader, model, _ = managed(Pairs(400), 4, lookahead=3)
    watched = weakref.WeakSet()
    most = 0
    for look in (True, False):
        for batch in loader:
            watched.add(batch[1])
            if look:
                with torch.no_grad():
                    model(batch[1])
            most = max(most, len(watched))
        assert most < 30, look


def test_a_model_without_tables_is_only_loaded_for():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(Pairs(), 4, model=model, optimizer=optimizer)
    for _ in range(3):
        for batch in loader:
            model(batch[1].float()).sum().backward()
            optimizer.step()
    stats = loader.stats()
    assert stats["lookups"] == 0 and stats["intent_coverage"] == 1.0 and stats["steps"] == 18
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []


# --- statistics ---


def test_statistics_are_true():
    loader, model, optimizer = managed(Pairs(24), 4)
    assert loader.stats()["memory_bytes"] > 0
    batches = []
    for batch in loader:
        batches.append(batch)
        train(model, optimizer, batch)
    model(torch.tensor([1, 1, 2]))
    stats = loader.stats()
    unique = [len(batch[1].unique()) for batch in batches]
    assert stats["steps"] == 6
    assert stats["lookups"] == sum(unique) + 2
    assert stats["on_demand"] == unique[0] + 2
    assert stats["intent_coverage"] == pytest.approx(sum(unique[1:]) / (sum(unique) + 2))
    assert stats["bytes_sent"] == stats["bytes_received"] == 0
    assert stats["wait_seconds"] >= 0
    assert ROWS * 4 * 4 <= stats["memory_bytes"] < 10**6
    assert stats["tables"]["table.weight"]["lookups"] == stats["lookups"]


# --- errors ---


@pytest.mark.parametrize("lookahead", [0, 1, 9])
def test_an_error_of_the_dataset_comes_in_its_place(lookahead):
    class Broken(Pairs):
        def __getitem__(self, index):
            if index == 9:
                raise KeyError("sample 9 is broken")
            return super().__getitem__(index)

    loader, model, optimizer = managed(Broken(), 4, lookahead=lookahead)
    seen = []
    with pytest.raises(KeyError, match="sample 9 is broken"):
        for batch in loader:
            train(model, optimizer, batch)
            seen.append(batch[0].tolist())
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(KeyError):
        list(loader)


def test_an_error_of_a_key_function_comes_in_its_place():
    def keys(batch):
        if 9 in batch[0]:
            raise ArithmeticError("no keys for 9")
        return batch[1]

    loader, model, optimizer = managed(Pairs(), 4, keys={"table": keys}, lookahead=3)
    iterator = iter(loader)
    for _ in range(2):
        train(model, optimizer, next(iterator))
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="no keys for 9"):
            next(iterator)
    loader.close()  # until then its batch keeps the error, whose traceback keeps this frame


def test_a_loader_is_not_copied():
    """Its threads and rows cannot be: a module that holds it is not either, and says so."""
    model = Lookup()
    loader = AdaLoader(Pairs(10), 2, model=model, min_rows=1)
    model.loader = loader
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="AdaLoader cannot be copied or pickled.*Keep it out"):
            copied(loader)
    copy.deepcopy(AdaLoader(list(range(4)), 2))  # one that manages nothing
