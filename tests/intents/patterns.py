"""Ways from a batch to the ids of a lookup, as training scripts have them.

A pattern is a ``step(batch, tables)`` and a ``make(size)`` that draws a fresh batch of ``size`` samples. Closed-over
tensors are made once per pattern, as the buffers of a model would be.
"""

from __future__ import annotations

import warnings
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot, pad

ROWS = 5000
FIELDS = 7
PATTERNS: dict[str, tuple] = {}


def pattern(make):
    def register(step):
        PATTERNS[step.__name__] = (step, make)
        return step

    return register


def ids_of(*shape: int, high: int = 300) -> torch.Tensor:
    return torch.randint(0, high, shape)


def fields(size: int) -> dict:
    return {"dense": torch.randn(size, 3), "sparse": ids_of(size, FIELDS), "label": torch.rand(size)}


def flat(size: int) -> torch.Tensor:
    return ids_of(size)


def two(size: int) -> dict:
    return {"user": ids_of(size), "item": ids_of(size)}


def ragged(size: int) -> dict:
    """Sequences padded to the longest of the batch, whose length differs from batch to batch."""
    lengths = torch.randint(1, 9 + size % 5, (size,))
    longest = int(lengths.max())
    return {"ids": ids_of(size, longest) * (torch.arange(longest) < lengths[:, None]), "lengths": lengths}


def bags(size: int) -> dict:
    lengths = torch.randint(0, 5, (size,))
    total = int(lengths.sum())
    return {"values": ids_of(total), "lengths": lengths}


def with_dense(size: int) -> torch.Tensor:
    """Ids as floats beside dense columns, as a single packed tensor."""
    return torch.cat([torch.rand(size, 3), ids_of(size, 4).float()], dim=1)


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Sample:
    ids: torch.Tensor
    name: str
    label: torch.Tensor


class Graph:
    def __init__(self, size: int) -> None:
        self.node_ids = ids_of(size)
        self.edge_index = torch.randint(0, max(size, 1), (2, 3 * size))
        self.note = "not a tensor"
        self.self = self


@pattern(flat)
def bare_tensor(batch, tables):
    tables("t", batch)


@pattern(fields)
def dict_of_tensors(batch, tables):
    tables("t", batch["sparse"])


@pattern(lambda size: (ids_of(size), torch.randn(size)))
def tuple_of_tensors(batch, tables):
    ids, _ = batch
    tables("t", ids)


@pattern(lambda size: [ids_of(size), [ids_of(size, 2), "text", None, 3]])
def nested_list(batch, tables):
    tables("t", batch[0])
    tables("u", batch[1][0])


@pattern(lambda size: Pair(ids_of(size), {"deep": (ids_of(size, 3),)}))
def named_tuple(batch, tables):
    tables("t", batch.left)
    tables("u", batch.right["deep"][0])


@pattern(lambda size: Sample(ids_of(size), "name", torch.rand(size)))
def data_class(batch, tables):
    tables("t", batch.ids)


@pattern(Graph)
def plain_object(batch, tables):
    tables("t", batch.node_ids[batch.edge_index[0]])


@pattern(fields)
def every_column(batch, tables):
    for column in range(FIELDS):
        tables(f"t{column}", batch["sparse"][:, column])


@pattern(fields)
def slices_of_columns(batch, tables):
    tables("t", batch["sparse"][:, 2:5])
    tables("u", batch["sparse"][:, -2:])
    tables("v", batch["sparse"][:, :-1])
    tables("w", batch["sparse"][..., -1])


@pattern(fields)
def two_lookups_of_one_table(batch, tables):
    tables("t", batch["sparse"][:, 0])
    tables("t", batch["sparse"][:, 1])
    tables("t", batch["sparse"][:, 0])


OFFSETS = torch.arange(FIELDS) * 300


@pattern(fields)
def plus_offsets(batch, tables):
    tables("t", batch["sparse"] + OFFSETS)


