"""What is no lookup of a table, and what may not be written to looked-up rows: errors that name the table."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader, ManagedTableError
from tests.adaloader.one_table import DIM, ROWS, Weight


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


def _add_to(rows):
    rows += 1


ROW_WRITES = {
    "zero_": lambda w, i: w[i].zero_(),
    "data": lambda w, i: w.data[i].fill_(1.0),
    "detached": lambda w, i: w.detach()[i].mul_(2),
    "copy_": lambda w, i: w[i].copy_(torch.ones(DIM)),
    "setitem": lambda w, i: w[i].__setitem__(0, 1.0),
    "out": lambda w, i: torch.add(w[i], 1.0, out=w[i]),
    "init": lambda w, i: nn.init.constant_(w.data[i], 3.0),
    "augmented": lambda w, i: _add_to(w[i]),
}


@pytest.mark.parametrize("index", [3, slice(2, 5), -1], ids=str)
@pytest.mark.parametrize("write", ROW_WRITES.values(), ids=ROW_WRITES.keys())
def test_what_is_written_to_a_view_of_rows_is_written_to_the_table(refusing, write, index):
    weight = refusing.table
    with torch.no_grad():
        plain = weight.clone()
        write(weight, index)
        write(plain, index)
        assert torch.equal(weight.clone(), plain)


@pytest.mark.parametrize("index", [3, slice(2, 5)], ids=str)
def test_what_may_not_be_written_is_refused(refusing, index):
    """While gradients are recorded, as in plain PyTorch; and a view of the copy, whose write would be lost."""
    weight = refusing.table
    for write in (lambda: weight[index].zero_(), lambda: weight.data[index][..., :2].zero_()):
        with pytest.raises(ManagedTableError, match=r"emb\.weight"):
            write()
    assert type(weight[index] * 2) is torch.Tensor and type(weight[index].clone()) is torch.Tensor
