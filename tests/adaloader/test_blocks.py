"""Lookups that are made together: whatever the model does with them, the result is plain PyTorch's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaloader import AdaLoader
from adaloader.lookups import blocks
from adaloader.planning import planner
from tests.adaloader.against_plain import assert_same_as_plain, train, weigh

TABLES, SAMPLES, BATCHES = 7, 5, 9
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.8),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.2, lr_decay=0.03),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.03),
    "two groups": lambda parameters: torch.optim.Adagrad(
        [{"params": half, "lr": lr} for half, lr in zip(_halves(list(parameters)), (0.2, 0.05), strict=True)]
    ),
}


def _halves(parameters):
    return parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]


class Fields(nn.Module):
    """Tables of two dims, the even ones with a padding row, of which two share one; a linear layer."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleList(
            nn.Embedding(6 + 4 * t, 3 if t % 3 else 2, padding_idx=1 if t % 2 == 0 else None) for t in range(TABLES)
        )
        self.again = nn.Embedding(6, 2)
        self.again.weight = self.embeddings[0].weight
        width = sum(e.embedding_dim for e in self.embeddings) + 2
        self.out = nn.Linear(width, 1)

    def rows(self, ids):
        return [e(ids[:, t]) for t, e in enumerate(self.embeddings)] + [self.again(ids[:, TABLES])]

    def forward(self, ids):
        return self.out(torch.tanh(torch.cat(self.rows(ids), dim=1)))


@pytest.fixture
def batches(seed):
    rng = np.random.default_rng(seed)
    columns = [*(6 + 4 * t for t in range(TABLES)), 6]
    sizes = rng.integers(0, 2 * SAMPLES, BATCHES)
    sizes[:3] += 1
    return [torch.from_numpy(np.stack([rng.integers(0, rows, n) for rows in columns], 1)) for n in sizes]


@pytest.fixture
def taken(monkeypatch):
    """Counts the lookups that were made with others."""
    count = [0]
    take = blocks.Block.take

    def counting(*arguments):
        made = take(*arguments)
        count[0] += made is not None
        return made

    monkeypatch.setattr(blocks.Block, "take", counting)
    return count


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_tables_train_as_plain(optimizer, dtype, batches, taken):
    managed = assert_same_as_plain(
        Fields, OPTIMIZERS[optimizer], batches, train(lambda model, ids: weigh(model(ids))), dtype=dtype, lookahead=2
    )
    assert taken[0] >= (TABLES + 1) * 3, "lookups were not made together"
    assert managed.stats["intent_coverage"] == pytest.approx(1.0, abs=0.35)  # but for the watched step


def _twice(model, ids):
    return weigh(model(ids)) + weigh(model(ids) * 2)


def _in_place(model, ids):
    rows = model.rows(ids)
    rows[0].relu_()
    rows[1].mul_(2.0)
    if len(ids):
        rows[2][0] = 0.5
    rows[3].view(-1)[:1].add_(1.0)
    return weigh(model.out(torch.cat(rows, dim=1)))


def _some_of_them(model, ids):
    """Lookups that no loss needs, and tables that are not looked up in half of the batches."""
    rows = model.rows(ids)
    if len(ids) % 2:
        return weigh(rows[1]) + weigh(rows[4])
    return weigh(model.embeddings[2](ids[:, 2])) + weigh(rows[1])


def _no_grad_between(model, ids):
    with torch.no_grad():
        before = model(ids).sum()
    return weigh(model(ids)) + before


def _expanded_gradient(model, ids):
    """Gradients that are not laid out as rows: of a sum, and of a transposed use."""
    rows = model.rows(ids)
    return rows[0].sum() + weigh(rows[1].t().contiguous()) + weigh(rows[2].t()) + rows[3].mean(1).sum()


def _sequences(model, ids):
    """Ids with two dimensions, in a shape that differs from batch to batch."""
    looked_up = [e(ids[:, t].unsqueeze(len(ids) % 2)) for t, e in enumerate(model.embeddings)]
    return sum(weigh(rows) for rows in looked_up)


def _beside_others(model, ids):
    """Matrices of ids, whose gradients are parts of wider tensors."""
    rows = model.rows(ids)
    first, second = model.embeddings[5](ids[:, :4]), model.embeddings[6](ids[:, 2:5])
    flat = torch.cat([first.flatten(1), rows[1], second.flatten(1)], dim=1)
    deep = torch.cat([rows[3].unsqueeze(1), second], dim=1)
    return weigh(torch.tanh(flat)) + weigh(deep * 2.0)


