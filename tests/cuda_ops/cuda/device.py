"""Where the tests of this folder run, and how large what they draw is there."""

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numba.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)
CAN_RUN = SIMULATED or torch.cuda.is_available()
DEVICE = torch.device("cpu" if SIMULATED or not torch.cuda.is_available() else "cuda")

# The simulator runs a Python thread for each of CUDA's: some milliseconds a kernel, and microseconds a word.
MOST_ROWS = 12 if SIMULATED else 20_000
dims = (
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 16, 33])
    if SIMULATED
    else st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 1000, 1024]))
)
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(0, MOST_ROWS)
drawn = settings(deadline=None, max_examples=8 if SIMULATED else 40, suppress_health_check=[HealthCheck.too_slow])


def on_device(array):
    """A tensor on the device with the elements of a NumPy array."""
    return torch.from_numpy(np.array(array, order="C")).to(DEVICE)


def make_store(rng, count, dim, state_words, dtype):
    """Return (words, stride, steps, records): records whose stride is at random a multiple of 16 bytes or not.

    `records` is a copy `[count, stride]` of the words in NumPy.
    """
    longs = 8 // dtype.itemsize
    stride = dim + state_words + longs
    stride += -stride % (16 // dtype.itemsize if rng.integers(2) else longs)
    kind = np.float32 if dtype == torch.float32 else np.float64
    records = rng.standard_normal((count, stride)).astype(kind)
    records[:, dim : dim + state_words] = rng.random((count, state_words)) + 0.1
    words = on_device(records.reshape(-1))
    return words, stride, words.view(torch.int64), records


def some_slots(rng, count):
    """Distinct slots in random order, int64; any number of them."""
    return rng.permutation(count)[: rng.integers(0, count + 1)]


def host(tensor):
    """A NumPy copy of a tensor."""
    return tensor.detach().cpu().numpy().copy()
