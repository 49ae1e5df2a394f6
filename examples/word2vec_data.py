"""Text for the word-vector example: one with planted synonyms that it makes itself, or one from a file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from draws import Weighted, uniform, zipf_weights
from torch.utils.data import Dataset

TEST_SHARE = 0.05
SYNONYMS = 3
SUCCESSORS = 4
SENTENCE = 20
# What a number is drawn for: one of the counters of its hash.
_KEEP, _WINDOW, _NEGATIVE = range(3)


@dataclass(frozen=True)
class Text:
    """Running text as word numbers (int64 `[n]` each): to train on, and held out. `words` names them; `meaning` (int64
    `[words]`, None where unknown) is the same for synonyms.
    """

    words: list[str]
    train: np.ndarray
    held_out: np.ndarray
    meaning: np.ndarray | None = None


class Positions(Dataset):
    """Positions of a text; a batch of them holds the pairs of skip-gram that have their centre there.

    Around each position is a window whose half-width is drawn from 1 to `window`, and each word in it makes a pair
    with the one in the middle. Frequent words are left out at random: a word of frequency f is kept with probability
    sqrt(subsample / f), as a centre and as a context (Mikolov et al. 2013; windows do not grow where words are left
    out, "clean" subsampling in Levy, Goldberg & Dagan 2015). Negatives follow frequency ** 0.75.

    A batch is a dict: `centre`, `context` int64 [pairs], `negatives` int64 [pairs, K] unless K is 0, and `positions`,
    the number of positions. All draws depend on (seed, epoch, position) alone.

    Args:
        text: int64 `[n]`.
        counts: how often each word occurs in the text to train on, int64 `[words]`.
        window: the largest half-width.
        negatives: K, per pair.
        subsample: the frequency above which words are left out at times; 0 to keep all.
        seed: of the draws.
    """

    def __init__(self, text: np.ndarray, counts: np.ndarray, window: int, negatives: int, subsample: float, seed: int):
        self.text, self.window, self.negatives, self.seed, self.epoch = text, window, negatives, seed, 0
        frequency = np.maximum(counts, 1) / counts.sum()
        self._kept_share = np.minimum(1.0, np.sqrt(subsample / frequency)) if subsample else np.ones(len(counts))
        self._popularity = Weighted(counts**0.75)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> dict[str, object]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, object]:
        """Return a whole batch; `runs.as_is` is the collate function that goes with it."""
        positions = np.asarray(indices, dtype=np.int64)
        centres, contexts = self._pairs(positions)
        batch = {
            "centre": torch.from_numpy(self.text[centres]),
            "context": torch.from_numpy(self.text[contexts]),
            "positions": len(positions),
        }
        if self.negatives:
            draws = np.arange(self.negatives)
            # A pair is known by its centre and its context, so its draws are its own.
            numbers = uniform(self.seed, self.epoch, _NEGATIVE, centres[:, None], contexts[:, None], draws)
            batch["negatives"] = torch.from_numpy(self._popularity.draw(numbers))
        return batch

    def _pairs(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of (centres, contexts), int64 `[pairs]` each."""
        offsets = np.concatenate([np.arange(-self.window, 0), np.arange(1, self.window + 1)])
        width = 1 + (uniform(self.seed, self.epoch, _WINDOW, positions) * self.window).astype(np.int64)
        contexts = positions[:, None] + offsets
        taken = (np.abs(offsets) <= width[:, None]) & (contexts >= 0) & (contexts < len(self.text))
        centres = np.broadcast_to(positions[:, None], contexts.shape)[taken]
        contexts = contexts[taken]
        kept = self._is_kept(centres) & self._is_kept(contexts)
        return centres[kept], contexts[kept]

    def _is_kept(self, positions: np.ndarray) -> np.ndarray:
        return uniform(self.seed, self.epoch, _KEEP, positions) < self._kept_share[self.text[positions]]

    def set_epoch(self, epoch: int) -> None:
        """Draw otherwise than in other epochs; call it before iterating over the loader."""
        self.epoch = epoch


class Words(Dataset):
    """All words, in order; a batch is a dict with `word` int64 [B]."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"word": torch.tensor(indices, dtype=torch.int64)}


def load_text(path: str | Path, min_count: int) -> Text:
    """Read words separated by white space; those that occur fewer than `min_count` times in all are left out.

    The last `TEST_SHARE` of the text is held out. Words are numbered from the most frequent one down.
    Raises FileNotFoundError or ValueError, naming the file.
    """
    tokens = Path(path).read_text(encoding="utf-8").split()
    counts = sorted(Counter(tokens).items(), key=lambda item: (-item[1], item[0]))
    words = [word for word, count in counts if count >= min_count]
    if len(words) < 2:
        raise ValueError(f"{path} has {len(words)} words that occur {min_count} times or more; expected at least 2")
    number = {word: at for at, word in enumerate(words)}
    text = np.array([number[token] for token in tokens if token in number], dtype=np.int64)
    return Text(words, *_split(text))


def make_synthetic(num_words: int, length: int, seed: int) -> Text:
    """Make a text of about `length` words in which each meaning has `SYNONYMS` words, used at random.

    A sentence is a walk of `SENTENCE` steps: it starts at a meaning drawn by Zipf's law (exponent 0.6), and from each
    meaning goes on to one of `SUCCESSORS` others.
    """
    meanings = num_words // SYNONYMS
    if meanings <= SUCCESSORS:
        raise ValueError(f"--words {num_words} is too few; give at least {SYNONYMS * (SUCCESSORS + 1)}")
    if length < 2 * SENTENCE:
        raise ValueError(f"--length {length} is too short; give at least {2 * SENTENCE}")
    rng = np.random.default_rng(seed)
    popularity = Weighted(zipf_weights(meanings, 0.6))
    successors = popularity.draw(rng.random((meanings, SUCCESSORS)))
    walk = np.empty((length // SENTENCE, SENTENCE), dtype=np.int64)
    walk[:, 0] = popularity.draw(rng.random(len(walk)))
    for step in range(1, SENTENCE):
        walk[:, step] = successors[walk[:, step - 1], rng.integers(SUCCESSORS, size=len(walk))]
    names = rng.permutation(meanings * SYNONYMS).reshape(meanings, SYNONYMS)  # synonyms are not neighbours in the table
    text = names[walk, rng.integers(SYNONYMS, size=walk.shape)].ravel()
    meaning = np.empty(meanings * SYNONYMS, dtype=np.int64)
    meaning[names] = np.arange(meanings)[:, None]
    return Text([f"word{at}" for at in range(len(meaning))], *_split(text), meaning)


def _split(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train = len(text) - int(len(text) * TEST_SHARE)
    return text[:train], text[train:]
