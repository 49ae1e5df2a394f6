"""Every way to look rows of a table up, against plain PyTorch on one process."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader, ManagedTableError
from adaloader.slabs import Buffers
from tests.adaloader.against_plain import OPTIMIZERS, assert_same_as_plain, train, weigh

ROWS, DIM = 40, 3


class Weight(nn.Module):
    """One table, looked up by a function of (module, batch)."""

    def __init__(self, **options):
        super().__init__()
        self.emb = nn.Embedding(ROWS, DIM, **options)

    @property
    def table(self):
        return self.emb.weight


class Bag(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, DIM, **options)


def batches(seed: int, count: int = 4) -> list[dict]:
    """Ids with many duplicates, the row 7 (used as padding) among them; bags that start and end with empty ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(0, 12, shape, generator=generator) * 3 % ROWS

    made = []
    for _ in range(count):
        ids = draw(5, 4)
        ids[0, 0] = ids[2, 1] = 7
        lengths = torch.randint(0, 5, (6,), generator=generator)
        lengths[0] = 0
        flat = draw(int(lengths.sum()))
        made.append(
            {
                "ids": ids,
                "flat": flat,
                "offsets": torch.cumsum(lengths, 0) - lengths,
                "ends": torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(lengths, 0)]),
                "weights": torch.rand(5, 4, generator=generator, dtype=torch.float64),
                "flat_weights": torch.rand(len(flat), generator=generator, dtype=torch.float64),
            }
        )
    return made


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


# --- what is refused ---


@pytest.fixture(scope="module")
def refusing():
    model = Weight()
    loader = AdaLoader.wrap(
        [torch.zeros(2, dtype=torch.int64)],
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        min_rows=1,
        strategy={"emb": "managed"},
    )
    yield model
    loader.close()


REFUSED = {
    "mask": lambda w: w[torch.zeros(ROWS, dtype=torch.bool)],
    "mask as bytes": lambda w: w[torch.zeros(ROWS, dtype=torch.uint8)],
    "mask as list": lambda w: w[[True, False] * (ROWS // 2)],
    "numpy mask": lambda w: w[np.zeros(ROWS, bool)],
    "True": lambda w: w[True],
    "whole": lambda w: w[:] + 1,
    "ellipsis": lambda w: w[...].sum(),
    "nothing": lambda w: w[()],
    "None": lambda w: w[None] * 2,
    "columns": lambda w: w[:, 0].max(),
    "most rows": lambda w: torch.cat([w[1:]]),
    "columns by index_select": lambda w: w.index_select(1, torch.tensor([0])),
    "table as ids": lambda w: F.embedding(w, w),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED.keys())
def test_whole_tables_are_refused_by_name(refusing, use):
    with pytest.raises(ManagedTableError, match=r"emb\.weight|managed table"):
        use(refusing.table)


OUT_OF_RANGE = {
    "embedding": (lambda w: F.embedding(torch.tensor([1, ROWS]), w), f"id {ROWS} "),
    "negative": (lambda w: F.embedding(torch.tensor([1, -1]), w), "id -1 "),
    "bag": (lambda w: F.embedding_bag(torch.tensor([[1, ROWS + 5]]), w), f"id {ROWS + 5} "),
    "index_select": (lambda w: w.index_select(0, torch.tensor([-2])), "id -2 "),
    "[int]": (lambda w: w[ROWS], f"id {ROWS} "),
    "[negative int]": (lambda w: w[-ROWS - 1], f"{-ROWS - 1} "),
    "[ids]": (lambda w: w[torch.tensor([0, ROWS])], f"id {ROWS} "),
}


@pytest.mark.parametrize(("use", "named"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE.keys())
def test_ids_out_of_range_are_named(refusing, use, named):
    with pytest.raises(IndexError, match=named) as raised:
        use(refusing.table)
    assert "emb.weight" in str(raised.value) and str(ROWS) in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.complex64])
def test_ids_that_are_no_integers_are_refused(refusing, dtype):
    ids = torch.zeros(3, dtype=dtype)
    for use in (lambda: F.embedding(ids, refusing.table), lambda: refusing.table[ids]):
        with pytest.raises(TypeError, match=r"emb\.weight.*int64"):
            use()


def test_arguments_that_pytorch_refuses_are_refused(refusing):
    weight, ids = refusing.table, torch.tensor([[0, 1]])
    with pytest.raises(IndexError, match="one dimension"):
        weight.index_select(0, ids)
    with pytest.raises(ValueError, match="padding_idx 40"):
        F.embedding(ids, weight, padding_idx=ROWS)
    with pytest.raises(ValueError, match="mode"):
        F.embedding_bag(ids, weight, mode="median")
    with pytest.raises(ValueError, match="offsets"):
        F.embedding_bag(ids, weight, offsets=torch.tensor([0]))
    with pytest.raises(ValueError, match="offsets"):
        F.embedding_bag(ids[0], weight)
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        F.embedding_bag(ids, weight, per_sample_weights=torch.ones(1, 2))
    with pytest.raises(ValueError, match="step"):
        weight[5:1:-1]
    with pytest.raises(TypeError, match="list"):
        F.embedding([1, 2], weight)


@pytest.mark.parametrize("index", [3, slice(2, 5)], ids=str)
def test_writing_through_a_view_of_rows_is_refused(refusing, index):
    """In plain PyTorch these are views of the table: a write that went to a copy would be lost in silence."""
    weight = refusing.table
    with torch.no_grad():
        before = weight[index].clone()
        for write in (
            lambda: weight[index].zero_(),
            lambda: weight.data[index].fill_(1.0),
            lambda: weight.detach()[index].mul_(2),
            lambda: weight[index].copy_(torch.ones(DIM)),
            lambda: weight[index].__setitem__(0, 1.0),
            lambda: nn.init.normal_(weight.data[index]),
            lambda: torch.add(weight[index], 1.0, out=weight[index]),
        ):
            with pytest.raises(ManagedTableError, match=r"emb\.weight"):
                write()
        row = weight[index]
        with pytest.raises(ManagedTableError, match="row"):
            row += 1
        assert torch.equal(weight[index], before)
    assert type(weight[index] * 2) is torch.Tensor and type(weight[index].clone()) is torch.Tensor
