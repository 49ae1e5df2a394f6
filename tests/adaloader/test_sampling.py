"""Sample order against a plain torch DataLoader: order, shares, random state left behind, and resuming.

The loaders here are StatefulDataLoaders around a GlobalBatchSampler; `reading_ahead` connects one to a
LookaheadIterator. Several ranks are played one after the other, each from the same random state.
"""

import copy
import io
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from adaloader.reading.lookahead import LookaheadIterator
from adaloader.reading.sampling import GlobalBatchSampler, random_state, set_random_state

SEEDS = st.integers(0, 2**31 - 1)


class Numbers(Dataset):
    """Sample i is i. The length may be changed between epochs."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor(index)


class Setting:
    """How a loader is built; `plain` and `ours` build the two that must agree."""

    def __init__(self, length, batch_size, shuffle=True, drop_last=False, own_generator=False, seed=None, **options):
        self.dataset = Numbers(length)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.own_generator = own_generator
        self.options = options
        self.seed = random.randrange(2**31) if seed is None else seed
        print("seed", self.seed)

    def generator(self):
        """Seed everything anew; the user's generator, if the setting has one."""
        torch.manual_seed(self.seed)
        return torch.Generator().manual_seed(self.seed + 1) if self.own_generator else None

    def plain(self, generator, ranks=1):
        batch_size = self.batch_size and ranks * self.batch_size
        return DataLoader(
            self.dataset,
            batch_size,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            generator=generator,
            **self.options,
        )

    def ours(self, generator, rank=0, ranks=1, ahead=False):
        """A loader, and its sampler."""
        sampler = GlobalBatchSampler(
            self.dataset,
            self.batch_size,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            generator=generator,
            rank=rank,
            ranks=ranks,
            plain_lead=2 * self.options.get("num_workers", 0) if ahead else None,
        )
        place = {"sampler": sampler, "batch_size": None} if self.batch_size is None else {"batch_sampler": sampler}
        return StatefulDataLoader(self.dataset, generator=generator, **place, **self.options), sampler


def reading_ahead(loader, sampler, lookahead):
    """Iterate over `loader` as a loader that reads ahead does: draws at an epoch's end follow the loop."""
    inner = iter(loader)
    epoch = sampler.epoch
    start = inner._num_yielded
    places = []

    def on_end(reason):
        if reason == "exhausted":
            epoch.keep_up(places[0].yielded + 1)

    iterator = LookaheadIterator(
        inner,
        lookahead,
        snapshot=inner.state_dict,
        on_read=lambda number, batch: None,
        on_yield=lambda number, batch: epoch.keep_up(number + 1),
        on_end=on_end,
        start=start,
    )
    places.append(iterator.place)
    return iterator


def values(batches):
    return [batch.tolist() for batch in batches]


def random_states(generator):
    """Both states that a loader may change, comparable."""
    return torch.get_rng_state().tolist(), generator and generator.get_state().tolist()


def same_epochs(setting, lookahead=None, epochs=3, stop_after=None):
    """Run both loaders with draws of the loop's own in between; compare batches and random states."""
    runs = []
    for is_plain in (True, False):
        generator = setting.generator()
        if is_plain:
            loader, sampler = setting.plain(generator), None
        else:
            loader, sampler = setting.ours(generator, ahead=lookahead is not None)
        seen = []
        for _ in range(epochs):
            if is_plain or lookahead is None:
                batches = iter(loader)
            else:
                batches = reading_ahead(loader, sampler, lookahead)
            for batch in itertools.islice(batches, stop_after):
                seen.append((batch.tolist(), random_states(generator)))
                if generator is not None:
                    torch.rand(2, generator=generator)
            seen.append(random_states(generator))
            del batches
        runs.append(seen)
    assert runs[0] == runs[1]


@given(
    length=st.integers(1, 30),
    batch_size=st.one_of(st.none(), st.integers(1, 12)),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    own_generator=st.booleans(),
    lookahead=st.sampled_from([None, 0, 1, 3, 50]),
    stop_after=st.one_of(st.none(), st.integers(1, 6)),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=150)