@pattern(fields)
def plus_offsets_made_in_forward(batch, tables):
    tables("t", batch["sparse"] + batch["sparse"].new_tensor([300 * f for f in range(FIELDS)]).unsqueeze(0))


@pattern(two)
def concatenated(batch, tables):
    tables("t", torch.cat([batch["user"], batch["item"] + 1000]))


@pattern(two)
def stacked(batch, tables):
    tables("t", torch.stack([batch["user"], batch["item"] + 1000], dim=1))


@pattern(fields)
def hashed(batch, tables):
    mixed = (batch["sparse"] * 2654435761 + 12345) % 5000
    tables("t", torch.bitwise_xor(mixed, 77) % ROWS)


@pattern(fields)
def quotient_and_remainder(batch, tables):
    tables("q", batch["sparse"] // 16)
    tables("r", batch["sparse"] % 16)


@pattern(fields)
def where_rare(batch, tables):
    ids = batch["sparse"]
    tables("t", torch.where(ids > 150, ids, torch.zeros_like(ids)))


@pattern(ragged)
def boolean_mask(batch, tables):
    ids = batch["ids"]
    tables("t", ids[ids > 0])


@pattern(ragged)
def sizes_that_data_decides(batch, tables):
    kept = torch.masked_select(batch["ids"], batch["ids"] > 100)
    tables("t", torch.arange(kept.shape[0]))
    tables("u", torch.stack([kept, kept + 1], dim=1).view(kept.shape[0] * 2))


@pattern(fields)
def gathered(batch, tables):
    tables("t", batch["sparse"].gather(1, batch["sparse"][:, :2] % FIELDS))


PERMUTATION = torch.randperm(300)


@pattern(fields)
def through_a_buffer(batch, tables):
    tables("t", PERMUTATION[batch["sparse"]])


@pattern(fields)
def unique_with_inverse(batch, tables):
    unique, inverse = torch.unique(batch["sparse"], return_inverse=True)
    tables("t", unique)
    tables("u", inverse)


@pattern(fields)
def sorted_ids(batch, tables):
    ordered, order = batch["sparse"].flatten().sort()
    tables("t", ordered)
    tables("u", order)


@pattern(bags)
def cumulative_offsets(batch, tables):
    offsets = torch.zeros(len(batch["lengths"]) + 1, dtype=torch.long)
    offsets[1:] = batch["lengths"].cumsum(0)
    tables("values", batch["values"])
    tables("offsets", offsets[:-1])


@pattern(bags)
def repeated_by_length(batch, tables):
    segments = torch.repeat_interleave(torch.arange(len(batch["lengths"])), batch["lengths"])
    tables("t", segments)


@pattern(ragged)
def positions_of_ragged(batch, tables):
    ids = batch["ids"]
    tables("word", ids)
    tables("position", torch.arange(ids.size(1)))


POSITION_IDS = torch.arange(64).unsqueeze(0)


@pattern(ragged)
def positions_from_a_buffer(batch, tables):
    ids = batch["ids"]
    tables("word", ids)
    tables("position", POSITION_IDS[:, : ids.size(1)].expand(ids.size(0), -1))


@pattern(ragged)
def positions_where_valid(batch, tables):
    longest = int(batch["lengths"].max())
    valid = torch.arange(longest)[None, :] < batch["lengths"][:, None]
    tables("t", torch.where(valid, batch["ids"][:, :longest] + 1, 0))


@pattern(ragged)
def padded_left(batch, tables):
    tables("t", pad(batch["ids"], (1, 0), value=9))


@pattern(ragged)
def last_of_each_sequence(batch, tables):
    rows = torch.arange(batch["ids"].shape[0])
    tables("t", batch["ids"][rows, batch["lengths"] - 1])


@pattern(ragged)
def shifted_inputs(batch, tables):
    ids = batch["ids"]
    start = torch.full((ids.shape[0], 1), 7)
    tables("t", torch.cat([start, ids[:, :-1]], dim=1))


@pattern(ragged)
def flattened_and_back(batch, tables):
    ids = batch["ids"]
    size, length = ids.shape
    moved = (ids.reshape(-1) + 1).view(size, length)
    tables("t", moved.t().reshape(length * size))
    tables("u", moved.t().contiguous().view(length, size))


@pattern(ragged)
def repeated_and_expanded(batch, tables):
    ids = batch["ids"]
    size, length = ids.shape
    tables("t", torch.arange(length).repeat(size, 1) + ids)
    tables("u", torch.arange(size).unsqueeze(1).expand(size, length))


@pattern(fields)
def narrow_dtype(batch, tables):
    tables("t", batch["sparse"].to(torch.int32))
    tables("u", batch["sparse"].short().int() + 1)


@pattern(with_dense)
def packed_in_floats(batch, tables):
    tables("t", batch[:, 3:].long())
    tables("u", batch[:, 3].to(torch.int32))


@pattern(fields)
def added_in_place_to_a_clone(batch, tables):
    ids = batch["sparse"].clone()
    ids[:, 1] += 300
    ids[:, 2].add_(600)
    tables("t", ids)


@pattern(fields)
def added_in_place_to_the_batch(batch, tables):
    batch["sparse"][:, 1].add_(300)
    tables("t", batch["sparse"])


@pattern(fields)
def view_then_in_place(batch, tables):
    ids = batch["sparse"].clone()
    first = ids[:, 0]
    tables("before", first)
    ids += 11
    tables("after", first)
    ids.view(-1)[:3] = 5
    tables("later", first)


@pattern(fields)
def in_place_after_the_lookup(batch, tables):
    tables("t", batch["sparse"])
    batch["sparse"].zero_()


@pattern(fields)
def masked_fill_in_place(batch, tables):
    ids = batch["sparse"].clone()
    ids.masked_fill_(ids > 200, 0)
    ids[ids == 3] = 4
    tables("t", ids)


@pattern(fields)
def filled_buffer_of_zeros(batch, tables):
    ids = torch.zeros(batch["sparse"].shape[0], FIELDS + 1, dtype=torch.long)
    ids[:, 1:] = batch["sparse"]
    tables("t", ids)


@pattern(fields)
def positions_in_the_batch(batch, tables):
    size = batch["sparse"].shape[0]
    tables("t", torch.arange(size))
    tables("u", torch.arange(size) * FIELDS + batch["sparse"][:, 0])


@pattern(fields)
def views_by_number(batch, tables):
    size = batch["sparse"].shape[0]
    tables("t", batch["sparse"].view(size * FIELDS))
    tables("u", batch["sparse"].flatten().view(size, FIELDS))
    tables("v", batch["sparse"].view(size, 1, FIELDS).expand(size, 2, FIELDS))


@pattern(fields)
def split_and_chunked(batch, tables):
    for part in batch["sparse"].split([2, 3, 2], dim=1):
        tables("t", part)
    for part in batch["sparse"].chunk(2, dim=1):
        tables("u", part)
    for row in batch["sparse"].unbind(1):
        tables("v", row)


TOKEN = torch.tensor([3])


@pattern(fields)
def fixed_tokens(batch, tables):
    tables("t", batch["sparse"])
    tables("t", TOKEN)
    tables("t", torch.arange(3))
    tables("t", torch.tensor(4))


@pattern(fields)
def item_and_max(batch, tables):
    high = batch["sparse"].max().item()
    tables("t", batch["sparse"] + (high + 0))
    tables("u", one_hot(batch["sparse"][:, 0] % 5, 5))


@pattern(fields)
def detached_and_data(batch, tables):
    tables("t", batch["sparse"].detach())
    tables("u", batch["sparse"].data + 1)


@pattern(fields)
def seen_through_numpy_without_change(batch, tables):
    tables("t", torch.from_numpy(batch["sparse"].numpy()) + 1)


STAGING = torch.zeros(64 * FIELDS, dtype=torch.long)


@pattern(lambda size: fields(64))
def staged_through_a_buffer(batch, tables):
    STAGING.copy_(batch["sparse"].view(-1))
    tables("t", STAGING)


@pattern(fields)
def under_no_grad_and_inference(batch, tables):
    with torch.no_grad():
        tables("t", batch["sparse"] + 1)
    with torch.inference_mode():
        tables("u", batch["sparse"] + 2)


@pattern(fields)
def bucketised(batch, tables):
    tables("t", torch.bucketize(batch["dense"], torch.linspace(-2, 2, 9)))
    tables("u", torch.searchsorted(torch.linspace(-2, 2, 9), batch["dense"][:, 0].contiguous()))


@pattern(fields)
def standardised_then_rounded(batch, tables):
    dense = (batch["dense"] - batch["dense"].mean(0)) / batch["dense"].std(0)
    tables("t", (dense * 10).round().clamp(-20, 20).long() + 20)


@pattern(fields)
def written_to_out(batch, tables):
    out = torch.empty_like(batch["sparse"])
    torch.add(batch["sparse"], 5, out=out)
    tables("t", out)


@pattern(ragged)
def packed_sequence(batch, tables):
    order = batch["lengths"].argsort(descending=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(batch["ids"][order], batch["lengths"][order], batch_first=True)
    tables("t", packed.data)


@pattern(two)
def in_batch_negatives(batch, tables):
    size = batch["item"].shape[0]
    tables("t", batch["item"].roll(1))
    tables("u", batch["item"].unsqueeze(0).expand(size, size).reshape(size * size))


def reshaped(ids: torch.Tensor, fields: int) -> torch.Tensor:
    return (ids.view(-1, fields) + 1).view(ids.shape[0] * fields)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # deprecated, and still met
    scripted = torch.jit.script(reshaped)


@pattern(fields)
def through_torchscript(batch, tables):
    tables("t", scripted(batch["sparse"], FIELDS))


@pattern(fields)
def through_vmap(batch, tables):
    tables("t", torch.func.vmap(lambda row: row.flip(0) + torch.arange(FIELDS))(batch["sparse"]))


@pattern(fields)
def formed_like_a_parameter(batch, tables):
    """``weight.new_zeros`` takes nothing but type and device of a parameter."""
    start = tables.weight.new_zeros(batch["sparse"].shape[0], 1, dtype=torch.long)
    tables("t", torch.cat([start, batch["sparse"]], dim=1))


@pattern(fields)
def einsum_of_codes(batch, tables):
    base = torch.tensor([1, 2, 4, 8, 16, 32, 64])
    tables("t", torch.einsum("bf,f->b", batch["sparse"] % 2, base))


@pattern(fields)
def scattered(batch, tables):
    counts = torch.zeros(300, dtype=torch.long).scatter_add_(
        0, batch["sparse"].flatten(), torch.ones(batch["sparse"].numel(), dtype=torch.long)
    )
    tables("t", counts.topk(5).indices.sort().values)
    tables("u", torch.bincount(batch["sparse"][:, 0], minlength=300))


@pattern(lambda size: {"ids": ids_of(size, 6).to_sparse(), "dense": torch.randn(size)})
def sparse_leaf(batch, tables):
    tables("t", batch["ids"].coalesce().values())
    tables("u", batch["ids"].coalesce().indices()[1])


@pattern(lambda size: {"ids": ids_of(size, 9), "keep": int(torch.randint(3, 8, ())), "name": "a"})
def a_number_of_the_batch(batch, tables):
    tables("t", batch["ids"][:, : batch["keep"]])
    tables("u", torch.arange(batch["keep"] + 0))


@pattern(lambda size: {"ids": ids_of(size, 3).numpy()})
def arrays_of_numpy(batch, tables):
    tables("t", torch.from_numpy(batch["ids"]) + 1)
    tables("u", torch.as_tensor(batch["ids"][:, 0]))


@pattern(lambda size: {"ids": (torch.randperm(300)[:size]).tolist(), "label": torch.rand(size)})
def a_list_of_numbers(batch, tables):
    tables("t", torch.tensor(batch["ids"]) + 1)
