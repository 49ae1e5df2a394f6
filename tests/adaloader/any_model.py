"""Small models and loops of every make, each with how its batches are drawn; `test_any_model.py` trains them.

A case is `loss(model, batch)` for a model with two tables, a linear layer and buffers, and `make(random, size)`.
"""

from __future__ import annotations

import functools
import warnings
from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from intents import register_container

ROWS, DIM = 300, 4
CASES: dict[str, Case] = {}


class Net(nn.Module):
    """Tables `item` and `word`, a layer, and a fixed permutation of ids."""

    def __init__(self):
        super().__init__()
        self.item = nn.Embedding(ROWS, DIM)
        self.word = nn.Embedding(ROWS, DIM)
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.top = nn.Linear(DIM, 1)
        self.register_buffer("shuffle", torch.arange(ROWS - 1, -1, -1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def score(self, rows):
        return torch.tanh(self.top(rows)).square().mean() + 0.1 * rows.square().sum()


@dataclass
class Case:
    """`warm_up`: batches before all rows are intended. `sizes`: samples of the batches, in turn."""

    loss: object
    make: object
    warm_up: int = 1
    sizes: tuple[int, ...] = (8, 8, 7, 8, 3)


def case(make, **options):
    def register(loss):
        CASES[loss.__name__] = Case(loss, make, **options)
        return loss

    return register


class Draw:
    """Random parts of batches."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)

    def ids(self, *shape, high=ROWS):
        return torch.randint(0, high, shape, generator=self.random)

    def number(self, low, high):
        return int(torch.randint(low, high, (), generator=self.random))


def flat(draw, size):
    return draw.ids(size)


def columns(draw, size):
    return {"ids": draw.ids(size, 5), "label": draw.ids(size, high=2).double()}


def ragged(draw, size):
    lengths = draw.ids(size, high=6) + 1
    longest = int(lengths.max())
    return {"ids": draw.ids(size, longest), "lengths": lengths}


def bags(draw, size):
    lengths = draw.ids(size, high=4)
    return {"values": draw.ids(int(lengths.sum())), "lengths": lengths}


# --- containers, and where preprocessing happens ---

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Sample:
    ids: torch.Tensor
    names: list = field(default_factory=list)


class Graph:
    def __init__(self, draw, size):
        self.nodes, self.edges, self.num_nodes = draw.ids(size), draw.ids(2, 3 * size, high=size), size


class Sealed:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


register_container(Sealed, lambda node: [(".inner", node.inner)])


@case(flat)
def a_bare_tensor(net, batch):
    return net.score(net.item(batch))


@case(columns)
def a_dict(net, batch):
    return net.score(net.item(batch["ids"]))


@case(lambda draw, size: [draw.ids(size), (draw.ids(size, 2), "text", None)])
def nested_lists(net, batch):
    return net.score(net.item(batch[0])) + net.score(net.word(batch[1][0]))


@case(lambda draw, size: Pair(draw.ids(size), {"deep": draw.ids(size)}))
def a_named_tuple(net, batch):
    return net.score(net.item(batch.left) * net.word(batch.right["deep"]))


@case(lambda draw, size: Sample(draw.ids(size), ["a"] * size))
def a_data_class(net, batch):
    return net.score(net.item(batch.ids))


@case(Graph)
def a_graph(net, batch):
    return net.score(net.item(batch.nodes)[batch.edges[0]] + net.word(batch.nodes[batch.edges[1]]))


@case(lambda draw, size: Sealed({"ids": draw.ids(size)}))
def a_registered_container(net, batch):
    return net.score(net.item(batch.inner["ids"]))


@case(lambda draw, size: {"ids": draw.ids(size, 3).numpy()})
def arrays_of_numpy(net, batch):
    return net.score(net.item(torch.from_numpy(batch["ids"]))) + net.score(net.word(torch.tensor(batch["ids"][:, 0])))


@case(lambda draw, size: {"ids": draw.ids(size).tolist()}, sizes=(8, 8, 7, 5))
def lists_of_numbers(net, batch):
    return net.score(net.item(torch.tensor(batch["ids"])))


# --- integer paths ---


@case(columns)
def cat_and_stack(net, batch):
    ids = batch["ids"]
    return net.score(net.item(torch.cat([ids[:, 0], ids[:, 1]]))) + net.score(
        net.word(torch.stack([ids[:, 2], ids[:, 3] // 2]))
    )


@case(columns)
def slices_and_steps(net, batch):
    return net.score(net.item(batch["ids"][:, 1:4:2])) + net.score(net.word(batch["ids"][..., -1]))


@case(columns)
def a_boolean_mask(net, batch):
    ids = batch["ids"]
    return net.score(net.item(ids[ids > 40]))


@case(columns)
def gather_and_where(net, batch):
    ids = batch["ids"]
    return net.score(net.item(ids.gather(1, ids[:, :2] % 5))) + net.score(net.word(torch.where(ids > 99, ids, 7)))


@case(columns)
def unique_with_inverse(net, batch):
    unique, inverse = batch["ids"].unique(return_inverse=True)
    return net.score(net.item(unique)[inverse])


@case(bags)
def offsets_by_cumsum(net, batch):
    offsets = F.pad(batch["lengths"].cumsum(0), (1, 0))[:-1]
    return net.score(net.bag(batch["values"], offsets)) + net.score(net.item(offsets))


@case(columns)
def hashing(net, batch):
    return net.score(net.item((batch["ids"] * 2654435761 + 97) % ROWS)) + net.score(
        net.word(torch.bitwise_xor(batch["ids"], 85) % ROWS)
    )


@case(columns, warm_up=12)
def through_a_buffer_that_changes(net, batch):
    rows = net.item(net.shuffle[batch["ids"]])
    if int(net.calls) == 4:
        net.shuffle.copy_(net.shuffle.flip(0))
    net.calls.add_(1)
    return net.score(rows)


@case(columns)
def sorted_and_padded(net, batch):
    ids = batch["ids"].sort(1, descending=True).values
    return net.score(net.item(F.pad(ids, (1, 0), value=3)))


@case(columns)
def casts_and_moves(net, batch):
    return net.score(net.item(batch["ids"].to(torch.int32).to("cpu", non_blocking=True)))


@case(columns)
def in_place_on_the_batch(net, batch):
    batch["ids"][:, 1].add_(1).remainder_(ROWS)
    return net.score(net.item(batch["ids"]))


@case(columns)
def in_place_on_a_copy(net, batch):
    ids = batch["ids"].clone()
    ids[ids % 7 == 0] = 5
    ids[:, 0] = 9
    return net.score(net.item(ids))


# --- ragged shapes ---


@case(ragged)
def padded_sequences_with_positions(net, batch):
    ids = batch["ids"]
    mask = torch.arange(ids.shape[1]) < batch["lengths"][:, None]
    return net.score((net.item(ids) + net.word(torch.arange(ids.shape[1]))) * mask[..., None])


@case(ragged)
def packed_sequences(net, batch):
    packed = nn.utils.rnn.pack_padded_sequence(batch["ids"], batch["lengths"], batch_first=True, enforce_sorted=False)
    return net.score(net.item(packed.data))


@case(bags)
def bags_of_values(net, batch):
    ends = batch["lengths"].cumsum(0)
    return net.score(net.bag(batch["values"], ends - batch["lengths"]))


@case(lambda draw, size: {"ids": draw.ids(size, 9), "keep": draw.number(3, 9)}, warm_up=6)
def a_number_as_size(net, batch):
    kept = batch["ids"][:, : batch["keep"]]
    return net.score(net.item(kept) + net.word(torch.arange(batch["keep"])))


@case(lambda draw, size: {"ids": draw.ids(size, 9), "lengths": draw.ids(size, high=6) + 3}, warm_up=6)
def the_largest_of_lengths_in_python(net, batch):
    longest = max(batch["lengths"].tolist())
    return net.score(net.item(batch["ids"][:, :longest]))


@case(lambda draw, size: {"ids": draw.ids(size, 9), "lengths": draw.ids(size, high=6) + 3}, warm_up=6)
def the_largest_of_lengths_by_item(net, batch):
    return net.score(net.item(batch["ids"][:, : int(batch["lengths"].max())]))


@case(columns, sizes=(16, 16, 16, 5))
def products_of_sizes(net, batch):
    size, width = batch["ids"].shape
    doubled = batch["ids"].repeat(2, 1).view(2 * size * width)
    return net.score(net.item(doubled)) + net.score(net.word(torch.arange(2 * size)))


# --- lists of sequences, and lists of sizes that Python reads ---


def sequences(draw, size):
    return [draw.ids(draw.number(1, 9)) for _ in range(size)]


def jagged(draw, size):
    lengths = draw.ids(3, size, high=4)
    return {"lengths": lengths, "values": draw.ids(int(lengths.sum()))}


def ragged_tensor(draw, size):
    return torch.nested.nested_tensor(sequences(draw, size), layout=torch.jagged)


@case(sequences, sizes=(8,), warm_up=2)
def padded_by_pytorch(net, batch):
    return net.score(net.item(nn.utils.rnn.pad_sequence(batch, batch_first=True)))


@case(sequences, sizes=(8,), warm_up=4)
def padded_in_python(net, batch):
    longest = max(map(len, batch))
    return net.score(net.item(torch.stack([F.pad(ids, (0, longest - len(ids)), value=7) for ids in batch])))


@case(sequences, sizes=(8,), warm_up=2)
def padded_row_by_row(net, batch):
    padded = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    for row, ids in enumerate(batch):
        padded[row, : len(ids)] = ids
    return net.score(net.item((padded + 1) % ROWS))


@case(sequences, sizes=(8,), warm_up=4)
def packed_from_a_list(net, batch):
    return net.score(net.item(nn.utils.rnn.pack_sequence(batch, enforce_sorted=False).data))


@case(lambda draw, size: [ids.tolist() for ids in sequences(draw, size)], sizes=(8,), warm_up=12)
def lists_of_lists(net, batch):
    longest = max(map(len, batch))
    return net.score(net.item(torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])))


@case(jagged)
def split_by_a_list(net, batch):
    parts = batch["values"].split(batch["lengths"].sum(1).tolist())
    return sum(net.item((part * 3 + 1) % ROWS).square().sum() for part in parts)


@case(jagged, sizes=(8, 8, 7), warm_up=25)
def bounds_from_a_list(net, batch):
    ends = [0, *batch["lengths"].sum(1).cumsum(0).tolist()]
    parts = [batch["values"][ends[at] : ends[at + 1]] for at in range(3)]
    return sum(net.word((part + at) % ROWS).square().sum() for at, part in enumerate(parts))


@case(lambda draw, size: {"ids": draw.ids(size, 12), "k": draw.ids(size, draw.number(3, 9))}, warm_up=2)
def counted_from_the_end(net, batch):
    return net.score(net.item(batch["ids"][:, -batch["k"].shape[1] :]))


@case(columns)
def formed_like_rows(net, batch):
    rows = net.word(batch["ids"])
    first = rows.new_full((len(rows), 1), 3).long()
    return net.score(net.item(torch.cat([first, torch.full_like(rows[..., 0], 5).long() + batch["ids"] // 2], 1)))


@case(ragged_tensor)
def a_ragged_tensor(net, batch):
    return net.score(net.item(batch).values() * net.word(batch.values() // 2))


@case(ragged_tensor, sizes=(8,), warm_up=12)
def a_ragged_tensor_padded(net, batch):
    return net.score(net.item(torch.nested.to_padded_tensor(batch, 0)))


@case(lambda draw, size: {"ids": draw.ids(size, 5)}, warm_up=12)
def masked_at_random(net, batch):
    return net.score(net.item(batch["ids"].masked_fill(torch.rand(batch["ids"].shape) < 0.15, 1)))


# --- control flow that depends on the batch ---


@case(lambda draw, size: {"ids": draw.ids(size, 3), "second": bool(draw.number(0, 2))}, warm_up=20)
def a_flag(net, batch):
    if batch["second"]:
        return net.score(net.word(batch["ids"].flip(1) // 2))
    return net.score(net.item(batch["ids"][:, 0]))


# Each name is among those of the warm-up but for 1 in 10^7.
@case(lambda draw, size: {"ids": draw.ids(size, 3), "task": ["click", "buy", "skip"][draw.number(0, 3)]}, warm_up=40)
def a_task_by_name(net, batch):
    table = {"click": net.item, "buy": net.word, "skip": net.item}[batch["task"]]
    shift = {"click": 0, "buy": 11, "skip": 23}[batch["task"]]
    return net.score(table((batch["ids"] + shift) % ROWS))


@case(lambda draw, size: {"ids": draw.ids(size), "extra": draw.ids(size, 2) if draw.number(0, 2) else None}, warm_up=20)
def an_optional_field(net, batch):
    loss = net.score(net.item(batch["ids"]))
    return loss if batch["extra"] is None else loss + net.score(net.word(batch["extra"] + 0))


# Where the limit lies is known once both lengths beside it were seen: of four, within the warm-up but for 1 in 10^7.
@case(lambda draw, size: {"ids": draw.ids(size, (3, 6, 7, 11)[draw.number(0, 4)])}, warm_up=60)
def long_and_short(net, batch):
    ids = batch["ids"]
    if ids.shape[1] > 6:
        return net.score(net.word(ids[:, ::2])) + net.score(net.item(ids[:, 1::2] // 3))
    return net.score(net.item(ids))


@case(lambda draw, size: {"ids": draw.ids(size, 3), "which": draw.ids(high=2)}, warm_up=20)
def a_flag_in_a_tensor(net, batch):
    if batch["which"].item():
        return net.score(net.word((batch["ids"] + 1) % ROWS))
    return net.score(net.item(batch["ids"] // 2))


# --- ways to reach a table ---


@case(flat)
def all_but_the_last_row(net, batch):
    return net.score(F.embedding(batch % (ROWS - 1), net.item.weight[:-1]))


@case(flat)
def as_complex_numbers(net, batch):
    rows = torch.view_as_complex(net.item.weight.view(ROWS, DIM // 2, 2))[batch]
    return net.score(torch.view_as_real(rows * rows).flatten(1))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return weight[ids]

    @staticmethod
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_add_(0, ids, gradient), None


@case(flat)
def by_a_function_of_autograd(net, batch):
    return net.score(_Rows.apply(net.item.weight, batch)) + net.score(net.item(batch // 2))


@case(flat)
def by_a_mask(net, batch):
    return net.score(net.item.weight[torch.zeros(ROWS, dtype=torch.bool).index_fill(0, batch, True)])


@case(flat)
def a_long_slice(net, batch):
    return net.score(net.item.weight[:100]) + net.score(net.word(batch))


@case(flat)
def a_row_that_is_set(net, batch):
    net.item.weight.data[0].zero_()
    with torch.no_grad():
        net.item.weight[1:3].mul_(0.5)
    return net.score(net.item(batch // 40))


@case(flat)
def data_and_detached(net, batch):
    return net.score(net.item.weight.data[batch] + net.word.weight.detach()[batch] + net.item(batch))


@case(flat)
def take_along_dim(net, batch):
    return net.score(torch.take_along_dim(net.item.weight, batch[:, None], 0)) + net.score(
        net.word.weight.gather(0, batch[:, None].expand(-1, DIM))
    )


@case(flat, sizes=(8, 8, 8))
def row_by_row(net, batch):
    return net.score(torch.stack([net.item.weight[int(i)] for i in batch]))


@case(flat)
def functional_call(net, batch):
    frozen = {"item.weight": net.item.weight.detach()}
    fixed = torch.func.functional_call(net.item, {"weight": frozen["item.weight"]}, (batch,))
    return net.score(torch.func.functional_call(net.item, dict(net.item.named_parameters()), (batch,)) * fixed)


@case(flat)
def checkpointed(net, batch):
    inner = functools.partial(checkpoint, use_reentrant=False)
    return net.score(inner(lambda ids: torch.sin(net.item(ids)) * net.word(ids // 2), batch))


@case(flat)
def checkpointed_reentrant(net, batch):
    start = net.top(net.word(batch))
    return net.score(checkpoint(lambda ids, x: torch.sin(net.item(ids)) * x, batch, start, use_reentrant=True))


@case(
    lambda draw, size: torch.cat([draw.ids(size, 2).double(), torch.rand(size, 3, generator=draw.random).double()], 1)
)
def ids_as_floats(net, batch):
    return net.score(net.item(batch[:, :2].long())) + batch[:, 2:].sum() * net.top.bias.sum()


@case(lambda draw, size: {"ids": draw.ids(size), "none": draw.ids(0)})
def empty_ids(net, batch):
    return net.score(net.item(batch["ids"])) + net.word(batch["none"]).sum()


# --- not derived exactly, but some of the batch's ids ---


@case(flat)
def shuffled_negatives(net, batch):
    return net.score(net.item(batch) * net.item(batch[torch.randperm(len(batch))]))


@case(lambda draw, size: {"ids": draw.ids(size, 4)})
def sorted_by_numpy(net, batch):
    return net.score(net.item(torch.from_numpy(np.sort(batch["ids"].numpy().ravel())[::-1].copy())))


# --- what cannot be derived: part of the message, the loss and its batches ---

NAMES = {f"name {number}": number for number in range(ROWS)}

with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.library.custom_op("adaloader_tests::bucket", mutates_args=())
    def bucket(ids: torch.Tensor) -> torch.Tensor:
        return (ids * 13 + 5) % ROWS


def by_numpy(net, batch):
    return net.score(net.item(torch.from_numpy((batch["ids"].numpy() * 7 + 1) % ROWS)))


def by_name(net, batch):
    return net.score(net.item(torch.tensor([NAMES[name] for name in batch["names"]])))


def drawn_negatives(net, batch):
    return net.score(net.item(torch.randint(0, ROWS, (len(batch["ids"]), 6))))


def best_by_score(net, batch):
    with torch.no_grad():
        best = net.word.weight[:40].sum(1).topk(5).indices
    return net.score(net.item(best + 100))


def by_custom_operation(net, batch):
    return net.score(net.item(bucket(batch["ids"])))


def constant_by_numpy(net, batch):
    return net.score(net.item(torch.from_numpy(np.random.default_rng(int(batch["ids"].sum())).integers(0, ROWS, 50))))


def named(draw, size):
    return {"ids": draw.ids(size, 3), "names": [f"name {i}" for i in draw.ids(size).tolist()]}


UNDERIVED = {
    "by_numpy": (by_numpy, "numpy"),
    "by_name": (by_name, "numpy, Python"),
    "drawn_negatives": (drawn_negatives, "drawn at random by aten.randint"),
    "best_by_score": (best_by_score, "depend on a parameter"),
    "by_custom_operation": (by_custom_operation, "custom operation adaloader_tests"),
    "constant_by_numpy": (constant_by_numpy, "made anew for each step"),
}
