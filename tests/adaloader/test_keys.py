"""Which rows are fetched ahead: derived, by the user's functions, or not at all; wrong or right, results are exact."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, Dataset

from adaloader import AdaLoader, full_state_dict
from adaloader.model.managed_model import managed_models
from tests.loop_cases import MIN_ROWS, ROWS, Clicks, Model

EXACT = {"rtol": 1e-10, "atol": 1e-11}


class Detour(Model):
    """Some ids of its bag are not made of the batch by PyTorch alone."""

    def forward(self, x, y, dense):
        self.last = y
        return super().forward(x, torch.from_numpy((y.numpy() * 7 + 1) % ROWS), dense)


def run(make_model, make_loader, *, epochs=2, seed=0):
    """Train; return losses, weights, and what the loader says of it (None for a plain loader)."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.2)
    loader = make_loader(model, optimizer)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = model.loss(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    if isinstance(loader, DataLoader) and not isinstance(loader, AdaLoader):
        return losses, model.state_dict(), None
    weights, stats = full_state_dict(model), loader.stats()
    loader.close()
    return losses, weights, stats


def compare(make_model, data, *, seed=0, batch_size=4, **keywords):
    """Run with and without AdaLoader; `keys` may be a function of the model. Return statistics."""
    keys = keywords.pop("keys", "auto")

    def managed(model, optimizer):
        given = keys(model) if callable(keys) else keys
        return AdaLoader(
            data, batch_size, shuffle=True, model=model, optimizer=optimizer, min_rows=MIN_ROWS, keys=given, **keywords
        )

    plain = run(make_model, lambda model, optimizer: DataLoader(data, batch_size, shuffle=True), seed=seed)
    ours = run(make_model, managed, seed=seed)
    np.testing.assert_allclose(ours[0], plain[0], **EXACT)
    for name, value in plain[1].items():
        torch.testing.assert_close(ours[1][name], value, **EXACT)
    return ours[2]


def unique_rows(batch, *names):
    return torch.cat([batch[name].flatten() for name in names]).unique().numel()


# --- derived ---


@pytest.mark.parametrize("lookahead", [0, 1, 50])
def test_everything_after_the_first_step_was_intended(lookahead, seed):
    """Also the smaller last batches, and the second pass."""
    data = Clicks(26, seed)
    stats = compare(Model, data, seed=seed, lookahead=lookahead)
    torch.manual_seed(seed)
    Model()
    first = next(iter(DataLoader(data, 4, shuffle=True)))
    assert stats["on_demand"] == unique_rows(first, "x") + unique_rows(first, "y")
    assert stats["intent_coverage"] == pytest.approx(1 - stats["on_demand"] / stats["lookups"])
    tables = stats["tables"]
    assert tables["rows.weight"]["intended"] + tables["bag.weight"]["intended"] + stats["on_demand"] == stats["lookups"]


def test_a_batch_that_was_handed_out_before_the_first_step_is_planned_after_it(seed):
    data = Clicks(40, seed)
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(data, 4, model=model, optimizer=optimizer, min_rows=MIN_ROWS)
    iterator = iter(loader)
    held = [next(iterator), next(iterator)]
    first = held[0]
    for batch in iterator:
        held.append(batch)
        optimizer.zero_grad()
        model.loss(held.pop(0)).backward()
        optimizer.step()
    assert loader.stats()["on_demand"] == unique_rows(first, "x") + unique_rows(first, "y")
    loader.close()


def test_a_first_batch_that_is_skipped_teaches_nothing_wrong(seed):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(Clicks(40, seed), 4, model=model, optimizer=optimizer, min_rows=MIN_ROWS)
    demanded = []
    for number, batch in enumerate(loader):
        if number < 2:
            continue
        model.loss(batch).backward()
        optimizer.step()
        demanded.append(loader.stats()["on_demand"])
    assert demanded[0] == demanded[-1] > 0
    loader.close()


def test_a_first_step_without_lookups_is_waited_for(seed):
    """Steps of dense parameters come first; then the tables are used."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(Clicks(60, seed), 4, model=model, optimizer=optimizer, min_rows=MIN_ROWS)
    demanded = []
    for number, batch in enumerate(loader):
        loss = model.side_loss(batch) if number < 7 else model.loss(batch)
        loss.backward()
        optimizer.step()
        demanded.append(loader.stats()["on_demand"])
    assert demanded[6] == 0 and demanded[-1] == demanded[9] > 0
    assert _get_current_dispatch_mode_stack() == []
    loader.close()


def test_a_table_that_is_used_later_is_learned_then(seed):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(Clicks(60, seed), 4, model=model, optimizer=optimizer, min_rows=MIN_ROWS)
    demanded = []
    for number, batch in enumerate(loader):
        loss = model.rows(batch["x"]).square().mean()
        if number >= 5:
            loss = loss + model.bag(batch["y"]).square().mean()
        loss.backward()
        optimizer.step()
        demanded.append(loader.stats()["tables"]["bag.weight"]["on_demand"])
    assert demanded[4] == 0 < demanded[5]
    assert demanded[-1] <= demanded[8]
    loader.close()


def test_a_second_loader_knows_the_programs_of_the_first(seed):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared = {"model": model, "min_rows": MIN_ROWS}
    loader = AdaLoader(Clicks(20, seed), 4, optimizer=optimizer, **shared)
    for batch in loader:
        model.loss(batch).backward()
        optimizer.step()
    programs = list(managed_models[model].watch.programs)
    assert len(programs) == 1
    before = loader.stats()["on_demand"]
    other = AdaLoader(Clicks(17, seed + 1), 7, **shared)
    wrapped = AdaLoader.wrap(list(DataLoader(Clicks(9, seed + 2), 3)), **shared)
    with torch.no_grad():
        for batch in [*other, *wrapped]:
            model.loss(batch)
        for each in (other, wrapped):
            for batch in each:
                model.loss(batch)
                assert _get_current_dispatch_mode_stack() == []
    stats = loader.stats()
    assert managed_models[model].watch.programs == programs
    # `[*other, ...]` keeps more batches than may be open; those looked up one by one were all intended
    assert stats["tables"]["rows.weight"]["intended"] > 0
    assert stats["on_demand"] == before
    for each in (wrapped, other, loader):
        each.close()


def test_batches_of_another_structure_are_watched_anew(seed):
    class AsTuples(Dataset):
        def __init__(self, clicks):
            self.clicks = clicks

        def __len__(self):
            return len(self.clicks)

        def __getitem__(self, at):
            return tuple(self.clicks[at].values())

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(Clicks(20, seed), 4, model=model, optimizer=optimizer, min_rows=MIN_ROWS)
    for batch in loader:
        model.loss(batch).backward()
        optimizer.step()
    before = loader.stats()["on_demand"]
    other = AdaLoader(AsTuples(Clicks(16, seed)), 4, model=model, min_rows=MIN_ROWS)
    first = None
    with torch.no_grad():
        for x, y, dense, _ in other:
            first = first or (x, y)
            model(x, y, dense)
    assert loader.stats()["on_demand"] == before + first[0].unique().numel() + first[1].unique().numel()
    other.close()
    loader.close()


# --- keys= ---


def by_table_name(model):
    return {"rows.weight": lambda batch: batch["x"], "bag.weight": lambda batch: batch["y"].numpy()}


def by_parameter(model):
    return {model.rows.weight: lambda batch: batch["x"].int(), model.bag.weight: lambda batch: batch["y"]}


def by_module(model):
    return {model.rows: lambda batch: batch["x"].flatten().tolist(), model.bag: lambda batch: batch["y"]}


def by_module_name(model):
    return {"rows": lambda batch: batch["x"], "bag": lambda batch: batch["y"]}


@pytest.mark.parametrize("keys", [by_table_name, by_parameter, by_module, by_module_name])
def test_functions_for_all_tables_need_no_recording(keys, seed):
    stats = compare(Model, Clicks(26, seed), seed=seed, keys=keys)
    assert stats["on_demand"] == 0 and stats["intent_coverage"] == 1.0


def test_a_function_for_one_table_and_derivation_for_the_other(seed, caplog):
    """The one that cannot be derived gets a function; of it nothing is said."""
    data = Clicks(26, seed)
    keys = {"bag.weight": lambda batch: (batch["y"] * 7 + 1) % ROWS}
    stats = compare(Detour, data, seed=seed, keys=lambda model: keys)
    assert stats["tables"]["bag.weight"]["on_demand"] == 0
    assert 0 < stats["tables"]["rows.weight"]["on_demand"] < 20
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_no_keys_means_all_on_demand(seed):
    stats = compare(Model, Clicks(26, seed), seed=seed, keys=None)
    assert stats["on_demand"] == stats["lookups"] > 0 and stats["intent_coverage"] == 0.0


WRONG = {
    "too few": lambda batch: batch["x"][:2],
    "too many": lambda batch: torch.arange(ROWS),
    "none": lambda batch: [],
    "of other batches": lambda batch: (batch["x"] + 1) % ROWS,
    "out of range": lambda batch: batch["x"] + ROWS - 3,
    "negative": lambda batch: -batch["x"] - 1,
    "repeated": lambda batch: torch.cat([batch["x"], batch["x"]]),
    "in another order": lambda batch: batch["x"].flip(0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_keys_cost_no_exactness(wrong, seed):
    stats = compare(Model, Clicks(26, seed), seed=seed, keys={"rows.weight": WRONG[wrong]})
    on_demand = stats["tables"]["rows.weight"]["on_demand"]
    assert on_demand == 0 if wrong in ("too many", "repeated", "in another order") else on_demand > 0


@pytest.mark.parametrize("returned", [torch.ones(3), np.ones(2), None, ["a"]])
def test_a_function_that_returns_no_ids_is_an_error_that_names_the_table(returned, seed):
    model = Model()
    loader = AdaLoader(Clicks(9, seed), 4, model=model, min_rows=MIN_ROWS, keys={"rows": lambda batch: returned})
    with pytest.raises(TypeError, match="rows.weight"):
        next(iter(loader))
    loader.close()


def test_keys_for_unknown_tables_are_refused(seed):
    model = Model()
    for keys in ({"no such": len}, {model.top: len}, {model.top.weight: len}):
        with pytest.raises(ValueError, match="which is no managed table"):
            AdaLoader(Clicks(9, seed), 4, model=model, min_rows=MIN_ROWS, keys=keys)
    with pytest.raises(TypeError, match="function of a batch"):
        AdaLoader(Clicks(9, seed), 4, model=model, min_rows=MIN_ROWS, keys={"rows": 3})
    loader = AdaLoader(Clicks(9, seed), 4, model=model, min_rows=MIN_ROWS)
    loader.close()


# --- what is not derived is said, once ---


def test_underived_keys_are_said_once_with_table_and_reason(seed, caplog):
    data = Clicks(26, seed)
    with caplog.at_level(logging.WARNING, "adaloader"):
        stats = compare(Detour, data, seed=seed)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "'bag.weight'" in said[0] and "numpy" in said[0] and "keys={'bag.weight':" in said[0]
    assert "test_keys.py" in said[0] or "loop_cases.py" in said[0]
    assert stats["tables"]["bag.weight"]["intended"] < stats["tables"]["bag.weight"]["on_demand"]
    assert stats["tables"]["rows.weight"]["on_demand"] < 20


def test_the_number_of_recordings_is_bounded(seed, monkeypatch):
    """A model whose ids can never be foreseen is not watched for ever."""
    from adaloader.planning import watch

    made = []
    monkeypatch.setattr(watch, "Recorder", lambda original=watch.Recorder: made.append(original()) or made[-1])

    class Dice(Model):
        def forward(self, x, y, dense):
            drawn = torch.tensor(np.random.default_rng(int(y.sum())).integers(0, ROWS, (len(x), 4)))
            return super().forward(drawn if int(x.sum()) % 2 else x, y, dense)

    compare(Dice, Clicks(100, seed), seed=seed)
    assert 1 <= len(made) <= 8


# --- watching leaves no trace ---


class Counting(TorchDispatchMode):
    """A mode of the user's."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def start(seed, **keywords):
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(Clicks(30, seed), 4, model=model, optimizer=optimizer, min_rows=MIN_ROWS, **keywords)
    return loader, model, optimizer


def work(model, optimizer, batch):
    optimizer.zero_grad()
    model.loss(batch).backward()
    optimizer.step()


@pytest.mark.parametrize("where", ["before the lookups", "after the lookups", "after backward"])
@pytest.mark.parametrize("how", ["break", "exception", "close", "exception kept"])
def test_leaving_the_first_step(where, how, seed):
    loader, model, optimizer = start(seed)
    kept = []

    def leave():
        if how in ("exception", "exception kept"):
            raise KeyError("the user's own")
        if how == "close":
            loader.close()
        return how in ("break", "close")

    def loop():
        for batch in loader:
            if where == "before the lookups" and leave():
                return
            loss = model.loss(batch)
            if where == "after the lookups" and leave():
                return
            loss.backward()
            if leave():
                return

    try:
        loop()
    except KeyError as error:
        if how == "exception kept":
            kept.append(error)
    assert _get_current_dispatch_mode_stack() == []
    if how == "close":
        return
    for _ in range(2):
        for batch in loader:
            work(model, optimizer, batch)
    stats = loader.stats()
    assert stats["intent_coverage"] > 0.8
    loader.close()


def test_an_exception_in_the_first_forward_pass(seed):
    loader, model, optimizer = start(seed)
    with pytest.raises(IndexError):
        for batch in loader:
            model(batch["x"], batch["y"] + ROWS, batch["dense"])
    assert _get_current_dispatch_mode_stack() == []
    for batch in loader:
        work(model, optimizer, batch)
    assert loader.stats()["intent_coverage"] > 0.6
    loader.close()


def test_a_foreign_mode_around_the_first_step(seed):
    """Entered before or within the step, left within or after it: it sees its operations and stays where it was."""
    loader, model, optimizer = start(seed)
    mode = Counting()
    iterator = iter(loader)
    with mode:
        work(model, optimizer, next(iterator))
        assert _get_current_dispatch_mode_stack() == [mode]
    assert mode.calls > 0 and _get_current_dispatch_mode_stack() == []
    loader.close()

    loader, model, optimizer = start(seed)
    iterator = iter(loader)
    batch = next(iterator)
    with mode:
        loss = model.loss(batch)
        work(model, optimizer, batch)
        assert _get_current_dispatch_mode_stack()[-1] is mode
    assert loss.item() > 0 and _get_current_dispatch_mode_stack() == []
    for batch in iterator:
        work(model, optimizer, batch)
    loader.close()


def test_a_mode_that_takes_ours_away_only_costs_the_keys(seed):
    loader, model, optimizer = start(seed)
    iterator = iter(loader)
    batch = next(iterator)
    taken = torch.utils._python_dispatch._pop_mode()
    work(model, optimizer, batch)
    assert taken is not None and _get_current_dispatch_mode_stack() == []
    for batch in iterator:
        work(model, optimizer, batch)
    assert loader.stats()["intent_coverage"] < 1.0
    assert _get_current_dispatch_mode_stack() == []
    loader.close()


def test_random_state_and_batch_are_untouched_by_watching(seed):
    loader, model, _ = start(seed, lookahead=0)
    torch.manual_seed(seed)
    plain = iter(DataLoader(Clicks(30, seed), 4))
    theirs, states = next(plain), []
    states.append(torch.get_rng_state())
    model_noise = torch.rand(3)
    torch.manual_seed(seed)
    ours = next(iter(loader))
    assert torch.equal(torch.get_rng_state(), states[0])
    model.loss(ours)
    assert torch.equal(torch.rand(3), model_noise)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) and type(ours[name]) is torch.Tensor
    loader.close()


