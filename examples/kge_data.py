"""Knowledge graphs for the example: one with planted structure that it makes itself, or one from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from draws import Weighted, integers, zipf_weights
from torch.utils.data import Dataset

TEST_SHARE = 0.05
GROUP = 20


@dataclass(frozen=True)
class Graph:
    """Triples (head, relation, tail), int64 `[n, 3]`: those to train on, those held out, and all that are known to be
    true, which include both.
    """

    num_entities: int
    num_relations: int
    train: np.ndarray
    held_out: np.ndarray
    known: np.ndarray


class Triples(Dataset):
    """Triples with, for each, `negatives` random entities to put in the place of its head, and of its tail.

    A batch is a dict: `head`, `relation`, `tail` int64 [B], and if `negatives` is above 0 `other_heads`, `other_tails`
    int64 [B, negatives]. Those of a triple depend on (seed, epoch, triple) alone.
    """

    def __init__(self, triples: np.ndarray, num_entities: int, negatives: int, seed: int):
        self.triples, self.num_entities, self.negatives, self.seed = triples, num_entities, negatives, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return a whole batch; `runs.as_is` is the collate function that goes with it."""
        chosen = np.asarray(indices, dtype=np.int64)
        names = ("head", "relation", "tail")
        batch = {name: torch.from_numpy(self.triples[chosen, at].copy()) for at, name in enumerate(names)}
        if self.negatives:
            draws = np.arange(2 * self.negatives)
            others = torch.from_numpy(
                integers(self.num_entities, self.seed, self.epoch, chosen[:, None], draws)  # [B, 2 * negatives]
            )
            batch["other_heads"], batch["other_tails"] = others.split(self.negatives, dim=1)
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Draw other negatives than in other epochs; call it before iterating over the loader."""
        self.epoch = epoch


class Entities(Dataset):
    """All entities, in order; a batch is a dict with `entity` int64 [B]."""

    def __init__(self, num_entities: int):
        self.num_entities = num_entities

    def __len__(self) -> int:
        return self.num_entities

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"entity": torch.tensor(indices, dtype=torch.int64)}


def load_graph(folder: str | Path) -> Graph:
    """Read a graph from the files in `folder`, tab-separated, one triple a line.

    Either integer triples in `train.*`, `valid.*` and `test.*`, or names of entities and relations in `train.txt`,
    `valid.txt` and `test.txt` with their numbers in `entities.dict` and `relations.dict` (number, tab, name). Held out
    are those of `test`; without a `train` file those of `valid` are trained on.
    Raises FileNotFoundError or ValueError, naming the file.
    """
    folder = Path(folder)
    dictionaries = [folder / "entities.dict", folder / "relations.dict"]
    numbers = [_read_numbers(path) for path in dictionaries] if dictionaries[0].exists() else None
    parts = {path.stem: _read_triples(path, numbers) for path in sorted(folder.glob("*.*")) if path.stem in _PARTS}
    if "test" not in parts or not {"train", "valid"} & set(parts):
        raise FileNotFoundError(
            f"{folder} needs a file test.txt or test.del, and one of train or valid; it has files for {sorted(parts)}"
        )
    known = np.concatenate(list(parts.values()))
    train = parts.get("train", parts.get("valid"))
    if not len(train) or not len(parts["test"]):
        raise ValueError(
            f"{folder} has {len(train)} triples to train on and {len(parts['test'])} to test; expected some"
        )
    if numbers is None:
        counts = int(known[:, [0, 2]].max()) + 1, int(known[:, 1].max()) + 1
    else:
        counts = len(numbers[0]), len(numbers[1])
    return Graph(*counts, train, parts["test"], np.unique(known, axis=0))


def make_synthetic(num_entities: int, num_relations: int, num_triples: int, seed: int) -> Graph:
    """Make a graph in which a relation leads from each group of entities to one other.

    Groups of about `GROUP` entities lie on a circle, and each relation goes some number of groups around it. Heads
    follow Zipf's law (exponent 0.8), and so do tails within the group that the relation leads to. Triples drawn twice
    count once; a share of `TEST_SHARE` is held out.
    """
    for name, number, least in (("entities", num_entities, 2 * GROUP), ("relations", num_relations, 1)):
        if number < least:
            raise ValueError(f"--{name} {number} is too few; give at least {least}")
    if num_triples < 2 / TEST_SHARE:
        raise ValueError(f"--triples {num_triples} is too few to hold some out; give at least {round(2 / TEST_SHARE)}")
    rng = np.random.default_rng(seed)
    groups = num_entities // GROUP
    order = rng.permutation(num_entities)  # entity order[i] is of group i % groups, and the i-th most popular
    heads = Weighted(zipf_weights(num_entities, 0.8)).draw(rng.random(num_triples))
    relations = rng.integers(num_relations, size=num_triples)
    target = (heads + rng.integers(groups, size=num_relations)[relations]) % groups
    place = Weighted(zipf_weights(num_entities // groups, 0.8)).draw(rng.random(num_triples))
    triples = np.stack([order[heads], relations, order[target + place * groups]], axis=1)
    triples = np.unique(triples, axis=0)[rng.permutation(len(np.unique(triples, axis=0)))]
    held_out = max(1, int(len(triples) * TEST_SHARE))
    return Graph(num_entities, num_relations, triples[held_out:], triples[:held_out], triples)


_PARTS = ("train", "valid", "test")


def _read_numbers(path: Path) -> dict[str, int]:
    """Read a dictionary file: name to number."""
    with open(path, encoding="utf-8") as file:
        pairs = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    numbers = {pair[1]: int(pair[0]) for pair in pairs if len(pair) == 2 and pair[0].isdecimal()}
    if sorted(numbers.values()) != list(range(len(pairs))):
        raise ValueError(f"{path}: expected lines of number, tab, name, numbered from 0 without gaps")
    return numbers


def _read_triples(path: Path, numbers: list[dict[str, int]] | None) -> np.ndarray:
    with open(path, encoding="utf-8") as file:
        triples = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    for line, triple in enumerate(triples, start=1):
        if len(triple) != 3:
            raise ValueError(f"{path}: line {line} has {len(triple)} fields, expected head, relation, tail")
    try:
        if numbers is None:
            read = np.array(triples, dtype=np.int64).reshape(-1, 3)
        else:
            entities, relations = numbers
            read = np.array([(entities[h], relations[r], entities[t]) for h, r, t in triples], dtype=np.int64)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error} is neither a number nor a name in the .dict files") from error
    if read.size and read.min() < 0:
        raise ValueError(f"{path} has the number {read.min()}; expected numbers from 0 up")
    return read.reshape(-1, 3)
