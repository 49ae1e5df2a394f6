"""Updates of records in memory that several share: what plain updates do, and no update lost."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuda_ops

RULES = {
    "sgd": (cuda_ops.sgd_update, cuda_ops.sgd_update_shared, lambda dim: 0, (0.3, -0.7)),
    "adagrad": (cuda_ops.adagrad_update, cuda_ops.adagrad_update_shared, lambda dim: dim, (0.3, 1e-6, 0.5)),
    "rowwise": (cuda_ops.rowwise_adagrad_update, cuda_ops.rowwise_adagrad_update_shared, lambda dim: 1, (0.3, 1e-6, 2)),
}


class Records:
    """Random records, and gradients for some of them."""

    def __init__(self, rng, count: int, dim: int, dtype: str, state_words: int):
        itemsize = np.dtype(dtype).itemsize
        payload = -(-(dim + state_words) * itemsize // 8) * 8
        self.stride, self.dim = (payload + 8) // itemsize, dim
        self.words = np.zeros(count * self.stride, dtype)
        self.words.reshape(count, -1)[:, : dim + state_words] = rng.random((count, dim + state_words))
        self.steps = self.words.view(np.int64)
        self.longs = (payload + 8) // 8

    def of(self, kernel, slots, grad, *numbers):
        return kernel(self.words, self.stride, self.dim, self.steps, slots, grad, *numbers)


@pytest.mark.parametrize("rule", RULES)
@given(
    seed=st.integers(0, 2**32),
    dim=st.sampled_from([1, 2, 3, 8, 16, 33, 1024]),
    dtype=st.sampled_from(["float32", "float64"]),
    n=st.integers(0, 70),
)
def test_it_is_the_plain_update_and_leaves_nothing_locked(rule, seed, dim, dtype, n):
    plain, shared, state_words, numbers = RULES[rule]
    rng = np.random.default_rng(seed)
    mine = Records(rng, 80, dim, dtype, state_words(dim))
    words = mine.words.copy()
    slots, grad = rng.permutation(80)[:n], rng.standard_normal((n, dim)).astype(dtype)
    mine.of(plain, slots, grad, *numbers, 5)
    expected, mine.words = mine.words, words
    mine.steps = words.view(np.int64)
    assert mine.of(shared, slots, grad, *numbers, 5) == n
    assert words.tobytes() == expected.tobytes()
    first = n // 2  # the rest alone
    assert mine.of(shared, slots, grad, *numbers, 6, first) == n
    assert (mine.steps[(slots[:first] + 1) * mine.longs - 1] == 5).all()


def test_it_stops_at_a_record_that_another_holds_and_goes_on_from_there():
    rng = np.random.default_rng(0)
    mine = Records(rng, 10, 4, "float32", 0)
    before = mine.words.copy().reshape(10, -1)
    slots, grad = np.array([7, 2, 5, 1]), np.ones((4, 4), np.float32)
    mine.steps[6 * mine.longs - 1] = np.iinfo(np.int64).min + 3  # as one that is being changed, last by step 3
    assert mine.of(cuda_ops.sgd_update_shared, slots, grad, -1.0, 1.0, 9) == 2
    after = mine.words.reshape(10, -1)
    assert (after[[7, 2], :4] == before[[7, 2], :4] + 1).all() and (after[[5, 1], :4] == before[[5, 1], :4]).all()
    mine.steps[6 * mine.longs - 1] = 3
    assert mine.of(cuda_ops.sgd_update_shared, slots, grad, -1.0, 1.0, 9, 2) == 4
    assert (after[slots, :4] == before[slots, :4] + 1).all()


def test_no_update_of_threads_at_the_same_records_is_lost():
    rng = np.random.default_rng(1)
    mine = Records(rng, 40, 24, "float64", 0)
    mine.words[:] = 0
    grad, counts = np.ones((30, 24)), [np.zeros(40) for _ in range(4)]
    mine.of(cuda_ops.sgd_update_shared, np.arange(30), 0 * grad, -1.0, 1.0, 1)  # compiled before threads meet in it

    def work(number: int) -> None:
        own = np.random.default_rng(number)
        for step in range(3000):
            slots, done = own.permutation(40)[:30], 0
            while done < 30:
                done = mine.of(cuda_ops.sgd_update_shared, slots, grad, -1.0, 1.0, step, done)
            counts[number][slots] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (mine.words.reshape(40, -1)[:, :24] == sum(counts)[:, None]).all()


@pytest.mark.parametrize("bad", [-1, 60])
def test_slots_out_of_range_are_refused(bad):
    mine = Records(np.random.default_rng(0), 60, 2, "float32", 0)
    with pytest.raises(IndexError):
        mine.of(cuda_ops.sgd_update_shared, np.array([3, bad]), np.ones((2, 2), np.float32), 1.0, 1.0, 1)


def test_words_are_changed_at_once():
    words = np.zeros(3, np.int64)
    cuda_ops.add_to_word(words, 1, 0)

    def count() -> None:
        for _ in range(2000):
            cuda_ops.add_to_word(words, 1, 2)
            while not cuda_ops.exchange_word(words, 0, 0, 1):
                pass
            words[2] = words[2] + 1
            cuda_ops.store_word(words, 0, 0)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert words.tolist() == [0, 12_000, 6000]


def test_words_of_all_are_compared_in_one_column():
    words = np.array([[5, 9], [4, 9], [6, 1]])
    assert cuda_ops.all_reached(words, 0, 4) and not cuda_ops.all_reached(words, 0, 5)
    assert not cuda_ops.all_reached(words, 1, 2) and cuda_ops.all_reached(words[:0], 1, 2)
    with pytest.raises(IndexError):
        cuda_ops.store_word(words, 6, 1)
