"""Reading ahead: batches unchanged and in order, endings in their place, and a `break` that releases all."""

import gc
import random
import sys
import threading
import traceback
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from adaloader.reading.lookahead import LookaheadIterator, copy_state


class Source:
    """Counts its reads, keeps a live state that it overwrites, and raises `error` after `length` batches."""

    def __init__(self, length, error=None):
        self.length = length
        self.error = error
        self.live = {"read": 0, "trail": []}
        self.threads = set()

    def __iter__(self):
        return self

    def __next__(self):
        self.threads.add(threading.get_ident())
        if self.live["read"] == self.length:
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            self.live["trail"].append("end")
            raise StopIteration
        self.live["read"] += 1
        self.live["trail"].append(self.live["read"])
        return [self.live["read"] - 1]

    def state_dict(self):
        return self.live


class Log:
    """The callbacks of one iterator, in the order in which they were called."""

    def __init__(self):
        self.events = []

    def ahead(self, source, lookahead, **options):
        return LookaheadIterator(
            source,
            lookahead,
            snapshot=options.pop("snapshot", source.state_dict),
            on_read=lambda number, batch: self.events.append(("read", number, batch[0])),
            on_yield=lambda number, batch: self.events.append(("yield", number, batch[0])),
            on_end=lambda reason: self.events.append(("end", reason)),
            **options,
        )

    def numbers(self, kind):
        return [event[1] for event in self.events if event[0] == kind]


@given(length=st.integers(0, 40), lookahead=st.integers(0, 50), start=st.integers(0, 9))
@hypothesis_settings(deadline=None, max_examples=60)
def test_batches_are_unchanged_in_order_and_read_within_bounds(length, lookahead, start):
    log, source = Log(), Source(length)
    iterator = log.ahead(source, lookahead, start=start)
    assert source.live["read"] == 0  # nothing is read before it is asked for
    batches, was_full = [], False
    for batch in iterator:
        batches.append(batch[0])
        held = iterator.place.read - iterator.place.yielded
        assert held <= lookahead
        assert source.live["read"] == len(batches) + held
        was_full = was_full or held == lookahead
        assert held == lookahead or not was_full or source.live["read"] == length  # once full, it stays full
    assert batches == list(range(length))
    assert log.numbers("read") == log.numbers("yield") == list(range(start, start + length))
    assert log.numbers("end") == ["exhausted"]
    assert log.events[-1] == ("end", "exhausted")
    assert was_full or length <= 2 * (lookahead + 1)
    assert next(iterator, "nothing") == "nothing"
    assert source.threads == {threading.get_ident()}


@pytest.mark.parametrize("lookahead", [1, 2, 7])
def test_the_buffer_fills_gradually(lookahead):
    source = Source(100)
    iterator = Log().ahead(source, lookahead)
    reads = []
    for _ in range(20):
        before = source.live["read"]
        next(iterator)
        reads.append(source.live["read"] - before)
    assert reads == [2] * lookahead + [1] * (20 - lookahead)


def test_no_lookahead_reads_then_yields():
    log = Log()
    list(log.ahead(Source(3), 0))
    kinds = [event[0] for event in log.events]
    assert kinds == ["read", "yield"] * 3 + ["end"]


def test_negative_lookahead_is_refused():
    with pytest.raises(ValueError, match="got -1"):
        Log().ahead(Source(1), -1)


@pytest.mark.parametrize("lookahead", [0, 1, 5, 50])
def test_state_is_of_the_batch_handed_out_not_of_the_one_read(lookahead):
    length = 12
    iterator = Log().ahead(Source(length), lookahead)
    assert iterator.yielded_state == {"read": 0, "trail": []}
    states = []
    for number, _ in enumerate(iterator, start=1):
        states.append(iterator.yielded_state)
        assert iterator.yielded_state == {"read": number, "trail": list(range(1, number + 1))}
    assert iterator.yielded_state["trail"] == [*range(1, length + 1), "end"]
    for number, state in enumerate(states, start=1):  # and none was overwritten later
        assert state["read"] == number


def test_no_snapshot_means_no_state():
    iterator = Log().ahead(Source(2), 1, snapshot=None)
    assert [batch[0] for batch in iterator] == [0, 1]
    assert iterator.yielded_state is None


