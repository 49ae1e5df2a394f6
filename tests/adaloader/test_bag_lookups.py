"""Every kind of bag of a table, against plain PyTorch on one process."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.adaloader.against_plain import OPTIMIZERS, assert_same_as_plain, train, weigh
from tests.adaloader.one_table import DIM, ROWS, Bag, batches


def pooled(rows: torch.Tensor, bag_of: torch.Tensor, bags: int, mode: str) -> torch.Tensor:
    out = rows.new_zeros(bags, DIM).index_add(0, bag_of, rows)
    return out if mode == "sum" else out / torch.bincount(bag_of, minlength=bags).clamp(min=1)[:, None]


def bag_by_hand(bag: nn.EmbeddingBag, ids: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """`bag(ids, offsets)`, whose own gradient by frequency PyTorch gets wrong on the CPU (pytorch/pytorch#190063)."""
    bags = len(ids) if offsets is None else len(offsets)
    flat = ids.reshape(-1).long()
    bag_of = torch.arange(len(flat)) // max(1, ids.shape[-1])
    if offsets is not None:
        bag_of = torch.searchsorted(offsets.long(), torch.arange(len(flat)), right=True) - 1
    rows = F.embedding(flat, bag.weight, padding_idx=bag.padding_idx, scale_grad_by_freq=True)
    return pooled(rows, bag_of, bags, bag.mode)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("keys", ["auto", None])
def test_bags_divide_gradients_by_frequency(mode, keys, seed):
    def loss_of(model, batch):
        out = []
        for ids, offsets in (
            (batch["ids"], None),
            (batch["flat"], batch["offsets"]),
            (batch["flat"][:0], batch["ends"] * 0),
        ):
            by_hand = not hasattr(model.bag.weight, "_managed")
            out.append(bag_by_hand(model.bag, ids, offsets) if by_hand else model.bag(ids, offsets))
        return weigh(torch.cat(out))

    assert_same_as_plain(
        lambda: Bag(mode=mode, scale_grad_by_freq=True), OPTIMIZERS["sgd"], batches(seed), train(loss_of), keys=keys
    )


BAGS = {
    "matrix": lambda m, b: m.bag(b["ids"]),
    "offsets": lambda m, b: m.bag(b["flat"], b["offsets"]),
    "no ids": lambda m, b: m.bag(b["flat"][:0], torch.zeros(3, dtype=torch.int64)),
    "int32": lambda m, b: m.bag(b["flat"].int(), b["offsets"].int()),
}
BAG_OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 7},
    "max norm": {"max_norm": 0.8, "padding_idx": -33},
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", BAG_OPTIONS.values(), ids=BAG_OPTIONS.keys())
@pytest.mark.parametrize("look_up", BAGS.values(), ids=BAGS.keys())
def test_bags(look_up, options, mode, seed):
    draw = random.Random(seed)
    assert_same_as_plain(
        lambda: Bag(mode=mode, **options),
        OPTIMIZERS[draw.choice(sorted(OPTIMIZERS))],
        batches(seed),
        train(lambda model, batch: weigh(look_up(model, batch))),
        keys=draw.choice(["auto", None]),
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bags_with_the_last_offset(mode, optimizer, seed):
    assert_same_as_plain(
        lambda: Bag(mode=mode, include_last_offset=True, padding_idx=7),
        OPTIMIZERS[optimizer],
        batches(seed),
        train(lambda model, batch: weigh(model.bag(batch["flat"], batch["ends"]))),
    )


class WeightedBag(nn.Module):
    """Bags whose weights are learned too."""

    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="sum", **options)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 7}, {"include_last_offset": True}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_of_bags_and_their_gradient(options, optimizer, seed):
    def loss_of(model, batch):
        if "include_last_offset" in options:
            weights = batch["flat_weights"] * model.scale.sum()
            return weigh(model.bag(batch["flat"], batch["ends"], per_sample_weights=weights))
        return weigh(model.bag(batch["ids"], per_sample_weights=batch["weights"] * model.scale))

    assert_same_as_plain(lambda: WeightedBag(**options), OPTIMIZERS[optimizer], batches(seed), train(loss_of))
