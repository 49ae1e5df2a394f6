"""Any model, any loop: derived keys are the used ones on later batches, results are plain PyTorch's, and what cannot be
derived is said."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging

import numpy as np
import pytest
import torch

from adaloader import AdaLoader
from tests.adaloader.against_plain import assert_same_as_plain
from tests.adaloader.any_model import CASES, ROWS, UNDERIVED, Draw, Net, named

LATER = 10


def batches_of(make, sizes, seed, count):
    draw = Draw(seed)
    return [make(draw, size) for _, size in zip(range(count), itertools.cycle(sizes), strict=False)]


def loop_that_counts(loss_of, stats):
    def loop(model, optimizer, loader):
        losses = []
        for batch in loader:
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)
            if hasattr(loader, "stats"):
                stats.append(loader.stats())
        return losses

    return loop


def run(loss_of, data):
    stats = []
    assert_same_as_plain(
        Net,
        lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        data,
        loop_that_counts(loss_of, stats),
        dtype=torch.float64,
    )
    return stats


@pytest.mark.parametrize("name", CASES)
def test_derived_keys_are_the_used_ones(name, seed):
    case = CASES[name]
    stats = run(case.loss, batches_of(case.make, case.sizes, seed, case.warm_up + LATER + 5))
    before, after = stats[-LATER - 1], stats[-1]
    assert after["lookups"] > before["lookups"]
    assert after["on_demand"] == before["on_demand"], "not all rows of ten later batches were intended"


def test_lists_that_fit_by_chance_do_not_set_a_batch_apart(seed):
    """In the first batch two of the sums are bounds too, as in none later: it was taken to be of a kind of its own."""
    draw = np.random.default_rng(seed)

    def batch(*sizes):
        lengths = torch.tensor([[size - size // 2, size // 2] for size in sizes])
        return {"lengths": lengths, "values": torch.from_numpy(draw.integers(0, ROWS, sum(sizes)))}

    later = [batch(*draw.permutation([6, 10, 12])) for _ in range(6)]  # of the same total, and other bounds
    stats = run(
        CASES["bounds_from_a_list"].loss, [batch(5, 9, 14), *(batch(3 + n, 17, 20 - n) for n in range(5)), *later]
    )
    assert stats[-1]["on_demand"] == stats[-len(later) - 1]["on_demand"]


def test_there_are_enough_cases():
    assert len(CASES) + len(UNDERIVED) >= 40


@pytest.mark.parametrize("name", UNDERIVED)
def test_what_cannot_be_derived_is_said(name, seed, caplog):
    loss_of, reason = UNDERIVED[name]
    data = batches_of(named, (8, 7), seed, 34)
    with caplog.at_level(logging.WARNING, "adaloader"):
        stats = run(loss_of, copy.deepcopy(data))
    messages = [record.getMessage() for record in caplog.records]
    (said,) = [message for message in messages if "are not derived" in message and "'item.weight'" in message]
    assert reason in said and "any_model.py:" in said and "keys={'item.weight':" in said
    assert ("random_ids" in said) == ("random" in reason or "numpy" in said)
    (covered,) = [message for message in messages if "coverage" in message and "'item.weight'" in message]
    assert reason in covered
    assert stats[-1]["tables"]["item.weight"]["on_demand"] > 0


def test_a_function_for_one_table_and_derivation_for_another(seed):
    """Also for one that is looked up at two places, of which one could be derived."""

    def loss_of(net, batch):
        twice = net.item(torch.from_numpy((batch["ids"].numpy() * 7 + 1) % 300)).sum() + net.item(batch["ids"]).sum()
        return twice + net.word(batch["ids"] // 2).sum()

    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    data = batches_of(named, (8, 7), seed, 12)
    loader = AdaLoader.wrap(
        data,
        model=net,
        optimizer=optimizer,
        min_rows=1,
        keys={"item": lambda batch: torch.cat([(batch["ids"] * 7 + 1) % 300, batch["ids"]])},
    )
    demanded = []
    for batch in loader:
        loss_of(net, batch).backward()
        optimizer.step()
        demanded.append(loader.stats()["tables"])
    assert demanded[-1]["item.weight"]["on_demand"] == 0
    assert demanded[-1]["word.weight"]["on_demand"] == demanded[0]["word.weight"]["on_demand"] > 0
    explained = loader.explain()
    assert explained["item.weight"].keys == "given by the function in keys="
    assert explained["word.weight"].keys == "derived"
    loader.close()


def test_explain(seed):
    class Shop(Net):
        def __init__(self):
            super().__init__()
            self.small = torch.nn.Embedding(9, 4)
            self.scripted = torch.jit.script(torch.nn.Embedding(300, 4))
            self.short = torch.nn.Embedding(300, 4, dtype=torch.bfloat16)
            self.bare = torch.nn.Parameter(torch.randn(300, 4))

    def loss_of(net, batch):
        ids = batch["ids"]
        loss = net.item((ids + 5) % 300).sum() + net.small(ids % 9).sum() + net.scripted(ids).sum()
        loss = loss + net.short(ids).float().sum() + net.bare.square().sum() + net.bare[ids].sum()
        return loss + net.word(torch.from_numpy(batch["ids"].numpy() * 7 % 300)).sum()

    torch.manual_seed(seed)
    net = Shop()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for make in (
        lambda: AdaLoader.wrap(batches_of(named, (8,), seed, 6), model=net, optimizer=optimizer, min_rows=10),
        lambda: AdaLoader(batches_of(named, (8,), seed, 6), batch_size=None, model=net, min_rows=10),
    ):
        loader = make()
        for batch in loader:
            loss_of(net, batch).backward()
            optimizer.step()
        explained = loader.explain()
        assert explained["item.weight"].managed and explained["item.weight"].keys == "derived"
        assert explained["item.weight"].coverage == pytest.approx(
            1 - explained["item.weight"].on_demand / explained["item.weight"].lookups
        )
        (program,) = explained["item.weight"].programs
        assert any("remainder" in line for line in program) and "test_any_model.py:" in program[-1]
        word = explained["word.weight"]
        assert word.keys == "on demand" and "numpy" in word.sites[0].reason
        assert "test_any_model.py:" in word.last_mismatch and "batch " in word.last_mismatch
        assert explained["bag.weight"].keys == "not looked up yet"
        for name, why in {"small": "min_rows=10", "scripted": "TorchScript", "short": "bfloat16"}.items():
            assert not explained[f"{name}.weight"].managed and why in explained[f"{name}.weight"].why
        assert not explained["bare"].managed
        text = str(explained)
        for table in explained.tables:
            assert table.name in text and str(table.shape) in text
        parsed = json.loads(explained.to_json())
        assert {table["name"] for table in parsed["tables"]} == {table.name for table in explained.tables}
        assert parsed["tables"][0]["programs"] == explained.tables[0].programs
    with pytest.raises(KeyError, match="no such"):
        explained["no such"]
    loader.close()


def test_explain_when_the_model_is_gone(seed):
    def train():
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        draw = Draw(seed)
        loader = AdaLoader.wrap([draw.ids(6, 2) for _ in range(4)], model=model, optimizer=optimizer, min_rows=1)
        for ids in loader:
            model.score(model.item(ids)).backward()
            optimizer.step()
        return loader

    loader = train()
    gc.collect()
    assert loader.explain()["item.weight"].lookups > 0
    loader.close()


@pytest.mark.parametrize("when", ["after each step", "after each epoch"])
def test_inference_on_other_ids_is_no_lack_of_coverage(seed, when, caplog):
    """What one looks up for oneself between steps cannot be foreseen, and is not held against the keys."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    draw = Draw(seed)
    loader = AdaLoader.wrap([draw.ids(6, 2) for _ in range(10)], model=model, optimizer=optimizer, min_rows=1)

    def infer():
        with torch.no_grad():
            model.score(model.item(torch.arange(30)))

    for _ in range(5):
        for ids in loader:
            optimizer.zero_grad()
            model.score(model.item(ids)).backward()
            optimizer.step()
            if when == "after each step":
                infer()
        infer()
    stats = loader.stats()
    assert not [record for record in caplog.records if "coverage" in record.getMessage()]
    assert stats["intent_coverage"] > 0.97 and stats["on_demand"] >= 30 * 5
    loader.close()
