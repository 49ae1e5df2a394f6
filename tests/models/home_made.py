"""Models in the styles that people write them in: what they are given, and how ids get from there to a lookup."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from tests.models.zoo import Case, tied_tables

ROWS, DIM = 70, 4
SIZES = (8, 8, 8, 6, 8, 5)


def batches_of(make: Callable[[int], object], sizes: tuple[int, ...] = SIZES) -> Callable[[nn.Module], list]:
    def make_batches(model: nn.Module) -> Iterable:
        torch.manual_seed(21)
        return [make(size) for size in sizes]

    return make_batches


def popular(*shape: int, rows: int = ROWS) -> torch.Tensor:
    """Ids of which the lower ones come more often."""
    return torch.minimum(torch.randint(0, rows, shape), torch.randint(0, rows, shape))


class Rating(NamedTuple):
    user: torch.Tensor
    item: torch.Tensor
    stars: torch.Tensor


class Factorisation(nn.Module):
    """Matrix factorisation with biases, which are tables of dimension 1."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)
        self.user_bias, self.item_bias = nn.Embedding(ROWS, 1), nn.Embedding(ROWS, 1)
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, rating: Rating) -> torch.Tensor:
        product = (self.user(rating.user) * self.item(rating.item)).sum(-1)
        biases = self.user_bias(rating.user) + self.item_bias(rating.item)
        return functional.mse_loss(product + biases.squeeze(-1) + self.mean, rating.stars)


@dataclass
class Window:
    centre: torch.Tensor
    context: torch.Tensor
    noise: torch.Tensor