@pytest.mark.parametrize("lookahead", [0, 1, 3, 50])
@pytest.mark.parametrize("position", [0, 1, 4, 9])
def test_an_error_comes_after_the_batches_before_it(lookahead, position):
    log = Log()
    error = KeyError(f"sample {position} is broken")
    iterator = log.ahead(Source(position, error), lookahead)
    batches = []
    with pytest.raises(KeyError, match="is broken") as raised:
        for batch in iterator:
            batches.append(batch[0])
    assert raised.value is error
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names[-1] == "__next__" and sys._getframe().f_code.co_name in names  # from the source to the loop
    assert batches == list(range(position))
    assert log.numbers("end") == ["error"]
    assert iterator.place.state["read"] == position
    assert next(iterator, "nothing") == "nothing"
    iterator.close()
    assert log.numbers("end") == ["error"]


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_failing_snapshot_is_an_error_at_its_batch(lookahead):
    source = Source(9)

    def snapshot():
        if source.live["read"] == 4:
            raise NotImplementedError("this dataset cannot save itself")
        return source.live

    iterator = Log().ahead(source, lookahead, snapshot=snapshot)
    assert [next(iterator)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(NotImplementedError, match="cannot save itself"):
        next(iterator)


def test_an_interrupt_passes_at_once_and_loses_no_batch():
    class Interrupted(Source):
        interrupts = 1

        def __next__(self):
            if self.live["read"] == 3 and self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            return super().__next__()

    log = Log()
    iterator = log.ahead(Interrupted(6), 4)
    batches = [next(iterator)[0]]
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert log.numbers("end") == []
    assert batches + [batch[0] for batch in iterator] == list(range(6))


@pytest.mark.parametrize("callback", ["on_read", "on_yield"])
def test_a_failing_callback_loses_no_batch(callback):
    failures = [2]

    def fail_once(number, batch):
        if number in failures:
            failures.remove(number)
            raise RuntimeError("callback failed")

    callbacks = {"on_read": lambda *_: None, "on_yield": lambda *_: None, callback: fail_once}
    source = Source(5)
    iterator = LookaheadIterator(source, 2, snapshot=None, on_end=lambda reason: None, **callbacks)
    batches = []
    with pytest.raises(RuntimeError, match="callback failed"):
        for batch in iterator:
            batches.append(batch[0])
    assert batches + [batch[0] for batch in iterator] == list(range(5))


@pytest.mark.parametrize("reason", ["exhausted", "error"])
def test_a_failing_end_hides_no_error_and_is_not_repeated(reason):
    error = OSError("disk gone") if reason == "error" else None
    calls = []

    def on_end(given):
        calls.append(given)
        raise TimeoutError("rank 1 did not answer")

    iterator = LookaheadIterator(
        Source(1, error), 3, snapshot=None, on_read=lambda *_: None, on_yield=lambda *_: None, on_end=on_end
    )
    next(iterator)
    with pytest.raises(OSError) as raised:  # TimeoutError is one
        next(iterator)
    assert (raised.value if reason == "exhausted" else raised.value.__context__).args[0].startswith("rank 1")
    assert calls == [reason]
    assert next(iterator, "nothing") == "nothing"


@pytest.mark.parametrize("lookahead", [0, 1, 10])
@pytest.mark.parametrize("error", [None, ValueError("broken sample")])
def test_break_releases_at_once(lookahead, error):
    """Also with an error pending, whose traceback holds the frames that it passed."""
    log, source = Log(), Source(4, error)
    gc.collect()
    gc.disable()
    try:
        watched = []

        def watch(iterator):
            watched.append(weakref.ref(iterator))
            return iterator

        for batch in watch(log.ahead(source, lookahead)):
            if batch[0] == 2:
                break
        assert watched[0]() is None
        assert log.numbers("end") == ["left"]
    finally:
        gc.enable()


@pytest.mark.parametrize("ending", ["exhausted", "error", "close"])
def test_the_end_leaves_no_cycle(ending):
    log = Log()
    source = Source(3, ValueError("broken sample") if ending == "error" else None)
    gc.collect()
    gc.disable()
    try:
        iterator = log.ahead(source, 2)
        watched = weakref.ref(iterator)
        place = iterator.place
        try:
            for batch in iterator:
                if ending == "close" and batch[0] == 1:
                    iterator.close()
        except ValueError:
            assert ending == "error"
        del iterator
        assert watched() is None
        assert place.yielded == place.read == (2 if ending == "close" else 3)
        assert log.numbers("end") == [{"close": "left"}.get(ending, ending)]
    finally:
        gc.enable()


def test_close_is_idempotent_and_releases_source_and_batches():
    log, source = Log(), Source(9)
    watched = weakref.ref(source)
    iterator = log.ahead(source, 5, snapshot=None)
    next(iterator)
    del source
    iterator.close()
    iterator.close()
    assert watched() is None
    assert log.numbers("end") == ["left"]
    assert next(iterator, "nothing") == "nothing"
    del iterator
    assert log.numbers("end") == ["left"]


def test_copied_state_shares_nothing_that_can_change():
    seed = random.randrange(2**31)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    array, tensor = rng.random(5), torch.from_numpy(rng.random(5))
    nested = {"list": [1, {"array": array}], "tuple": (tensor, "text", None), "set": {1, 2}, 3: b"bytes"}
    state = OrderedDict(nested=nested)
    copied = copy_state(state)
    assert type(copied) is OrderedDict
    kept_array, kept_tensor = array.copy(), tensor.clone()
    array += 1
    tensor += 1
    nested["list"].append("late")
    nested["set"].add(3)
    assert copied["nested"]["set"] == {1, 2} and len(copied["nested"]["list"]) == 2
    assert np.array_equal(copied["nested"]["list"][1]["array"], kept_array)
    assert torch.equal(copied["nested"]["tuple"][0], kept_tensor)
    assert copied["nested"][3] == b"bytes" and copied["nested"]["tuple"][1:] == ("text", None)
