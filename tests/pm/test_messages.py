"""Messages: what is packed comes back, and what was not packed by us is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pm.messages import Kind, Message, joined, message_bytes, pack, unpack

dtypes = st.sampled_from(["int64", "int32", "float32", "float64", "uint8"])
payloads = dtypes.flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7))
)
messages = st.builds(
    Message,
    st.sampled_from(Kind),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(tuple),
    st.lists(payloads, max_size=4).map(tuple),
)


def assert_same(got: list[Message], sent: list[Message]):
    assert [(m.kind, m.numbers, len(m.arrays)) for m in got] == [(m.kind, m.numbers, len(m.arrays)) for m in sent]
    for one, other in zip(got, sent, strict=True):
        for a, b in zip(one.arrays, other.arrays, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert a.tobytes() == b.tobytes()


@settings(deadline=None)
@given(st.lists(messages, max_size=6))
def test_round_trip(sent):
    buffer = pack(sent)
    assert buffer.dtype == np.uint8
    assert_same(unpack(buffer), sent)
    assert buffer.__array_interface__["data"][0] % 8 == 0
    for message in unpack(buffer):
        assert all(array.flags.aligned for array in message.arrays)


def test_arrays_that_are_not_contiguous_travel_as_they_are_seen():
    base = np.arange(60, dtype=np.float32).reshape(6, 10)
    sent = [Message(Kind.ROWS, (1,), (base[::2, 1:4], base.T, base[3:3]))]
    assert_same(unpack(pack(sent)), sent)


@settings(deadline=None)
@given(st.lists(messages, min_size=1, max_size=4), st.data())
def test_a_buffer_that_is_cut_short_is_refused(sent, data):
    buffer = pack(sent)
    cut = data.draw(st.integers(0, len(buffer) - 1))
    with pytest.raises(ValueError, match="message"):
        unpack(buffer[:cut])


@settings(deadline=None)
@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_a_header_that_was_changed_gives_an_error_or_messages_but_never_foreign_memory(sent, data):
    buffer = pack(sent)
    count, width = divmod(int(buffer[:4].view(np.uint32)[0]), 4)
    words = [
        buffer[:4].view(np.uint32),
        buffer[4 : 4 + (2 << width) * count].view([np.int16, np.int32, np.int64][width]),
    ]
    changed = words[data.draw(st.sampled_from([0, 1]))]
    limits = np.iinfo(changed.dtype)
    value = data.draw(st.one_of(st.integers(max(limits.min, -20), 1000), st.sampled_from([limits.min, limits.max])))
    changed[data.draw(st.integers(0, len(changed) - 1))] = value
    try:
        found = unpack(buffer)
    except ValueError:
        return
    for message in found:
        for array in message.arrays:
            assert not array.size or np.shares_memory(array, buffer)


@pytest.mark.parametrize(("number", "width"), [(32767, 2), (-32768, 2), (32768, 4), (-(2**31), 4), (2**31, 8)])
def test_words_of_a_header_are_as_wide_as_its_numbers_need(number, width):
    rows = np.arange(3, dtype=np.uint8)
    buffer = pack([Message(Kind.MOVED, (number, 1), (rows, rows))])
    assert len(buffer) == 4 + width * (2 + 2 + 2 + 2) + 6
    assert unpack(buffer)[0].numbers == (number, 1)


def test_message_bytes_are_those_of_a_buffer_but_for_its_prefix():
    sent = [Message(Kind.COPIES, (0,), (np.arange(4, dtype=np.uint16), np.ones((4, 3), np.float32))), Message(Kind.END)]
    assert len(pack(sent)) == 4 + sum(map(message_bytes, sent)) == 4 + (6 + 4 + 6 + 8 + 48) + 4


def test_a_dtype_that_cannot_travel_is_named():
    with pytest.raises(TypeError, match="bool cannot be sent.*float32"):
        pack([Message(Kind.ROWS, (), (np.zeros(3, bool),))])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([Kind.COPIES, Kind.MOVED, Kind.SYNC]), st.integers(0, 1), st.integers(0, 3))))
def test_joined_messages_bring_the_same_in_the_same_order(drawn):
    sent = [
        Message(kind, (number,), (np.arange(at, at + rows, dtype=np.uint8), np.full((rows, 2), at, np.float32)))
        for at, (kind, number, rows) in enumerate(drawn)
    ]
    got = joined(sent, (Kind.COPIES, Kind.MOVED))
    assert [(m.kind, m.numbers) for m in got if m.kind == Kind.SYNC] == [
        (m.kind, m.numbers) for m in sent if m.kind == Kind.SYNC
    ]
    for messages in (got, sent):  # as one follows the other, kind by kind
        messages[:] = [m for m in messages if len(m.arrays[0])]
    for column in range(2):
        for key in {(m.kind, m.numbers) for m in sent}:
            parts = [[m.arrays[column] for m in some if (m.kind, m.numbers) == key] for some in (got, sent)]
            np.testing.assert_array_equal(*map(np.concatenate, parts))


def test_messages_whose_arrays_are_empty_by_agreement_stay_apart():
    keys, none = np.arange(2, dtype=np.uint8), np.empty(0, np.int64)
    with_sets = Message(Kind.RECORDS, (0,), (keys, np.ones(2, np.int64)))
    without = Message(Kind.RECORDS, (0,), (keys, none))
    assert_same(joined([with_sets, without], (Kind.RECORDS,)), [with_sets, without])
    mixed = [with_sets, with_sets, without, without]
    assert_same(joined(mixed, (Kind.RECORDS,)), mixed)
    (one,) = joined(mixed[2:], (Kind.RECORDS,))
    assert [len(array) for array in one.arrays] == [4, 0]


def test_narrow_and_wide_keys_are_joined_to_wide_ones():
    parts = [np.array([1], np.uint8), np.array([300], np.uint16), np.array([1 << 40], np.int64)]
    (message,) = joined([Message(Kind.REQUEST, (0, 1), (part,)) for part in parts], (Kind.REQUEST,))
    assert_same(unpack(pack([message])), [Message(Kind.REQUEST, (0, 1), (np.array([1, 300, 1 << 40]),))])