def test_order_and_random_state_are_plain(
    length, batch_size, shuffle, drop_last, own_generator, lookahead, stop_after, seed
):
    drop_last = drop_last and batch_size is not None
    setting = Setting(length, batch_size, shuffle, drop_last, own_generator, seed)
    same_epochs(setting, lookahead, stop_after=stop_after)


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("persistent_workers", [False, True])
@pytest.mark.parametrize("stop_after", [None, 1, 2])
def test_order_and_random_state_are_plain_with_workers(own_generator, persistent_workers, stop_after):
    """Plain takes indices four batches ahead, so a break after one or two is before or at the end."""
    length = random.choice([16, 17, 18])  # 5 full batches and a rest, or 6
    print("length", length)
    setting = Setting(length, 3, own_generator=own_generator, num_workers=2, persistent_workers=persistent_workers)
    if stop_after is None:
        same_epochs(setting, None, epochs=2)
    same_epochs(setting, random.choice([1, 50]), epochs=2, stop_after=stop_after)


def test_unbatched_with_workers():
    same_epochs(Setting(7, None, own_generator=True, num_workers=2), 3, epochs=2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_shares_make_up_the_plain_batch(ranks, data):
    batch_size = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    length = data.draw(st.one_of(st.integers(1, 5), st.integers(1, 60)))
    drop_last = data.draw(st.booleans()) and batch_size is not None
    own_generator, seed = data.draw(st.booleans()), data.draw(SEEDS)
    setting = Setting(length, batch_size, drop_last=drop_last, own_generator=own_generator, seed=seed)
    lookahead = data.draw(st.sampled_from([None, 2]))

    plain = values(setting.plain(setting.generator(), ranks))
    if batch_size is None:
        plain = [plain[first : first + ranks] for first in range(0, length, ranks)]
    states, shares = [], []
    for rank in range(ranks):
        generator = setting.generator()
        loader, sampler = setting.ours(generator, rank, ranks, ahead=lookahead is not None)
        batches = loader if lookahead is None else reading_ahead(loader, sampler, lookahead)
        mine = [[batch] if batch_size is None else batch for batch in values(batches)]
        states.append(random_states(generator))
        assert len(mine) == len(sampler) == len(loader)
        assert sampler.global_batches == len(plain)
        for number, batch in enumerate(plain):
            own, in_all = sampler.share(number)
            assert in_all == len(batch)
            assert own == (len(mine[number]) if number < len(mine) else 0)
        shares.append(mine)
    joined = [sum(parts, []) for parts in itertools.zip_longest(*shares, fillvalue=[])]
    assert joined == plain
    for number in range(len(plain)):
        sizes = [len(share[number]) if number < len(share) else 0 for share in shares]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)

    generator = setting.generator()
    list(setting.plain(generator, ranks))
    assert states == [random_states(generator)] * ranks


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_empty_dataset(drop_last):
    loader, sampler = Setting(0, 2, shuffle=False, drop_last=drop_last).ours(None, 1, 3)
    assert list(loader) == [] and len(loader) == 0 and sampler.global_batches == 0
    with pytest.raises(IndexError, match="has 0 batches"):
        sampler.share(0)
    for build in (Setting(0, 2).plain, Setting(0, 2).ours):
        with pytest.raises(ValueError, match="num_samples=0"):
            build(None)


@pytest.mark.parametrize("own_generator", [False, True])
def test_the_dataset_may_change_between_epochs(own_generator):
    setting = Setting(0, 3, own_generator=own_generator)
    lengths = [random.randrange(1, 20) for _ in range(4)]
    print("lengths", lengths)
    epochs = []
    for build in (setting.plain, lambda generator: setting.ours(generator)[0]):
        setting.dataset.length = lengths[0]
        generator = setting.generator()
        loader = build(generator)
        seen = []
        for length in lengths:
            setting.dataset.length = length
            seen.append((len(loader), values(loader), random_states(generator)))
        epochs.append(seen)
    assert epochs[0] == epochs[1]


def test_an_epoch_keeps_its_cut():
    _, sampler = Setting(10, 2).ours(None, 0, 2)
    epoch = iter(sampler)
    assert sampler.epoch is epoch
    next(epoch)
    sampler.dataset.length = 3
    assert (epoch.shares.samples, sampler.global_batches) == (10, 1)
    del epoch
    assert sampler.epoch is None