def _checkpointed(model, ids):
    return weigh(checkpoint(model, ids, use_reentrant=False))


def _checkpointed_reentrant(model, ids):
    """The lookups in the checkpoint are made without gradient, and again in backward; those after it are not."""
    rows = checkpoint(_rows_of, model, ids, model.out.bias.sum(), use_reentrant=True)
    return weigh(rows) + weigh(model(ids))


def _rows_of(model, ids, factor):
    return torch.cat(model.rows(ids), dim=1) * factor


def _frozen_at_times(model, ids):
    model.embeddings[1].weight.requires_grad_(bool(len(ids) % 2))
    return weigh(model(ids))


def _limited_norm(model, ids):
    """A table that is looked up as always, then with a limit that changes its rows, then as always."""
    first = model.embeddings[5]
    rows = weigh(first(ids[:, 5]))
    limited = F.embedding(ids[:, 5], first.weight, max_norm=0.3)
    return rows + weigh(limited) + weigh(model.embeddings[6](ids[:, 6])) + weigh(first(ids[:, 5] // 2))


def _other_padding(model, ids):
    return weigh(F.embedding(ids[:, 3], model.embeddings[3].weight, padding_idx=-1 - len(ids) % 2)) + weigh(model(ids))


LOSSES = [
    _twice,
    _in_place,
    _some_of_them,
    _no_grad_between,
    _expanded_gradient,
    _sequences,
    _beside_others,
    _checkpointed,
    _checkpointed_reentrant,
    _frozen_at_times,
    _limited_norm,
    _other_padding,
]


@pytest.mark.parametrize("loss_of", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_ways_of_a_model_are_plain(loss_of, optimizer, batches, taken):
    assert_same_as_plain(Fields, OPTIMIZERS[optimizer], batches, train(loss_of), lookahead=1)
    assert taken[0] > 0


def _two_backwards(model, optimizer, loader):
    """One graph, of which each backward needs other tables; then the gradient for one table alone."""
    values = []
    for ids in loader:
        optimizer.zero_grad()
        rows = model.rows(ids)
        one, other = weigh(rows[0]) + weigh(rows[1]), weigh(rows[1]) + weigh(rows[4])
        one.backward(retain_graph=True)
        other.backward()
        optimizer.step()
        values += [one, other]
    return values


def _only_some_inputs(model, optimizer, loader):
    values = []
    for ids in loader:
        optimizer.zero_grad()
        loss = weigh(model(ids))
        loss.backward(inputs=[model.embeddings[1].weight, model.out.weight])
        values.append(torch.tensor([e.weight.grad is None for e in model.embeddings], dtype=torch.float64))
        optimizer.step()
        values.append(loss)
    return values


def _functional(model, optimizer, loader):
    values = []
    for ids in loader:
        optimizer.zero_grad()
        loss = weigh(model(ids))
        found = torch.autograd.grad(loss, [model.embeddings[2].weight, model.embeddings[0].weight], retain_graph=True)
        values += [each.to_dense() for each in found]
        values.append(torch.tensor(float(all(e.weight.grad is None for e in model.embeddings))))
        loss.backward()
        optimizer.step()
    return values


def _penalty_on_gradients(model, optimizer, loader):
    values = []
    for ids in loader:
        optimizer.zero_grad()
        rows = model.rows(ids)
        loss = weigh(model.out(torch.tanh(torch.cat(rows, dim=1))))
        gradients = torch.autograd.grad(loss, rows, create_graph=True)
        loss = loss + 0.1 * sum((gradient * gradient).sum() for gradient in gradients)
        loss.backward()
        optimizer.step()
        values.append(loss)
    return values


def _second_order_of_tables(model, optimizer, loader):
    values = []
    for ids in loader:
        optimizer.zero_grad()
        loss = weigh(model(ids))
        (gradient,) = torch.autograd.grad(loss, [model.embeddings[4].weight], create_graph=True)
        loss = loss + 0.1 * (gradient * gradient).sum()
        loss.backward()
        optimizer.step()
        values.append(loss)
    return values


def _clipped(model, optimizer, loader):
    values = []
    for ids in loader:
        optimizer.zero_grad()
        weigh(model(ids)).backward()
        values.append(nn.utils.clip_grad_norm_(model.parameters(), 0.7))
        model.embeddings[3].weight.grad.mul_(0.5)
        optimizer.step()
    return values


def _accumulated(model, optimizer, loader):
    values = []
    for at, ids in enumerate(loader):
        loss = weigh(model(ids))
        loss.backward()
        values.append(loss)
        if at % 2:
            optimizer.step()
            optimizer.zero_grad()
    return values


def _written_between(model, optimizer, loader):
    """Rows that the loop writes between two lookups of one forward pass."""
    values = []
    for ids in loader:
        optimizer.zero_grad()
        first = weigh(model.embeddings[0](ids[:, 0]))
        with torch.no_grad():
            model.embeddings[4].weight[2] = 0.25
        loss = first + weigh(model.embeddings[4](ids[:, 4])) + weigh(model(ids))
        loss.backward()
        optimizer.step()
        values.append(loss)
    return values


def _hooked(model, optimizer, loader):
    handle = model.embeddings[1].weight.register_hook(lambda gradient: gradient * 0.5)
    values = []
    for at, ids in enumerate(loader):
        optimizer.zero_grad()
        rows = model.rows(ids)
        rows[2].register_hook(lambda gradient: gradient * 2)
        rows[3].retain_grad()
        loss = weigh(model.out(torch.cat(rows, dim=1)))
        loss.backward()
        optimizer.step()
        values += [loss, rows[3].grad]
        if at == 5:
            handle.remove()
    return values


def _used_as_a_whole_late(model, optimizer, loader):
    """A table that becomes an ordinary parameter between a forward pass and its backward."""
    values = []
    for at, ids in enumerate(loader):
        optimizer.zero_grad()
        loss = weigh(model(ids))
        if at >= 5:
            loss = loss + 0.01 * model.embeddings[5].weight.norm()
        loss.backward()
        optimizer.step()
        values.append(loss)
    return values


def _meddled_with(model, optimizer, loader):
    """Gradients that are read, changed, kept, cleared and applied again, table by table, at random."""
    values = []
    weights = [model.embeddings[t].weight for t in range(TABLES)]
    for ids in loader:
        rng = np.random.default_rng(int(ids.sum()) + len(ids))
        for _ in range(int(rng.integers(1, 3))):
            loss = weigh(model(ids)) if rng.random() < 0.7 else weigh(model.rows(ids)[2]) + weigh(model.rows(ids)[5])
            loss.backward()
            values.append(loss)
            for weight, what in zip(weights, rng.integers(0, 12, TABLES), strict=True):
                _meddle(weight, what, values)
        for _ in range(int(rng.integers(1, 3))):
            optimizer.step()
        if rng.random() < 0.8:
            optimizer.zero_grad(set_to_none=bool(rng.random() < 0.7))
    return values


def _meddle(weight, what, values):
    if weight.grad is None:
        values.append(0.5)
    elif what == 0:
        weight.grad = None
    elif what == 1:
        weight.grad.mul_(0.5)
    elif what == 2:
        weight.grad = weight.grad * 2
    elif what == 3:
        values.append(weight.grad.norm())
    elif what == 4:
        weight.grad.zero_()
    elif what == 5:
        values.append(weight.grad.to_dense().clone())
    elif what == 6:
        weight.grad.add_(weight.grad.clone(), alpha=0.5)


def _frozen_before_backward(model, optimizer, loader):
    """Tables that are frozen, and thawed, between a forward pass and a backward for some parameters alone."""
    values = []
    for ids in loader:
        optimizer.zero_grad()
        loss = weigh(model(ids))
        model.embeddings[3].weight.requires_grad_(False)
        loss.backward(inputs=[model.embeddings[4].weight, model.out.weight])
        model.embeddings[3].weight.requires_grad_(True)
        optimizer.step()
        values += [loss, model.embeddings[3].weight.grad is None]
    return values


def _hooks_come_and_go(model, optimizer, loader):
    """A hook that is there for one of two backward passes whose gradients add up."""
    values = []
    for ids in loader:
        optimizer.zero_grad()
        weigh(model(ids)).backward()
        handle = model.embeddings[6].weight.register_hook(lambda gradient: gradient * 0.25)
        loss = weigh(model(ids))
        loss.backward()
        handle.remove()
        optimizer.step()
        values.append(loss)
    return values


LOOPS = [
    _two_backwards,
    _only_some_inputs,
    _functional,
    _penalty_on_gradients,
    _second_order_of_tables,
    _clipped,
    _accumulated,
    _written_between,
    _hooked,
    _used_as_a_whole_late,
    _meddled_with,
    _frozen_before_backward,
    _hooks_come_and_go,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_loops_are_plain(loop, optimizer, batches, taken):
    batches = [ids if len(ids) else batches[0] for ids in batches]  # the norm of nothing is no number to compare
    assert_same_as_plain(Fields, OPTIMIZERS[optimizer], batches, loop, lookahead=1)
    assert taken[0] > 0


def test_an_id_out_of_range_is_named_where_it_is_looked_up(batches):
    model = Fields()
    optimizer = torch.optim.Adagrad(model.parameters())
    bad = batches[0].clone()
    bad[0, 3] = 6 + 4 * 3
    loader = AdaLoader.wrap([*[batches[0]] * 5, bad], model=model, optimizer=optimizer, min_rows=1, lookahead=1)
    with pytest.raises(IndexError, match="id 18 is out of range for table 'embeddings.3.weight' with 18 rows"):
        train(lambda model, ids: weigh(model(ids)))(model, optimizer, loader)
    loader.close()


def test_a_batch_that_is_changed_after_it_was_read_is_looked_up_as_it_is(batches, taken):
    def change(model, ids):
        with torch.no_grad():
            ids[:, 2] = 3
        return weigh(model(ids))

    assert_same_as_plain(Fields, OPTIMIZERS["adagrad"], batches, train(change), lookahead=1)


def test_rows_of_one_block_are_updated_in_one_call(monkeypatch, seed):
    """And in as many as there are groups, where these differ."""
    import cuda_ops

    calls = []
    update = cuda_ops.adagrad_update
    monkeypatch.setattr(cuda_ops, "adagrad_update", lambda *a, **k: (calls.append(len(a[4])), update(*a, **k))[1])
    ids = torch.randint(0, 6, (8, TABLES), generator=torch.Generator().manual_seed(seed))
    for groups, expected in ((1, 1), (2, 2)):
        tables = nn.ModuleList(nn.Embedding(6, 4) for _ in range(TABLES))
        parts = _halves(list(tables.parameters())) if groups == 2 else [list(tables.parameters())]
        optimizer = torch.optim.Adagrad([{"params": part} for part in parts], lr=0.1)
        loader = AdaLoader.wrap([ids] * 6, model=tables, optimizer=optimizer, min_rows=1, lookahead=1)
        for batch in loader:
            calls.clear()
            optimizer.zero_grad()
            sum(weigh(table(batch[:, t])) for t, table in enumerate(tables)).backward()
            optimizer.step()
        assert len(calls) == expected
        loader.close()


class Thrice(nn.Module):
    """A table that is looked up once, and one that is looked up three times."""

    def __init__(self):
        super().__init__()
        self.once = nn.Embedding(4, 3)
        self.often = nn.Embedding(4, 3, padding_idx=2)
        self.out = nn.Linear(12, 1)

    def forward(self, ids):
        rows = [self.once(ids[:, 0]), *(self.often(column) for column in ids[:, 1:].unbind(1))]
        return self.out(torch.tanh(torch.cat(rows, 1))).squeeze(1)


def test_whether_lookups_are_made_together_does_not_change_a_bit(seed, taken, monkeypatch):
    """When a batch is planned decides on that, which is a matter of the machine's load."""
    ids = torch.randint(0, 4, (160, 4), generator=torch.Generator().manual_seed(seed))

    def trained() -> list[torch.Tensor]:
        torch.manual_seed(seed)
        model = Thrice()
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.3)
        loader = AdaLoader(ids, batch_size=16, model=model, optimizer=optimizer, min_rows=1)
        for _ in range(2):
            for batch in loader:
                optimizer.zero_grad()
                (model(batch) * torch.linspace(-1, 2, len(batch))).square().sum().backward()
                optimizer.step()
        values = [value.clone() for value in model.state_dict().values()]
        loader.close()
        return values

    together = trained()
    assert taken[0]
    taken[0] = 0
    monkeypatch.setattr(planner, "blocks_of", lambda by_table: [])
    alone = trained()
    assert not taken[0]
    assert all(map(torch.equal, together, alone))