class SkipGram(nn.Module):
    """word2vec, with negatives that the batch brings."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Embedding(ROWS, DIM, sparse=True), nn.Embedding(ROWS, DIM, sparse=True)

    def forward(self, window: Window) -> torch.Tensor:
        centre = self.into(window.centre)[:, None, :]
        near = functional.logsigmoid((centre * self.out(window.context)).sum(-1))
        far = functional.logsigmoid(-(centre * self.out(window.noise)).sum(-1))
        return -(near.mean() + far.mean())


class SkipGramThatDraws(SkipGram):
    """word2vec that draws its negatives in the forward pass."""

    def forward(self, window: Window) -> torch.Tensor:
        return super().forward(Window(window.centre, window.context, torch.randint(0, ROWS, window.noise.shape)))


class HashedFields(nn.Module):
    """Fields of unbounded ids, hashed into two small tables (quotient and remainder)."""

    def __init__(self):
        super().__init__()
        self.quotient, self.remainder = nn.Embedding(31, DIM), nn.Embedding(ROWS, DIM)
        self.register_buffer("salt", torch.tensor([3, 5, 7]))
        self.out = nn.Linear(3 * DIM, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hashed = (batch["fields"] * 2654435761 + self.salt) % (31 * ROWS)
        rows = self.quotient(hashed // ROWS) * self.remainder(hashed % ROWS)
        return functional.mse_loss(self.out(rows.flatten(1)).squeeze(1), batch["label"])


class PackedGRU(nn.Module):
    """Sequences of any length, packed for a GRU; batches are tuples (list of sequences, labels)."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(ROWS, DIM, padding_idx=0)
        self.gru = nn.GRU(DIM, 5, batch_first=True)
        self.out = nn.Linear(5, 1)

    def forward(self, batch: tuple[list[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        sequences, label = batch
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        packed = pack_padded_sequence(self.word(padded), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        last = hidden[torch.arange(len(label)), lengths - 1]
        return functional.mse_loss(self.out(last).squeeze(1), label)


class PackedWords(nn.Module):
    """The ids are packed before the lookup, which sees the packed data."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(ROWS, DIM)
        self.lstm = nn.LSTM(DIM, 5)
        self.out = nn.Linear(5, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        packed = pack_padded_sequence(batch["words"], batch["lengths"], batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed._replace(data=self.word(packed.data)))
        return functional.mse_loss(self.out(last[0]).squeeze(1), batch["label"])


class Encoder(nn.Module):
    """PyTorch's transformer encoder with learned positions and a padding mask."""

    def __init__(self):
        super().__init__()
        self.word, self.position = nn.Embedding(ROWS, 8, padding_idx=0), nn.Embedding(30, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(8, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        words = batch["words"]
        rows = self.word(words) + self.position(torch.arange(words.size(1), device=words.device))
        hidden = self.encoder(rows, src_key_padding_mask=words == 0)
        return functional.mse_loss(self.out(hidden[:, 0]).squeeze(1), batch["label"])


class HierarchicalSoftmax(nn.Module):
    """The classes are leaves of a binary heap; the loss follows the path from the root."""

    def __init__(self):
        super().__init__()
        self.word, self.inner = nn.Embedding(64, DIM), nn.Embedding(64, DIM)
        self.depth = 6

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        word, target = batch
        leaf = target + 64
        levels = torch.arange(self.depth, 0, -1)
        nodes = leaf[:, None] >> levels
        turns = (leaf[:, None] >> (levels - 1)) & 1
        logits = (self.word(word)[:, None] * self.inner(nodes)).sum(-1)
        return functional.binary_cross_entropy_with_logits(logits, turns.to(logits.dtype))


class ManyTasks(nn.Module):
    """A flag in the batch says which head is trained, and which of two tables it reads."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(ROWS, DIM)
        self.own = nn.ModuleDict({task: nn.Embedding(ROWS, DIM) for task in ("click", "buy")})
        self.heads = nn.ModuleDict({task: nn.Linear(2 * DIM, 1) for task in ("click", "buy")})

    def forward(self, batch: dict[str, object]) -> torch.Tensor:
        task = batch["task"]
        rows = torch.cat([self.shared(batch["item"]), self.own[task](batch["item"] % 50)], -1)
        return functional.mse_loss(self.heads[task](rows).squeeze(1), batch["label"])


class Jagged:
    """Ragged lists of ids by feature, in the form of one tensor of values and one of lengths."""

    def __init__(self, features: list[str], size: int):
        self.features = features
        self.lengths = torch.randint(0, 4, (len(features), size))
        self.values = popular(int(self.lengths.sum()))
        self.label = torch.randn(size)


class BagsOfFeatures(nn.Module):
    """A bag per feature, cut out of the joint list by cumulated lengths; some are empty."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleDict({name: nn.EmbeddingBag(ROWS, DIM, mode="sum") for name in "abc"})
        self.out = nn.Linear(3 * DIM, 1)

    def forward(self, batch: Jagged) -> torch.Tensor:
        sizes = batch.lengths.sum(1).tolist()
        pooled = []
        for name, values, lengths in zip(batch.features, batch.values.split(sizes), batch.lengths, strict=True):
            offsets = torch.cumsum(lengths, 0) - lengths
            pooled.append(self.bags[name](values, offsets))
        return functional.mse_loss(self.out(torch.cat(pooled, 1)).squeeze(1), batch.label)


class NextItem(nn.Module):
    """Sequential recommendation: one table for the history, the item that followed, and one that did not."""

    def __init__(self):
        super().__init__()
        self.item, self.place = nn.Embedding(ROWS + 1, DIM, padding_idx=0), nn.Embedding(30, DIM)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        history, target, other = batch["words"], batch["target"], batch["other"]
        places = torch.arange(history.shape[1]).expand_as(history)
        rows = self.item(history) * DIM**0.5 + self.place(places)
        causal = torch.ones(history.shape[1], history.shape[1]).triu(1).bool()
        hidden, _ = self.attention(rows, rows, rows, attn_mask=causal)
        scores = [(hidden[:, -1] * self.item(which)).sum(-1) for which in (target, other)]
        return functional.softplus(scores[1] - scores[0]).mean()


class TwoTowers(nn.Module):
    """Two towers with in-batch negatives and the usual correction by popularity."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(ROWS, DIM), nn.EmbeddingBag(ROWS, DIM)
        self.popularity = nn.Embedding(ROWS, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        user, item = self.user(batch["user"]), self.item(batch["words"])
        logits = functional.normalize(user, dim=1) @ functional.normalize(item, dim=1).T
        logits = logits - self.popularity(batch["user"]).T
        return functional.cross_entropy(logits / 0.1, torch.arange(len(user)))


class Checkpointed(nn.Module):
    """Lookups inside activation checkpointing are repeated in the backward pass."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(DIM, 1)

    def block(self, words: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.out(self.word(words).mean(1)))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        out = checkpoint(self.block, batch["words"], use_reentrant=False)
        return functional.mse_loss(out.squeeze(1), batch["label"])


class UniqueFirst(nn.Module):
    """Looks distinct ids up once, and spreads the rows by the inverse."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, DIM))
        self.out = nn.Linear(DIM, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        distinct, inverse = torch.unique(batch["words"], return_inverse=True)
        return functional.mse_loss(self.out(self.table[distinct][inverse].mean(1)).squeeze(1), batch["label"])


class Bucketed(nn.Module):
    """Numbers become ids: by boundaries, by rounding, and by the logarithm of a distance (as T5's positions)."""

    def __init__(self):
        super().__init__()
        self.age, self.price, self.distance = nn.Embedding(9, DIM), nn.Embedding(40, DIM), nn.Embedding(16, DIM)
        self.register_buffer("boundaries", torch.linspace(-2, 2, 8))
        self.out = nn.Linear(3 * DIM, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        age = self.age(torch.bucketize(batch["label"], self.boundaries))
        price = self.price((batch["label"] * 5 + 20).round().clamp(0, 39).long())
        words = batch["words"]
        distance = (words[:, 1:] - words[:, :-1]).abs().clamp(min=1).double().log2().floor().long().clamp(max=15)
        rows = torch.cat([age, price, self.distance(distance).mean(1)], 1)
        return functional.mse_loss(self.out(rows).squeeze(1), batch["label"])


class MultiHot(nn.Module):
    """Ids are where a matrix of zeros and ones is not zero: how many there are differs from batch to batch."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(DIM, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        sample, ids = (batch["hot"] > 0).nonzero(as_tuple=True)
        pooled = torch.zeros(len(batch["hot"]), DIM).index_add(0, sample, self.word(ids))
        return functional.mse_loss(self.out(pooled).squeeze(1), batch["label"])


class SparseInput(nn.Module):
    """The batch is a sparse matrix of counts."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(DIM, 1)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        counts, label = batch
        counts = counts.coalesce()
        sample, ids = counts.indices()
        weighted = self.word(ids) * counts.values()[:, None]
        pooled = torch.zeros(len(label), DIM).index_add(0, sample, weighted)
        return functional.mse_loss(self.out(pooled).squeeze(1), label)


class NestedInput(nn.Module):
    """The batch is a nested tensor of sequences."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(DIM, 1)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        words, label = batch
        rows = self.word(words.values())
        pooled = torch.segment_reduce(rows, "mean", offsets=words.offsets(), axis=0)
        return functional.mse_loss(self.out(pooled).squeeze(1), label)


class Attentive(nn.Module):
    """A second hop: which memories are read depends on scores, so on parameters."""

    def __init__(self):
        super().__init__()
        self.word, self.memory = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)
        self.score = nn.Linear(DIM, ROWS)
        self.out = nn.Linear(DIM, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        question = self.word(batch["words"]).mean(1)
        weights, which = self.score(question).topk(3, dim=1)
        answer = (self.memory(which) * weights.softmax(1)[..., None]).sum(1)
        return functional.mse_loss(self.out(answer).squeeze(1), batch["label"])


class ThroughNumpy(nn.Module):
    """Ids take a detour through numpy, as in code that was written for something else."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(DIM, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = torch.from_numpy((batch["words"].numpy() * 7 + 1) % ROWS)
        return functional.mse_loss(self.out(self.word(ids).mean(1)).squeeze(1), batch["label"])


class Language(nn.Module):
    """A recurrent language model whose state is carried from batch to batch."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.word = nn.Embedding(ROWS, 6)
        self.lstm = nn.LSTM(6, 6)
        self.out = nn.Linear(6, ROWS)
        if tied:
            self.out.weight = self.word.weight
        self.state = None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        words, following = batch[:-1], batch[1:]
        if self.state is not None:
            self.state = tuple(part.detach() for part in self.state)
        hidden, self.state = self.lstm(self.word(words), self.state)
        return functional.cross_entropy(self.out(hidden).flatten(0, 1), following.flatten())


class Pretrained(nn.Module):
    """A frozen table, a table that is trained, and tables in a dictionary of parameters."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Embedding.from_pretrained(torch.randn(ROWS, DIM))
        self.word = nn.Embedding(ROWS, DIM, max_norm=1.5)
        self.tables = nn.ParameterDict({"a": torch.randn(ROWS, DIM), "b": torch.randn(ROWS, 1)})
        self.out = nn.Linear(DIM, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        words = batch["words"]
        rows = self.frozen(words) + self.word(words) + functional.embedding(words, self.tables["a"])
        rows = rows * self.tables["b"].index_select(0, words.flatten()).view(*words.shape, 1)
        return functional.mse_loss(self.out(rows.mean(1)).squeeze(1), batch["label"])


def sentences(size: int) -> dict[str, torch.Tensor]:
    """Padded sentences whose longest has another length in each batch; a few other columns."""
    longest = int(torch.randint(3, 9, ()))
    lengths = torch.randint(1, longest + 1, (size,))
    lengths[0] = longest
    words = popular(size, longest, rows=ROWS - 1) + 1
    return {
        "words": torch.where(torch.arange(longest) < lengths[:, None], words, 0),
        "lengths": lengths,
        "label": torch.randn(size),
        "user": popular(size),
        "target": popular(size) + 1,
        "other": popular(size) + 1,
        "fields": torch.randint(0, 10**9, (size, 3)),
        "hot": (torch.rand(size, ROWS) < 0.05).long(),
    }


def window(size: int) -> Window:
    return Window(popular(size), popular(size, 3), torch.randint(0, ROWS, (size, 6)))


def sparse_counts(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    dense = torch.where(torch.rand(size, ROWS) < 0.05, torch.rand(size, ROWS), 0.0)
    return dense.to_sparse(), torch.randn(size)


def nested(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    words = [popular(int(torch.randint(1, 6, ()))) for _ in range(size)]
    return torch.nested.nested_tensor(words, layout=torch.jagged), torch.randn(size)


def task_batch(size: int) -> dict[str, object]:
    return {"task": ["click", "buy"][size % 2], "item": popular(size), "label": torch.randn(size)}


def case(name: str, make_model: Callable[[], nn.Module], make: Callable[[int], object], **options) -> Case:
    return Case("home-made", name, make_model, batches_of(make), lambda model, batch: model(batch), **options)


def rating(size: int) -> Rating:
    return Rating(popular(size), popular(size), torch.randn(size))


def ragged(size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [popular(int(torch.randint(1, 7, ()))) for _ in range(size)], torch.randn(size)


def class_pair(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return popular(size, rows=64), popular(size, rows=64)


CASES = [
    case("matrix factorisation with biases", Factorisation, rating, per_sample=True),
    case("word2vec", SkipGram, window, per_sample=True),
    case("word2vec that draws its negatives", SkipGramThatDraws, window, coverage=0.5, note="random ids"),
    case("hashed fields", HashedFields, sentences, per_sample=True),
    case(
        "GRU over packed rows",
        PackedGRU,
        ragged,
        coverage=0.8,  # of a kind of its own for each number of sequences
        note="the batch is a list of sequences",
        per_sample=True,
    ),
    case("LSTM over packed ids", PackedWords, sentences, per_sample=True),
    case("transformer encoder", Encoder, sentences, per_sample=True),
    case("hierarchical softmax", HierarchicalSoftmax, class_pair, per_sample=True),
    Case(
        "home-made",
        "tasks chosen by a flag",
        ManyTasks,
        batches_of(task_batch, sizes=(8, 8, 7, 8, 7, 7, 8)),
        lambda model, batch: model(batch),
        warm_up_steps=7,
        per_sample=True,
        note="each kind of batch is learned when it comes first",
    ),
    case("bags of ragged features", BagsOfFeatures, lambda size: Jagged(list("abc"), size)),
    case("next item", NextItem, sentences, per_sample=True),
    case("two towers", TwoTowers, sentences),
    case("activation checkpointing", Checkpointed, sentences, per_sample=True),
    case("unique ids first", UniqueFirst, sentences, per_sample=True),
    case("buckets", Bucketed, sentences),
    case("multi-hot input", MultiHot, sentences, per_sample=True),
    case("sparse input", SparseInput, sparse_counts),
    case("nested input", NestedInput, nested),
    case(
        "ids that depend on scores",
        Attentive,
        sentences,
        coverage=0.0,
        note="ids depend on parameters",
        per_sample=True,
    ),
    case("ids through numpy", ThroughNumpy, sentences, coverage=0.0, note="a detour through numpy", per_sample=True),
    case("recurrent language model", Language, lambda size: popular(7, 8)),
    case(
        "recurrent language model, tied", lambda: Language(tied=True), lambda size: popular(7, 8), dense_of=tied_tables
    ),
    case("frozen, limited and bare tables", Pretrained, sentences, per_sample=True),
]