def saved(state):
    """What `state` is after a file: nothing in it may be more than tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def finish(setting, state, lookahead, rank=0, ranks=1):
    """In a new loader, continue from `state` to the end of the epoch and through two more."""
    torch.manual_seed(random.randrange(2**31))
    generator = torch.Generator().manual_seed(5) if setting.own_generator else None
    loader, sampler = setting.ours(generator, rank, ranks, ahead=True)
    loader.load_state_dict(state)
    rest = values(reading_ahead(loader, sampler, lookahead))
    after = random_states(generator)[1]
    later = [values(reading_ahead(loader, sampler, lookahead)) for _ in range(2 * bool(generator))]
    return rest, after, later


def resume_everywhere(setting, lookahead, stops, rank=0, ranks=1):
    """Save after each of `stops` batches, and after the end; compare what follows with the unbroken run."""
    generator = setting.generator()
    loader, sampler = setting.ours(generator, rank, ranks, ahead=True)
    batches, states = reading_ahead(loader, sampler, lookahead), []
    states.append(copy.deepcopy(batches.yielded_state))
    whole = []
    for batch in batches:
        whole.append(batch.tolist())
        states.append(saved(batches.yielded_state))
    at_end = saved(batches.yielded_state)
    after = random_states(generator)[1]
    later = [values(reading_ahead(loader, sampler, lookahead)) for _ in range(2 * bool(generator))]
    for stop in stops(len(whole)):
        rest, rest_after, rest_later = finish(setting, states[stop], lookahead, rank, ranks)
        assert rest == whole[stop:]
        assert (rest_after, rest_later) == (after, later)
    rest, _, rest_later = finish(setting, at_end, lookahead, rank, ranks)
    if generator is not None:  # the epoch was over: what follows is the next one
        assert [rest, *rest_later][:2] == later


@pytest.mark.parametrize("lookahead", [0, 1, 5, 50])
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("shape", [(23, 3, False), (24, 3, False), (23, 3, True), (5, None, False)])
def test_resuming_in_an_epoch(lookahead, own_generator, shape):
    length, batch_size, drop_last = shape
    setting = Setting(length, batch_size, drop_last=drop_last, own_generator=own_generator)
    resume_everywhere(setting, lookahead, stops=lambda batches: range(batches + 1))


@pytest.mark.parametrize("lookahead", [0, 1, 5, 50])
@pytest.mark.parametrize("own_generator", [False, True])
def test_resuming_with_workers(lookahead, own_generator):
    setting = Setting(random.choice([23, 24]), 3, own_generator=own_generator, num_workers=2)
    print("length", len(setting.dataset))
    resume_everywhere(setting, lookahead, stops=lambda batches: {0, random.randrange(1, batches), batches})


def test_resuming_between_snapshots_of_the_workers():
    setting = Setting(23, 3, own_generator=True, num_workers=2, snapshot_every_n_steps=3)
    resume_everywhere(setting, 2, stops=lambda batches: [1, 2, 4, batches])


def test_resuming_before_the_first_batch_is_on_the_global_path():
    """With the global generator restored too, what it gives later is the same as well."""
    setting = Setting(9, 2)
    setting.generator()
    epoch = iter(setting.ours(None)[1])
    state, random_before = epoch.state_dict(), torch.get_rng_state()
    whole, later = list(epoch), torch.rand(3)
    for restores_global in (True, False):
        torch.manual_seed(random.randrange(2**31))
        if restores_global:
            torch.set_rng_state(random_before)
        other = iter(setting.ours(None)[1])
        other.load_state_dict(state)
        assert list(other) == whole
        assert torch.equal(torch.rand(3), later) == restores_global


class Scribe(Numbers):
    """Returns its live state, as datasets do, and raises at sample `broken`."""

    def __init__(self, length, broken=None):
        super().__init__(length)
        self.broken = broken
        self.seen = []

    def __getitem__(self, index):
        if index == self.broken:
            raise ArithmeticError(f"sample {index} is broken")
        self.seen.append(index)
        return super().__getitem__(index)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


@pytest.mark.parametrize("lookahead", [0, 4])
def test_the_dataset_s_state_is_that_of_the_batch_handed_out(lookahead):
    setting = Setting(12, 2)
    setting.dataset = Scribe(12)
    batches = reading_ahead(*setting.ours(setting.generator(), ahead=True), lookahead)
    seen = []
    for batch in batches:
        seen += batch.tolist()
        assert batches.yielded_state["dataset_state"] == {"seen": seen}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("lookahead", [0, 1, 20])
def test_a_broken_sample_raises_where_plain_does(num_workers, lookahead):
    setting = Setting(21, 2, num_workers=num_workers)
    setting.dataset = Scribe(21, broken=random.randrange(21))
    print("broken", setting.dataset.broken)
    plain, seen = iter(setting.plain(setting.generator())), ([], [])
    with pytest.raises(ArithmeticError, match=f"sample {setting.dataset.broken} is broken"):
        for batch in plain:
            seen[0].append(batch.tolist())
    loader, sampler = setting.ours(setting.generator(), ahead=True)
    with pytest.raises(ArithmeticError, match=f"sample {setting.dataset.broken} is broken"):
        for batch in reading_ahead(loader, sampler, lookahead):
            seen[1].append(batch.tolist())
    assert seen[0] == seen[1]
    for iterator in (plain, loader._iterator) if num_workers else ():
        # An error from a worker leaves a reference cycle around torch's iterator, and workers that are left
        # to the garbage collector take seconds to end.
        iterator._shutdown_workers()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_resuming_on_several_ranks(rank):
    """13 samples on three ranks with batch size 2: rank 0 alone has a share of the last batch."""
    setting = Setting(13, 2, own_generator=True)
    resume_everywhere(setting, 2, lambda batches: range(batches + 1), rank, ranks=3)


def test_resuming_on_another_number_of_ranks():
    """The saved position is one in the global order: four ranks with batch size 1 continue what two began."""
    setting = Setting(22, 2, own_generator=True)
    loader, _ = setting.ours(setting.generator(), 1, 2)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    state = saved(batches.state_dict())
    plain = values(setting.plain(setting.generator(), 2))
    setting.batch_size = 1
    shares = [finish(setting, state, 3, rank, 4)[0] for rank in range(4)]
    assert [sum(parts, []) for parts in itertools.zip_longest(*shares, fillvalue=[])] == plain[2:]


def test_saving_takes_no_random_numbers():
    for own_generator in (False, True):
        setting = Setting(9, 2, own_generator=own_generator)
        generator = setting.generator()
        epoch = iter(setting.ours(generator)[1])
        for _ in range(6):
            before = random_states(generator)
            epoch.state_dict()
            assert random_states(generator) == before
            next(epoch, None)


def test_a_saved_state_does_not_change():
    setting = Setting(9, 2, own_generator=True)
    epoch = iter(setting.ours(setting.generator())[1])
    next(epoch)
    state = epoch.state_dict()
    kept = copy.deepcopy(state)
    list(epoch)
    other = iter(setting.ours(setting.generator())[1])
    other.load_state_dict(state)
    list(other)
    assert torch.equal(state.pop("generator_state"), kept.pop("generator_state"))
    assert state == kept


def test_states_that_do_not_fit_are_refused():
    setting = Setting(9, 2)
    epoch = iter(setting.ours(None)[1])
    next(epoch)
    state = epoch.state_dict()
    with pytest.raises(ValueError, match="version 7"):
        epoch.load_state_dict({**state, "version": 7})
    with pytest.raises(ValueError, match="shuffle=True"):
        iter(Setting(9, 2, shuffle=False).ours(None)[1]).load_state_dict(state)
    with pytest.raises(ValueError, match="order of 9 samples, the dataset has 10"):
        iter(Setting(10, 2).ours(None)[1]).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size.*0"),
        ({"batch_size": True}, "batch_size.*True"),
        ({"batch_size": 2.0}, "batch_size.*2.0"),
        ({"batch_size": None, "drop_last": True}, "drop_last"),
        ({"rank": 2}, "2 ranks, got 2"),
        ({"rank": -1}, "got -1"),
    ],
)
def test_bad_arguments(change, message):
    given = {"batch_size": 2, "shuffle": True, "drop_last": False, "generator": None, "rank": 0, "ranks": 2}
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(Numbers(5), **{**given, **change})


def test_a_random_state_travels_as_bytes():
    for generator in (None, torch.Generator()):
        state = random_state(generator)
        assert state.dtype == np.uint8 and state.ndim == 1 and state.flags["C_CONTIGUOUS"]
        expected = torch.rand(4, generator=generator)
        assert not np.array_equal(state, random_state(generator))
        set_random_state(generator, state)
        state[:] = 0  # the generator has its own copy
        assert torch.equal(torch.rand(4, generator=generator), expected)
    with pytest.raises(TypeError, match="int64"):
        set_random_state(None, np.zeros(8, dtype=np.int64))