def test_compiling_works_after_the_first_step_and_during_it(seed):
    class Compiled(Model):
        def __init__(self):
            super().__init__()
            self.compiled = torch.compile(self.dense_part, backend=self.backend)
            self.graphs = 0

        def backend(self, graph, inputs):
            self.graphs += 1
            return graph.forward

        def dense_part(self, features):
            return self.top(features).squeeze(1)

        def forward(self, x, y, dense):
            return self.compiled(torch.cat([self.rows(x).flatten(1), self.bag(y), dense], 1))

    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Compiled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = AdaLoader(Clicks(32, seed), 4, model=model, optimizer=optimizer, min_rows=MIN_ROWS)
    for batch in loader:
        work(model, optimizer, batch)
    assert model.graphs > 0
    assert loader.stats()["intent_coverage"] > 0.8

    @torch.compile(backend="eager", fullgraph=True)
    def unrelated(a):
        return (a * 2).relu().sum()

    assert unrelated(torch.ones(4)) == 8
    explained = torch._dynamo.explain(lambda a: a.sin() + 1)(torch.ones(3))
    assert explained.graph_count == 1 and explained.graph_break_count == 0
    loader.close()
    torch._dynamo.reset()


@pytest.mark.parametrize("sizes", [(8,), (8, 7, 3, 8, 5)], ids=["one size", "several"])
def test_a_compiled_model_that_keeps_its_gradients_until_after_the_forward_pass(sizes, seed):
    """Compiling again, for another size, meets parameters with gradients."""
    losses = {}
    for managed in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Embedding(300, 4), torch.nn.Linear(4, 1)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        data = [torch.randint(0, 300, (size,)) for size in sizes * 3]
        loader = AdaLoader.wrap(data, model=model, optimizer=optimizer, min_rows=10) if managed else data
        compiled = torch.compile(model, backend="eager")
        losses[managed] = []
        for ids in loader:
            loss = compiled(ids).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[managed].append(loss.item())
        if managed:
            assert list(loader.stats()["tables"]) == ["0.weight"]
            loader.close()
    assert losses[True] == pytest.approx(losses[False], rel=1e-12)
    torch._dynamo.reset()


