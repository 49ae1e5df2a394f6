"""Deriving keys leaves no trace: random numbers, batches, buffers, the user's modes and hooks are as without it."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adaloader import AdaLoader, ManagedTableError
from adaloader.planning.kinds import UNKNOWN, Kinds, features_of
from intents import contents
from tests.adaloader.against_plain import assert_same_as_plain, train
from tests.adaloader.any_model import CASES, Draw, Net
from tests.adaloader.test_any_model import batches_of


class Noisy(Net):
    """Draws from three generators, and keeps statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.4)

    def forward(self, ids):
        rows = self.norm(self.drop(self.item(ids % 299).flatten(0, -2)))
        return self.score(rows) * (1 + random.random() + float(np.random.rand()))


def test_dropout_and_statistics_are_those_of_plain_pytorch(seed):
    def loop(model, optimizer, loader):
        random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
        losses = train(lambda model, batch: model(batch["ids"]))(model, optimizer, loader)
        return [*losses, torch.rand(1), random.random(), np.random.rand(), model.norm.running_var.clone()]

    data = batches_of(CASES["a_dict"].make, (8, 8, 5), seed, 12)
    assert_same_as_plain(Noisy, lambda parameters: torch.optim.SGD(parameters, lr=0.1), data, loop)


@pytest.mark.parametrize("name", [name for name in CASES if name != "through_a_buffer_that_changes"])
def test_batches_buffers_and_generators_are_untouched(name, seed):
    case = CASES[name]
    torch.manual_seed(seed)
    net, other = Net(), None
    other = copy.deepcopy(net)
    data = batches_of(case.make, case.sizes, seed, 6)
    loader = AdaLoader.wrap(data, model=net, min_rows=1)
    untouched = batches_of(case.make, case.sizes, seed, 6)
    random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
    for ours, theirs in zip(loader, untouched, strict=True):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        with torch.no_grad():
            found = case.loss(net, ours)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        torch.set_rng_state(before[0])
        with torch.no_grad():
            torch.testing.assert_close(found, case.loss(other, theirs))
        assert torch.equal(after[0], torch.get_rng_state())
        assert before[1:] == after[1:]
        for (path, mine), (_, plain) in zip(contents(ours).traced, contents(theirs).traced, strict=True):
            assert np.array_equal(np.asarray(mine), np.asarray(plain)), path
    for (name_of, mine), (_, plain) in zip(net.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(mine, plain), name_of
    loader.close()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, Called])
def test_modes_and_hooks_of_the_user_see_watched_steps_as_others(mode, seed):
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = AdaLoader.wrap(batches_of(CASES["a_dict"].make, (8,), seed, 6), model=net, optimizer=optimizer, min_rows=1)
    inputs = []
    net.item.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    net.item.register_forward_hook(lambda module, args, rows: rows * 2)
    seen = []
    for batch in loader:
        with mode() as active:
            loss = net.score(net.item((batch["ids"] + 1) % 300))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(inputs[-1], (batch["ids"] + 1) % 300)
        seen.append(active.names)
    assert len(inputs) == 6
    calls = [name for name in seen[0] if "remainder" in name or "tanh" in name]
    assert calls and all([n for n in names if "remainder" in n or "tanh" in n] == calls for names in seen)
    loader.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_looks_up_again_counts_once(reentrant, seed):
    case = CASES["checkpointed_reentrant" if reentrant else "checkpointed"]
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    data = batches_of(case.make, (8,), seed, 5)
    loader = AdaLoader.wrap(data, model=net, optimizer=optimizer, min_rows=1)
    for batch in loader:
        case.loss(net, batch).backward()
        optimizer.step()
    unique = sum(len(batch.unique()) for batch in data)
    assert loader.stats()["tables"]["item.weight"]["lookups"] == unique
    program = loader.explain()["item.weight"].programs[0]
    assert sum(line.startswith("item.weight <-") for line in program) == 1
    loader.close()


