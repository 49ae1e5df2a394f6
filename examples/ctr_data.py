"""Click data for the example: synthetic logs with a planted signal, or the Criteo sample from three files.

Both have 13 dense features and 26 categorical ones a sample; all ids lie in one space, so that one table
serves every field.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

DENSE_FEATURES = 13
FIELDS = 26
CRITEO_ROWS = 33_762_588
TEST_SHARE = 0.1


@dataclass(frozen=True)
class Clicks(Dataset):
    """Samples held as three tensors: `dense` float32 [n, 13], `sparse` int64 [n, 26], `label` float32 [n]."""

    dense: torch.Tensor
    sparse: torch.Tensor
    label: torch.Tensor

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"dense": self.dense[index], "sparse": self.sparse[index], "label": self.label[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return a whole batch by three gathers; `runs.as_is` is the collate function that goes with it."""
        chosen = torch.tensor(indices)
        return {"dense": self.dense[chosen], "sparse": self.sparse[chosen], "label": self.label[chosen]}

    def with_ids(self, sparse: torch.Tensor) -> Clicks:
        """The same samples with other ids, int64 [n, 26]."""
        return Clicks(self.dense, sparse, self.label)


def split(clicks: Clicks) -> tuple[Clicks, Clicks]:
    """Return (train, test): the last tenth, in the order of the file, is the test set."""
    train = len(clicks) - int(len(clicks) * TEST_SHARE)
    return (
        Clicks(clicks.dense[:train], clicks.sparse[:train], clicks.label[:train]),
        Clicks(clicks.dense[train:], clicks.sparse[train:], clicks.label[train:]),
    )


def load_criteo(folder: str | Path) -> Clicks:
    """Read the Criteo sample from `folder`.

    The files are `sampled_dense_feats.npy` [n, 13], `sampled_sparse_feats.npy` [n, 26] (ids below 33,762,588)
    and `sampled_labels.npy` [n]. Raises FileNotFoundError or ValueError, naming the file.
    """
    folder = Path(folder)
    shapes = {"dense_feats": (DENSE_FEATURES,), "sparse_feats": (FIELDS,), "labels": ()}
    arrays = {}
    for name, shape in shapes.items():
        path = folder / f"sampled_{name}.npy"
        arrays[name] = np.load(path, allow_pickle=False)
        if arrays[name].shape[1:] != shape:
            raise ValueError(f"{path} has shape {arrays[name].shape}; expected (samples, *{shape})")
    if len({len(array) for array in arrays.values()}) != 1:
        raise ValueError(
            f"the files in {folder} have {[len(a) for a in arrays.values()]} samples; expected equal numbers"
        )
    return Clicks(
        torch.from_numpy(arrays["dense_feats"].astype(np.float32)),
        torch.from_numpy(arrays["sparse_feats"].astype(np.int64)),
        torch.from_numpy(arrays["labels"].astype(np.float32)),
    )


def make_synthetic(samples: int, rows: int, seed: int, exponent: float = 1.05) -> Clicks:
    """Make `samples` clicks whose ids follow Zipf's law, `rows // 26` ids a field.

    Every id and every dense feature has a hidden weight; a sample's logit is their sum, and its label is
    drawn with that probability. About a quarter of the samples are clicks, as in the Criteo logs.
    """
    per_field = rows // FIELDS
    if per_field < 1:
        raise ValueError(f"--rows {rows} is fewer than the {FIELDS} fields; give at least {FIELDS}")
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, per_field + 1) ** -exponent)
    cumulative /= cumulative[-1]
    weights = rng.normal(size=1 << 16).astype(np.float32)
    sparse = np.empty((samples, FIELDS), dtype=np.int64)
    logit = np.zeros(samples, dtype=np.float32)
    for field in range(FIELDS):
        popularity = np.searchsorted(cumulative, rng.random(samples), side="right")
        sparse[:, field] = field * per_field + _scattered(popularity, per_field, rng)
        logit += weights[_hashed(sparse[:, field], bits=16)]
    dense = np.log1p(rng.lognormal(1.0, 1.0, size=(samples, DENSE_FEATURES))).astype(np.float32)
    logit += (dense - dense.mean(0)) @ rng.normal(size=DENSE_FEATURES).astype(np.float32)
    logit = 2.0 * (logit - logit.mean()) / max(float(logit.std()), 1e-6) - 1.6
    label = rng.random(samples) < 1.0 / (1.0 + np.exp(-logit))
    return Clicks(torch.from_numpy(dense), torch.from_numpy(sparse), torch.from_numpy(label.astype(np.float32)))


def _scattered(popularity: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Map popularity ranks to ids one to one, so that popular rows are not neighbours in the table."""
    multiplier = int(rng.integers(1, rows + 1))
    while np.gcd(multiplier, rows) != 1:
        multiplier += 1
    return (popularity * multiplier + int(rng.integers(rows))) % rows


def _hashed(ids: np.ndarray, bits: int) -> np.ndarray:
    """Hash ids to `bits` bits by multiplication (Knuth, The Art of Computer Programming 3, section 6.4)."""
    return ((ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)).astype(np.int64)
