"""Messages: what is packed comes back, and what was not packed by us is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pm.messages import Kind, Message, pack, unpack

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
    at = buffer.__array_interface__["data"][0] % 8
    for message in unpack(buffer):
        for array in message.arrays:
            assert not array.size or array.__array_interface__["data"][0] % 8 == at


def test_arrays_that_are_not_contiguous_travel_as_they_are_seen():
    base = np.arange(60, dtype=np.float32).reshape(6, 10)
    sent = [Message(Kind.ROWS, (1,), (base[::2, 1:4], base.T, base[3:3]))]
    assert_same(unpack(pack(sent)), sent)


@settings(deadline=None)
@given(st.lists(messages, min_size=1, max_size=4), st.data())
def test_a_buffer_that_is_cut_short_is_refused(sent, data):
    buffer = pack(sent)
    # The padding after the last array is no part of a message.
    tail = [array for message in sent for array in message.arrays if array.nbytes]
    ends = 0 if not tail else -tail[-1].nbytes % 8
    cut = data.draw(st.integers(0, len(buffer) - ends - 1))
    with pytest.raises(ValueError, match="message"):
        unpack(buffer[:cut])


@settings(deadline=None)
@given(st.lists(messages, min_size=1, max_size=3), st.data())
def test_a_header_that_was_changed_gives_an_error_or_messages_but_never_foreign_memory(sent, data):
    buffer = pack(sent)
    words = buffer[: len(buffer) // 8 * 8].view(np.int64)
    at = data.draw(st.integers(0, int(words[0]) - 1))
    words[at] = data.draw(st.one_of(st.integers(-20, 50), st.sampled_from([2**62, -(2**62)])))
    try:
        found = unpack(buffer)
    except ValueError:
        return
    for message in found:
        for array in message.arrays:
            assert not array.size or np.shares_memory(array, buffer)


def test_a_dtype_that_cannot_travel_is_named():
    with pytest.raises(TypeError, match="bool cannot be sent.*float32"):
        pack([Message(Kind.ROWS, (), (np.zeros(3, bool),))])