TRANSFORMS = {
    "grad": lambda call, weight, ids: torch.func.grad(call)(weight, ids),
    "grad of a view": lambda call, weight, ids: torch.func.grad(call)(weight[:-1], ids),
    "vjp": lambda call, weight, ids: torch.func.vjp(lambda w: call(w, ids), weight)[0],
    "jvp": lambda call, weight, ids: torch.func.jvp(lambda w: call(w, ids), (weight,), (torch.ones(300, 4),))[1],
    "vmap": lambda call, weight, ids: torch.func.vmap(call, (None, 0))(weight, ids[:, None]),
    "grad per sample": lambda call, weight, ids: torch.func.vmap(torch.func.grad(call), (None, 0))(weight, ids),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_function_transforms_over_a_table_that_was_trained_make_it_dense(transform, seed):
    torch.manual_seed(seed)
    net, batches = Net(), [torch.randint(0, 299, (5,)) for _ in range(3)]  # a view has a row less
    optimizer = torch.optim.Adagrad(net.parameters(), lr=0.1)
    loader = AdaLoader.wrap(batches, model=net, optimizer=optimizer, min_rows=1)
    for ids in loader:
        net.item(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = net.item.weight.detach().clone()

    def call(weight, ids):
        return torch.func.functional_call(net.item, {"weight": weight}, (ids,)).sum()

    torch.testing.assert_close(transform(call, net.item.weight, batches[0]), transform(call, plain, batches[0]))
    assert type(net.item.weight) is torch.nn.Parameter
    torch.testing.assert_close(net.item.weight.detach(), plain)
    loader.close()


@pytest.mark.parametrize("strategy", [None, {"item.weight": "managed"}], ids=["auto", "managed"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_function_transforms_over_a_table_make_it_dense_or_are_refused(transform, strategy, seed):
    torch.manual_seed(seed)
    net, ids = Net(), torch.randint(0, 299, (5,))
    plain = net.item.weight.detach().clone()
    loader = AdaLoader.wrap([ids], model=net, min_rows=1, strategy=strategy)

    def call(weight, ids):
        return torch.func.functional_call(net.item, {"weight": weight}, (ids,)).sum()

    if strategy is None:
        torch.testing.assert_close(transform(call, net.item.weight, ids), transform(call, plain, ids))
        assert type(net.item.weight) is torch.nn.Parameter and not loader.explain()["item.weight"].managed
    else:
        with pytest.raises(ManagedTableError, match="item.weight.*managed"):
            transform(call, net.item.weight, ids)
    rows = net.item(ids)
    gradient = torch.func.grad(lambda weight: torch.func.functional_call(net.top, {"weight": weight}, (rows,)).sum())
    torch.testing.assert_close(gradient(net.top.weight), rows.sum(0, keepdim=True))
    loader.close()


# --- the choice between programs ---


class Program:
    """Stands for a program: only what it is refined with matters to the choice."""

    derived = ()

    def refine(self, other):
        return None


def test_a_tree_learns_flags_and_thresholds(seed):
    draw = Draw(seed)
    kinds = Kinds()

    def batch():
        ids = torch.zeros(draw.number(1, 9), draw.number(1, 12), dtype=torch.int64)
        return {"ids": ids, "task": ["a", "b"][draw.number(0, 2)], "other": bool(draw.number(0, 2))}

    def truth(batch):
        return 2 if batch["task"] == "b" else int(batch["ids"].shape[1] > 5)

    for label in range(3):
        kinds.keep(Program(), features_of(contents({"ids": torch.zeros(1, 1), "task": "c"})) | {"first": label})
    for _ in range(60):
        drawn = batch()
        kinds.teach(features_of(contents(drawn)), truth(drawn))
    right = sum(kinds.choose(features_of(contents(b)))[0][0] == truth(b) for b in (batch() for _ in range(100)))
    assert right >= 90


def test_what_nothing_tells_apart_is_intended_for_all():
    kinds = Kinds()
    for _ in range(2):
        kinds.keep(Program(), {"batch.shape[0]": 4})
    assert [label for label, _ in kinds.choose({"batch.shape[0]": 4})] == [1, 0]
    kinds.teach({"batch.shape[0]": 4, "x": True}, UNKNOWN)
    assert kinds.is_unknown({"batch.shape[0]": 4, "x": True}) and not kinds.is_unknown({"batch.shape[0]": 4})
    assert kinds.choose({"batch.shape[0]": 4, "x": True})
