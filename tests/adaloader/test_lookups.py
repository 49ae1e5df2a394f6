"""Every way to look rows of a table up, against plain PyTorch on one process; bags are in `test_bag_lookups.py`."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader
from adaloader.memory.buffers import Buffers
from tests.adaloader.against_plain import OPTIMIZERS, assert_same_as_plain, train, weigh
from tests.adaloader.one_table import DIM, ROWS, Weight, batches

MODULES = {
    "plain": {},
    "sparse": {"sparse": True},
    "padding": {"padding_idx": 7},
    "padding counted from the end": {"padding_idx": -33},
    "frequency": {"scale_grad_by_freq": True},
    "frequency and padding": {"scale_grad_by_freq": True, "padding_idx": 7},
    "max norm": {"max_norm": 0.9},
    "max norm 1": {"max_norm": 1.1, "norm_type": 1.0},
    "max norm inf, frequency": {"max_norm": 0.5, "norm_type": float("inf"), "scale_grad_by_freq": True},
    "all": {"max_norm": 0.9, "scale_grad_by_freq": True, "padding_idx": 7},
}


@pytest.mark.parametrize("keys", ["auto", None])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_embedding_modules(options, optimizer, keys, seed):
    assert_same_as_plain(
        lambda: Weight(**options),
        OPTIMIZERS[optimizer],
        batches(seed),
        train(lambda model, batch: weigh(model.emb(batch["ids"]))),
        keys=keys,
    )


LOOKUPS = {
    "F.embedding": lambda m, b: F.embedding(b["ids"], m.table),
    "F.embedding by keywords": lambda m, b: F.embedding(input=b["ids"], weight=m.table, padding_idx=-1, sparse=True),
    "torch.embedding": lambda m, b: torch.embedding(m.table, b["ids"], 7, True),
    "F.embedding_bag": lambda m, b: F.embedding_bag(b["ids"], m.table, mode="sum"),
    "index_select": lambda m, b: m.table.index_select(0, b["flat"]),
    "torch.index_select": lambda m, b: torch.index_select(input=m.table, dim=-2, index=b["flat"].int()),
    "index_select of one": lambda m, b: m.table.index_select(0, b["ids"][0, 1]),
    "[ids]": lambda m, b: m.table[b["ids"]],
    "[negative ids]": lambda m, b: m.table[b["ids"] - ROWS],
    "[ids of both signs]": lambda m, b: m.table[b["ids"] - 20],
    "[list]": lambda m, b: m.table[b["flat"].tolist() + [1]],
    "[nested list, long]": lambda m, b: m.table[b["ids"].repeat(7, 1).tolist()],
    "[list of lists]": lambda m, b: m.table[b["ids"][:2, :3].tolist()[:1] + [[0, 2, 1]]],
    "[list of tensors]": lambda m, b: m.table[[b["ids"][0], torch.tensor([0, 2, 1, 0])]],
    "[list of 0-d tensors]": lambda m, b: m.table[[b["ids"][0, 0], torch.tensor(2)]],
    "[numpy]": lambda m, b: m.table[b["ids"].numpy()],
    "[numpy int32]": lambda m, b: m.table[b["ids"].numpy().astype(np.int32) - ROWS],
    "[int]": lambda m, b: m.table[int(b["ids"][1, 1])],
    "[negative int]": lambda m, b: m.table[-1] + m.table[np.int64(-3)],
    "[0-d tensor]": lambda m, b: m.table[b["ids"][0, 0]],
    "[slice]": lambda m, b: m.table[3:9:2],
    "[slice from the end]": lambda m, b: m.table[-4:],
    "[range]": lambda m, b: m.table[range(2, 6)],
    "[empty slice]": lambda m, b: m.table[5:5],
    "[ids, :]": lambda m, b: m.table[b["ids"], :],
    "[ids, column]": lambda m, b: m.table[b["ids"], 1],
    "[ids, columns]": lambda m, b: m.table[b["ids"][:, 0], torch.tensor([0, 2, 1, 0, -1])],
    "[ids, broadcast columns]": lambda m, b: m.table[b["ids"][:, :1], [0, 2, 1]],
    "[list, columns]": lambda m, b: m.table[[1, 5, -3], [0, 0, 2]],
    "[mask]": lambda m, b: m.table[torch.bincount(b["flat"], minlength=ROWS) > 0],
    "[mask as list]": lambda m, b: m.table[[True, False] * (ROWS // 2)],
    "[mask of numpy]": lambda m, b: m.table[np.bincount(b["flat"].numpy(), minlength=ROWS) > 1],
    "[ids, mask]": lambda m, b: m.table[b["ids"][:2, 0], torch.tensor([True, False, True])],
    "[ids, None]": lambda m, b: m.table[b["ids"], None],
    "[ids, ..., 0]": lambda m, b: m.table[b["ids"], ..., 0],
    "[ids, 1:]": lambda m, b: m.table[b["ids"], 1:],
    "[int, columns]": lambda m, b: m.table[3, torch.tensor([0, 2, 2])],
    "[slice, columns]": lambda m, b: m.table[2:6, [2, 0]],
    "[(ids,)]": lambda m, b: m.table[(b["ids"],)],
    "int32": lambda m, b: F.embedding(b["ids"].int(), m.table),
    "0-d": lambda m, b: F.embedding(b["ids"][1, 2], m.table),
    "1-d": lambda m, b: F.embedding(b["flat"], m.table),
    "3-d": lambda m, b: F.embedding(b["ids"][:4].view(2, 2, 4), m.table),
    "no ids": lambda m, b: F.embedding(b["ids"][:0], m.table),
    "no ids, [ids]": lambda m, b: m.table[b["ids"][:, :0]] + m.table[[]].sum(),
    "no ids, index_select": lambda m, b: m.table.index_select(0, b["flat"][:0]),
    "transposed": lambda m, b: F.embedding(b["ids"].T, m.table),
    "strided": lambda m, b: F.embedding(b["ids"][::2, 1::2], m.table),
    "expanded": lambda m, b: F.embedding(b["ids"][:, :1].expand(5, 6), m.table),
    "gradient expanded": lambda m, b: F.embedding(b["ids"], m.table).sum(1, keepdim=True).expand(5, 4, DIM),
    "constant ids": lambda m, b: F.embedding(torch.arange(6), m.table),
    "several lookups": lambda m, b: torch.cat(
        [
            F.embedding(b["ids"], m.table).flatten(0, 1),
            m.table[b["flat"]],
            m.table.index_select(0, b["flat"]),
            F.embedding_bag(b["ids"] + 1, m.table),
            F.embedding(b["ids"][0], m.table, padding_idx=7),
            F.embedding(b["ids"][1], m.table, scale_grad_by_freq=True),
            F.embedding(b["ids"][:2].flatten(), m.table, scale_grad_by_freq=True),
        ]
    ),
    "renormed after a lookup": lambda m, b: (
        F.embedding(b["ids"], m.table) * F.embedding(b["ids"].flip(0), m.table, max_norm=0.7)
    ),
}


@pytest.mark.parametrize("keys", ["auto", None])
@pytest.mark.parametrize("look_up", LOOKUPS.values(), ids=LOOKUPS.keys())
def test_lookups(look_up, keys, seed):
    optimizer = random.Random(seed).choice(sorted(OPTIMIZERS))
    assert_same_as_plain(
        Weight,
        OPTIMIZERS[optimizer],
        batches(seed),
        train(lambda model, batch: weigh(look_up(model, batch))),
        keys=keys,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_table_shared_by_two_modules(optimizer, seed):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(ROWS, DIM)
            self.bag = nn.EmbeddingBag(ROWS, DIM, mode="mean")
            self.bag.weight = self.emb.weight
            self.other = nn.Embedding(ROWS + 1, DIM, padding_idx=7)

        def forward(self, batch):
            return torch.cat([self.emb(batch["ids"]).sum(1), self.bag(batch["ids"]), self.other(batch["ids"]).sum(1)])

    outcome = assert_same_as_plain(
        Shared, OPTIMIZERS[optimizer], batches(seed), train(lambda model, batch: weigh(model(batch)))
    )
    assert set(outcome.stats["tables"]) == {"emb.weight", "other.weight"}


def test_float32_tables(seed):
    assert_same_as_plain(
        Weight,
        OPTIMIZERS["adagrad"],
        batches(seed, 10),
        train(lambda model, batch: weigh(model.emb(batch["ids"])) / 20),
        dtype=torch.float32,
    )


def test_frozen_tables_and_detached_lookups_have_no_gradient(seed):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Embedding.from_pretrained(torch.randn(ROWS, DIM))
            self.emb = nn.Embedding(ROWS, DIM)
            self.linear = nn.Linear(DIM, 1)

        def forward(self, batch):
            ids = batch["ids"]
            target = self.emb.weight.detach()[ids] + F.embedding(ids, self.emb.weight.data, scale_grad_by_freq=True)
            assert not target.requires_grad and not self.frozen(ids).requires_grad
            return self.linear(self.frozen(ids) + 0.5 * target + self.emb(ids))

    make = OPTIMIZERS["adagrad"]
    loop = train(lambda model, batch: weigh(model(batch)))
    managed = assert_same_as_plain(Model, make, batches(seed), loop)
    assert not any(name.startswith("0.") for name in managed.state if name.endswith("sum")) or torch.equal(
        managed.state["0.sum"], torch.zeros(ROWS, DIM, dtype=torch.float64)
    )


def test_thawing_and_freezing_between_steps(seed):
    def loop(model, optimizer, loader):
        seen = []
        for at, batch in enumerate(loader):
            model.emb.weight.requires_grad_(at % 3 != 1)
            out = model.emb(batch["ids"])
            assert out.requires_grad == (at % 3 != 1)
            optimizer.zero_grad()
            if out.requires_grad:
                weigh(out).backward()
            optimizer.step()
            seen.append(out)
        return seen

    assert_same_as_plain(Weight, OPTIMIZERS["sgd"], batches(seed, 7), loop)


def test_lookups_without_gradient_between_steps(seed):
    """no_grad, inference_mode and eval in the middle of a batch, of its ids and of others, see the current rows."""

    def loop(model, optimizer, loader):
        seen = []
        for batch in loader:
            before = torch.no_grad()
            with before:
                seen.append(model.emb(batch["ids"]))
            out = model.emb(batch["ids"])
            with torch.inference_mode():
                seen.append(model.emb(batch["flat"]).clone())
                seen.append(model.emb(batch["ids"]).sum())
            weigh(out).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                seen.append(model.emb(batch["ids"]))
                seen.append(model.emb(torch.arange(ROWS)))
            model.train()
        return seen

    assert_same_as_plain(Weight, OPTIMIZERS["adagrad"], batches(seed), loop)


@pytest.mark.parametrize("how", ["retain", "two losses", "two forwards"])
@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}, {"padding_idx": 7}], ids=str)
def test_two_backward_passes(how, options, seed):
    def loop(model, optimizer, loader):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            out = model.emb(batch["ids"])
            first, second = weigh(out), (out**3).sum()
            if how == "two forwards":
                second = (model.emb(batch["ids"].flip(1)) ** 3).sum()
            if how == "retain":
                first.backward(retain_graph=True)
                first.backward()
            else:
                first.backward(retain_graph=True)
                second.backward()
            optimizer.step()
            losses.append(first)
        return losses

    for optimizer in OPTIMIZERS.values():
        assert_same_as_plain(lambda: Weight(**options), optimizer, batches(seed), loop)


@pytest.mark.parametrize("look_up", ["emb", "bag", "getitem"])
def test_gradient_penalty(look_up, seed):
    """The gradient of a gradient goes through the lookups (create_graph=True)."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(ROWS, DIM, padding_idx=7)
            self.linear = nn.Linear(DIM, 4)

        def rows(self, ids):
            if look_up == "emb":
                return self.emb(ids)
            return F.embedding_bag(ids, self.emb.weight, mode="sum") if look_up == "bag" else self.emb.weight[ids]

    def loss_of(model, batch):
        rows = model.rows(batch["ids"])
        loss = torch.tanh(model.linear(rows)).pow(2).sum()
        (slope,) = torch.autograd.grad(loss, rows, create_graph=True)
        return loss + slope.pow(2).sum()

    assert_same_as_plain(Model, OPTIMIZERS["adagrad"], batches(seed), train(loss_of))


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_backward_with_a_graph_of_its_own_twice(seed):
    """backward(create_graph=True) leaves gradients that are part of a graph; the step takes their values."""

    def loop(model, optimizer, loader):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            out = model.emb(batch["ids"])
            loss = (out**3).sum()
            loss.backward(create_graph=True)
            loss.backward(create_graph=True)
            optimizer.step()
            losses.append(loss)
        optimizer.zero_grad()
        return losses

    assert_same_as_plain(Weight, OPTIMIZERS["sgd"], batches(seed), loop)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_lookups(reentrant, seed):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(ROWS, DIM)
            self.linear = nn.Linear(DIM, 2)

        def block(self, ids, _):
            return torch.tanh(self.linear(self.emb(ids)))

        def forward(self, batch):
            needs_grad = torch.ones(1, requires_grad=True)
            return torch.utils.checkpoint.checkpoint(self.block, batch["ids"], needs_grad, use_reentrant=reentrant)

    assert_same_as_plain(Model, OPTIMIZERS["adagrad"], batches(seed), train(lambda m, b: weigh(m(b))))


