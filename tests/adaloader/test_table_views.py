"""Views of a table: what is looked up through them, and the gradient that comes back, are plain PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader, ManagedTableError
from adaloader.tables.table_parameter import TableParameter
from adaloader.views.view_layout import layout_of
from tests.adaloader.against_plain import assert_same_as_plain, train, weigh

ROWS, DIM = 240, 6


class Model(nn.Module):
    def __init__(self, rows=ROWS, dim=DIM):
        super().__init__()
        self.emb = nn.Embedding(rows, dim)


def heads(w):
    return w.view(ROWS, 2, 3)


USES = {
    "all but the last row": lambda w, ids: F.embedding(ids % (ROWS - 1), w[:-1]),
    "from a row on": lambda w, ids: w[5:][ids % (ROWS - 5)],
    "every third row": lambda w, ids: w[1::3][ids % 80],
    "a slice of a slice": lambda w, ids: w[4:-4][::2][ids % 116],
    "embedding with padding": lambda w, ids: F.embedding(ids % (ROWS - 2), w[2:], padding_idx=int(ids[0]) % 9),
    "negative ids": lambda w, ids: w[3:][-1 - ids % (ROWS - 3)],
    "detached": lambda w, ids: w.detach()[ids] * w[ids],
    "data": lambda w, ids: w.data[ids] + w[ids],
    "a view of data": lambda w, ids: w.data[:-1][ids % (ROWS - 1)] * w[ids],
    "complex": lambda w, ids: torch.view_as_real(torch.view_as_complex(w.view(ROWS, DIM // 2, 2))[ids] ** 2),
    "part of complex": lambda w, ids: torch.view_as_complex(w.view(ROWS, DIM // 2, 2))[ids, 1:].abs(),
    "heads": lambda w, ids: heads(w)[ids],
    "one head": lambda w, ids: heads(w)[:, 1][ids],
    "one head of each": lambda w, ids: heads(w)[ids, 1],
    "a head by number": lambda w, ids: heads(w)[ids, ids % 2],
    "columns by number": lambda w, ids: heads(w)[ids, :, ids % 3],
    "first columns": lambda w, ids: w[:, :4][ids],
    "embedding of first columns": lambda w, ids: F.embedding(ids, w[:, 1:4], padding_idx=int(ids[0])),
    "halves": lambda w, ids: w.chunk(2, dim=-1)[0][ids] * w.chunk(2, dim=-1)[1][ids],
    "split": lambda w, ids: torch.split(w, [1, 5], dim=1)[1][ids],
    "split rows": lambda w, ids: torch.cat([part[ids % 80] for part in w.split(80)]),
    "columns unbound": lambda w, ids: sum(column[ids] for column in w.unbind(1)),
    "a column": lambda w, ids: w[:, 2][ids],
    "unsqueezed": lambda w, ids: w.unsqueeze(0)[0, ids],
    "unsqueezed and expanded": lambda w, ids: w.unsqueeze(0).expand(2, ROWS, DIM)[1, ids],
    "gathered over a batch": lambda w, ids: w.expand(3, -1, -1).gather(1, ids[:6].view(3, 2, 1).expand(-1, -1, DIM)),
    "take_along_dim": lambda w, ids: torch.take_along_dim(w, ids[:, None], 0),
    "take_along_dim expanded": lambda w, ids: torch.take_along_dim(w, ids[:, None].expand(-1, DIM), 0),
    "take_along_dim by column": lambda w, ids: torch.take_along_dim(
        w, torch.stack([ids + c for c in range(6)], 1) % ROWS, 0
    ),
    "gather": lambda w, ids: torch.gather(w, 0, ids[:, None].expand(-1, DIM)),
    "gather some columns": lambda w, ids: w.gather(0, ids.view(-1, 2)),
    "index_select": lambda w, ids: torch.index_select(w[:-3], 0, ids % (ROWS - 3)),
    "index_select of the transpose": lambda w, ids: w.t().index_select(1, ids),
    "transposed": lambda w, ids: w.T[:, ids],
    "permuted heads": lambda w, ids: heads(w).permute(1, 0, 2)[:, ids],
    "rows and columns": lambda w, ids: w[ids, ids % DIM],
    "rows and columns of a view": lambda w, ids: w[1:, 1:][ids % (ROWS - 1), ids % (DIM - 1)],
    "flat": lambda w, ids: w.view(-1)[ids * DIM + ids % DIM],
    "take": lambda w, ids: w.take(ids * 5),
    "fields": lambda w, ids: w.view(3, ROWS // 3, DIM)[torch.arange(3), ids.view(-1, 1) % 80],
    "one field": lambda w, ids: w.view(3, ROWS // 3, DIM)[1][ids % 80],
    "mask of a view": lambda w, ids: w[2:][torch.bincount(ids % (ROWS - 2), minlength=ROWS - 2) > 0],
    "narrow": lambda w, ids: w.narrow(0, 100, 120)[ids % 120],
    "select": lambda w, ids: w.select(0, 7) * w.select(1, 2)[ids][:, None],
    "bag": lambda w, ids: F.embedding_bag(ids.view(-1, 2) % (ROWS - 1), w[:-1], mode="mean"),
    "bag of columns": lambda w, ids: F.embedding_bag(ids, w[:, :3], torch.tensor([0, 3, 3]), mode="sum"),
    "padded bag of columns": lambda w, ids: F.embedding_bag(
        ids.view(2, -1), w[:, :3], mode="max", padding_idx=int(ids[0])
    ),
    "few rows as they are": lambda w, ids: w[10:70] * w[ids].sum(),
    "few rows of heads": lambda w, ids: heads(w)[100:].narrow(0, 0, 100).norm() * w[ids],
    "no ids": lambda w, ids: w[:-1][ids[:0]].sum() + w[ids],
    "lists": lambda w, ids: w[3:][[1, 2, -1]] * w[:, 1:][5:][0].sum(),
    "row by row": lambda w, ids: torch.stack([w[int(i)] for i in ids]),
    "row by row of a view": lambda w, ids: torch.stack([heads(w)[int(i), 1] for i in ids]),
}


def batches_of(seed, samples=12, count=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, ROWS, (samples,), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_view_gives_what_plain_pytorch_gives(use, seed):
    outcome = assert_same_as_plain(
        Model,
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.3),
        batches_of(seed),
        train(lambda model, ids: weigh(use(model.emb.weight, ids))),
    )
    assert outcome.stats["lookups"] > 0


@pytest.mark.parametrize("name", [name for name in USES if name not in ("mask of a view", "embedding with padding")])
def test_what_is_looked_up_through_a_view_is_foreseen(name, seed):
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader.wrap(batches_of(seed, count=6), model=model, optimizer=optimizer, min_rows=1)
    for number, ids in enumerate(loader):
        weigh(USES[name](model.emb.weight, ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            first = loader.stats()
    stats = loader.stats()
    loader.close()
    assert stats["lookups"] > first["lookups"]
    assert stats["on_demand"] == first["on_demand"]


@pytest.fixture
def weight():
    model = Model()
    loader = AdaLoader.wrap([torch.tensor([1])], model=model, min_rows=1)
    yield model.emb.weight
    loader.close()


@pytest.mark.parametrize(
    "use, named",
    [
        (lambda w: w[:-1][torch.tensor([3, ROWS - 1])], f"id {ROWS - 1} .*valid ids: -{ROWS - 1} to {ROWS - 2}"),
        (lambda w: F.embedding(torch.tensor([-1]), w[:-1]), "id -1 .*valid ids: 0"),
        (lambda w: w[:, :3][torch.tensor([0]), torch.tensor([3])], "id 3 .*dimension 1"),
    ],
)
def test_ids_beyond_a_view_are_refused(weight, use, named):
    with pytest.raises(IndexError, match=named):
        use(weight)


def test_float_ids_are_refused(weight):
    with pytest.raises(TypeError, match=r"float32.*int64"):
        weight[:-1][torch.tensor([1.0])]


WHOLE = {
    "sum": lambda w: w[:-1].sum(),
    "product": lambda w: torch.ones(2, ROWS - 1) @ w[1:],
    "in a list": lambda w: torch.cat([w[:-1], torch.zeros(1, DIM)]),
    "a copying view": lambda w: w.t().reshape(-1),
    "all rows of a column": lambda w: w[:, torch.tensor([0, 2])],
    "two views": lambda w: w[:-1].t() @ w[1:],
    "complex": lambda w: torch.view_as_complex(w.view(ROWS, DIM // 2, 2)).abs(),
}
WRITES = {
    "all but one row": lambda w: w.data[:-1].zero_(),
    "by index": lambda w: w.data[:-1].__setitem__(3, 0.0),
    "columns": lambda w: w.data[:, :2].clamp_(-0.1, 0.1),
    "out=": lambda w: torch.mul(torch.ones(ROWS - 1, DIM), 3.0, out=w.data[1:]),
    "transposed": lambda w: w.data.t().add_(w.data.t()),
}


@pytest.mark.parametrize("use", WHOLE.values(), ids=WHOLE.keys())
def test_a_table_whose_view_is_used_whole_becomes_dense(weight, use):
    plain = weight.detach().clone().requires_grad_()
    found, expected = use(weight), use(plain)
    assert type(weight) is torch.nn.Parameter
    torch.testing.assert_close(found.detach(), expected.detach())
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad)


@pytest.mark.parametrize("use", WHOLE.values(), ids=WHOLE.keys())
def test_views_are_read_whole_without_gradient(weight, use):
    plain = weight.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(use(weight), use(plain))
    torch.testing.assert_close(use(weight.detach()), use(plain))
    assert isinstance(weight, TableParameter)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_what_is_written_to_a_view_is_written_to_the_table(weight, write):
    plain = torch.nn.Parameter(weight.detach().clone())
    write(weight)
    write(plain)
    torch.testing.assert_close(weight.detach().clone(), plain.detach(), rtol=0, atol=0)
    assert isinstance(weight, TableParameter)


def test_a_view_is_not_written_while_gradients_are_recorded(weight):
    with pytest.raises(ManagedTableError, match=r"emb\.weight.*no_grad"):
        weight[:-1].zero_()


def test_questions_about_the_form_are_answered(weight):
    view = weight[:-1].view(ROWS - 1, 2, 3)
    plain = torch.empty(ROWS, DIM)[:-1].view(ROWS - 1, 2, 3)
    assert view.shape == plain.shape and view.dtype == plain.dtype and view.requires_grad
    assert view.stride() == plain.stride() and view.is_contiguous() and len(view) == ROWS - 1
    assert view.size(1) == 2 and view.numel() == plain.numel() and "emb.weight" in repr(view)
    assert not weight.detach()[:-1].requires_grad and weight[:-1].detach().requires_grad is False
    assert weight.view(-1).shape == (ROWS * DIM,)
    with pytest.raises(RuntimeError, match="shape"):
        weight.view(7, -1)


def test_the_layout_of_random_views(seed):
    """The rows that a chain of views reaches, by strides, are those of its elements."""
    generator = torch.Generator().manual_seed(seed)

    def some(high):
        return int(torch.randint(0, high, (), generator=generator))

    for _ in range(60):
        numbers = torch.arange(40 * 6)
        view = numbers.view(40, 6)
        for _ in range(some(4)):
            at = some(view.ndim)
            choices = [
                lambda v, at=at: v.narrow(at, some(v.shape[at]), 1) if v.shape[at] else v,
                lambda v, at=at: v[(slice(None),) * at + (slice(some(3), None, 1 + some(2)),)],
                lambda v, at=at: v.transpose(at, 0),
                lambda v, at=at: v.unsqueeze(at),
                lambda v, at=at: v.unflatten(at, (2, -1)) if v.shape[at] and v.shape[at] % 2 == 0 else v,
            ]
            view = choices[some(len(choices))](view)
        if view.numel() == 0:
            continue
        layout = layout_of(
            torch.empty(40 * 6, device="meta").as_strided(view.shape, view.stride(), view.storage_offset()), 6
        )
        assert not layout.crosses_rows
        assert layout.num_rows == (view // 6).unique().numel()