def test_loading_is_not_watched(seed):
    """What a dataset or collate function computes beside the loop is no part of the recording."""

    def collate(samples):
        batch = torch.utils.data.default_collate(samples)
        batch["x"] = (batch["x"] * 5 + 2) % ROWS
        return batch

    loader, model, optimizer = start(seed, collate_fn=collate)
    for batch in loader:
        work(model, optimizer, batch)
    (program,) = managed_models[model].watch.programs
    assert not any("remainder" in line for line in program.describe())
    loader.close()


def test_lookups_of_an_evaluation_in_the_first_step_stay_out_of_the_program(seed):
    loader, model, optimizer = start(seed)
    validation = AdaLoader(Clicks(11, seed + 1), 4, model=model, min_rows=MIN_ROWS)
    for number, batch in enumerate(loader):
        if number == 0:
            with torch.no_grad():
                for other in validation:
                    model.loss(other)
        work(model, optimizer, batch)
    (program,) = managed_models[model].watch.programs
    assert sorted(site.table for site in program.derived) == ["bag.weight", "rows.weight"]
    assert loader.stats()["intent_coverage"] > 0.7
    validation.close()
    loader.close()


def test_functional_lookups_and_preprocessing_are_derived(seed):
    loader, model, optimizer = start(seed)
    for batch in loader:
        ids = torch.cat([batch["x"] + 1, batch["y"]], 1) % ROWS
        F.embedding(ids, model.rows.weight).sum().backward()
        optimizer.step()
    stats = loader.stats()
    assert stats["tables"]["rows.weight"]["on_demand"] < 30 < stats["tables"]["rows.weight"]["intended"]
    loader.close()


def test_models_of_one_process_do_not_disturb_each_other(seed):
    """Two loaders, two models, one loop; both first steps are watched at the same time."""
    first, second = start(seed), start(seed + 1)
    for one, other in zip(first[0], second[0], strict=True):
        losses = [first[1].loss(one), second[1].loss(other)]
        for loss, (_, _, optimizer) in zip(losses, (first, second), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for loader, _, _ in (first, second):
        assert loader.stats()["intent_coverage"] > 0.8
        loader.close()
    assert _get_current_dispatch_mode_stack() == []


def test_a_module_that_is_its_own_table(seed):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.randn(ROWS, 3, dtype=torch.float64))

        def loss(self, batch):
            return (self.weights[batch["x"]].sum((1, 2)) - batch["target"]).square().mean()

    stats = compare(Bare, Clicks(26, seed), seed=seed, keys=lambda model: {"weights": lambda batch: batch["x"]})
    assert stats["on_demand"] == 0