def test_the_loop_may_write_to_rows_it_looked_up_and_to_ids(seed):
    """What a lookup returns is the loop's own; neither rows nor later lookups change with it."""

    def loop(model, optimizer, loader):
        seen = []
        for batch in loader:
            with torch.no_grad():
                model.emb(batch["ids"]).zero_()
                model.table[batch["ids"]].fill_(3.0)
                model.table.index_select(0, batch["flat"]).add_(1)
            ids = batch["ids"].clone()
            out = model.emb(ids)
            optimizer.zero_grad()
            weigh(out * 2).backward()
            optimizer.step()
            ids.zero_()
            batch["ids"].fill_(1)
            seen.append(out)
        return seen

    assert_same_as_plain(Weight, OPTIMIZERS["sgd"], batches(seed), loop)


def test_gradients_are_those_of_finite_differences(seed):
    model = Weight(padding_idx=7).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = batches(seed, 1)[0]["ids"]
    loader = AdaLoader.wrap([ids], model=model, optimizer=optimizer, min_rows=1)
    factor = torch.rand(5, 4, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: (model.emb(ids) * f).sum(), (factor,))
    rows = model.emb(ids).detach().requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda r: torch.tanh(r * model.emb(ids).detach()).sum(), (rows,))
    loader.close()


def test_memory_of_slabs_is_used_again_only_when_nothing_refers_to_it():
    buffers = Buffers()
    first = buffers.take(5, DIM, "float32")
    as_tensor = torch.from_numpy(first)
    assert not np.shares_memory(buffers.take(5, DIM, "float32"), first)
    address = first.ctypes.data
    del first
    assert buffers.take(5, DIM, "float32").ctypes.data != address  # the tensor still needs it
    del as_tensor
    assert buffers.take(5, DIM, "float32").ctypes.data == address
    assert buffers.take(5, DIM, "float64").ctypes.data != address
    assert buffers.take(10**6, DIM, "float32").shape == (10**6, DIM)
