"""Bad input on one process: an error that names the value at fault, before anything is changed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from adaloader import AdaLoader, UnsupportedOptimizerError, full_state_dict
from adaloader.ranks.communicator import same_comm

ROWS = 1200
SGD = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
COMM = SimpleNamespace(Dup=None)  # as far as anybody looks before a model is there


class Net(nn.Module):
    """One table, looked up in the way that a test asks for."""

    def __init__(self, bag: bool = False):
        super().__init__()
        self.table = nn.EmbeddingBag(ROWS, 4) if bag else nn.Embedding(ROWS, 4)
        self.top = nn.Linear(4, 1)

    def forward(self, ids, how="module"):
        if how == "select":
            rows = self.table.weight.index_select(0, ids.reshape(-1))
        elif how == "index":
            rows = self.table.weight[ids]
        else:
            rows = self.table(ids)
        return self.top(rows)


def made(model=None, batches=None, optimizer="sgd", **options):
    model = Net() if model is None else model
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randint(0, ROWS, (3, 2)) for _ in range(8)] if batches is None else batches
    return model, optimizer, AdaLoader.wrap(batches, model=model, optimizer=optimizer, **options)


def train_step(model, optimizer, batch, **how):
    model(batch, **how).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


# --- ids ---


@pytest.mark.parametrize("bad", [ROWS, ROWS + 7, 2**40, -1, -(2**62)])
@pytest.mark.parametrize("how", ["embedding", "bag", "select"])
@pytest.mark.parametrize("at", [0, 3])  # the first step is watched, the later ones are planned ahead
def test_id_out_of_range_names_table_id_and_bounds(how, bad, at):
    batches = [torch.randint(0, ROWS, (3, 2)) for _ in range(6)]
    batches[at][1, 1] = bad
    model, optimizer, loader = made(Net(bag=how == "bag"), batches)
    seen = 0
    with pytest.raises(IndexError) as raised:
        for batch in loader:
            train_step(model, optimizer, batch, how="select" if how == "select" else "module")
            seen += 1
    assert seen == at, "the batches before the bad one are good"
    text = str(raised.value)
    assert str(bad) in text and "'table.weight'" in text and f"0 to {ROWS - 1}" in text
    loader.close()


@pytest.mark.parametrize("bad", [ROWS, -ROWS - 1, 2**50])
def test_indexing_counts_negative_ids_from_the_end_and_refuses_those_beyond(bad):
    model, _, loader = made()
    assert torch.equal(model.table.weight[-1], model.table.weight[ROWS - 1])
    for index in (bad, torch.tensor([0, bad]), [0, bad], np.array([bad])):
        with pytest.raises(IndexError, match=f"{bad} is out of range for table 'table.weight' with {ROWS} rows"):
            model.table.weight[index]
    loader.close()


def test_a_loop_may_skip_a_bad_batch_and_go_on():
    """What a bad batch leaves behind does no harm: the good ones count as if it had not been there."""
    torch.manual_seed(5)
    plain = Net()
    managed = copy.deepcopy(plain)
    good = [torch.randint(0, ROWS, (3, 2)) for _ in range(6)]
    bad = torch.full((3, 2), ROWS)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in good:
        train_step(plain, optimizer, batch)
    model, optimizer, loader = made(managed, good[:3] + [bad] + good[3:] + [bad])
    refused = 0
    for batch in loader:
        try:
            train_step(model, optimizer, batch)
        except IndexError:
            refused += 1
    assert refused == 2
    for name, value in full_state_dict(model).items():
        assert torch.allclose(value, plain.state_dict()[name], atol=1e-6)
    loader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.uint8, torch.complex64])
@pytest.mark.parametrize("how", ["module", "select"])
def test_ids_that_are_no_integers(dtype, how):
    batches = [torch.zeros(3, 2, dtype=dtype) for _ in range(3)]
    model, _, loader = made(batches=batches)
    with pytest.raises(TypeError, match=rf"table 'table.weight' got ids of dtype {dtype}"):
        model(next(iter(loader)), how=how)
    loader.close()


@pytest.mark.parametrize("index", [1.5, torch.tensor([1.0]), "a", torch.zeros(ROWS + 1, dtype=torch.bool)])
def test_indices_that_are_no_ids(index):
    model, _, loader = made()
    with pytest.raises((TypeError, IndexError, RuntimeError), match="'table.weight'"):
        model.table.weight[index]
    loader.close()


@pytest.mark.parametrize("ids", [[1, 2], 3, np.array([1, 2]), None])
def test_ids_that_are_no_tensor(ids):
    model, _, loader = made()
    with pytest.raises(TypeError, match="table 'table.weight' needs a tensor of ids"):
        nn.functional.embedding(ids, model.table.weight)
    loader.close()


# --- keys= ---


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (lambda batch: batch.float(), TypeError, "'table.weight' returned values of dtype float32"),
        (lambda batch: np.array([0.5]), TypeError, "'table.weight' returned values of dtype float64"),
        (lambda batch: ["3"], TypeError, "'table.weight' returned values of dtype <U1"),
        (lambda batch: None, TypeError, "'table.weight' returned values of dtype object"),
        (lambda batch: [True, False], TypeError, "'table.weight' returned values of dtype bool"),
        (lambda batch: [][3], IndexError, "list index"),
        (lambda batch: 1 // 0, ZeroDivisionError, "division"),
    ],
)
def test_key_function_that_fails(function, error, says):
    """Its error is raised in the loop, with its own traceback, and the loader can be iterated again."""
    model, optimizer, loader = made(keys={"table.weight": function})
    for _ in range(2):
        with pytest.raises(error, match=says):
            next(iter(loader))
    loader.close()


@pytest.mark.parametrize("returned", [[ROWS], [-1, 3], [0, 2**62], torch.tensor([[ROWS]]), [], torch.empty(0)])
def test_key_function_that_is_wrong_costs_time_alone(returned):
    torch.manual_seed(6)
    plain = Net()
    managed = copy.deepcopy(plain)
    batches = [torch.randint(0, ROWS, (3, 2)) for _ in range(6)]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in batches:
        train_step(plain, optimizer, batch)
    model, optimizer, loader = made(managed, batches, keys={"table.weight": lambda batch: returned})
    for batch in loader:
        train_step(model, optimizer, batch)
    assert loader.stats()["on_demand"] == loader.stats()["lookups"] > 0
    for name, value in full_state_dict(model).items():
        assert torch.allclose(value, plain.state_dict()[name], atol=1e-6)
    loader.close()


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        (3, ValueError, "keys must be"),
        ("all", ValueError, "keys must be .*got 'all'"),
        ([lambda batch: batch], ValueError, "keys must be"),
        ({"nothing": lambda batch: batch}, ValueError, r"'nothing', which is no managed table; managed are \['table"),
        ({nn.Linear(1, 1): lambda batch: batch}, ValueError, "Linear"),
        ({"table.weight": 5}, TypeError, "'table.weight' must be a function of a batch, got 5"),
    ],
)
def test_keys_that_are_no_keys(keys, error, says):
    with pytest.raises(error, match=says):
        made(keys=keys)


# --- other arguments ---


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lookahead": -1}, ValueError, "lookahead must be .*got -1"),
        ({"lookahead": 1.5}, ValueError, "lookahead must be .*got 1.5"),
        ({"lookahead": True}, ValueError, "lookahead must be .*got True"),
        ({"staleness": -1}, ValueError, "staleness must be .*got -1"),
        ({"staleness": 1.5}, ValueError, "staleness must be .*got 1.5"),
        ({"staleness": False}, ValueError, "staleness must be .*got False"),
        ({"staleness": "none"}, ValueError, "staleness must be .*got 'none'"),
        ({"techniques": "most"}, ValueError, "techniques.*'most'"),
        ({"staleness": None, "update_threshold": -1.0}, ValueError, "update_threshold must be .*got -1.0"),
        ({"update_threshold": 0.1}, ValueError, "update_threshold=0.1 holds changes back, which staleness=0"),
        ({"shared_memory": 1}, ValueError, "how many ranks \\(2 or more\\) count as one machine; got 1"),
        ({"shared_memory": "node"}, ValueError, "shared_memory must be True, False, or how many .*; got 'node'"),
        ({"staleness": None, "max_rounds_per_second": 0}, ValueError, "max_rounds_per_second must be .*got 0"),
        ({"min_rows": 0}, ValueError, "min_rows must be .*got 0"),
        ({"min_rows": 2.0}, ValueError, "min_rows must be .*got 2.0"),
        ({"min_rows": True}, ValueError, "min_rows must be .*got True"),
        ({"timeout_seconds": 0}, ValueError, "timeout_seconds must be .*got 0"),
        ({"timeout_seconds": float("nan")}, ValueError, "timeout_seconds must be .*got nan"),
        ({"timeout_seconds": float("inf")}, ValueError, "timeout_seconds must be .*1,000,000,000 at most; got inf"),
        ({"timeout_seconds": "5"}, ValueError, "timeout_seconds must be .*got '5'"),
        ({"batch_weight": 3}, TypeError, "batch_weight must be a function of a batch, got 3"),
        ({"optimizer": "sgd it"}, TypeError, "optimizer must be a torch.optim.Optimizer .*got str"),
        ({"optimizer": torch.optim.SGD}, TypeError, "optimizer must be a torch.optim.Optimizer .*got type"),
        ({"optimizer": [None]}, TypeError, "optimizer must be a torch.optim.Optimizer .*got NoneType"),
        ({"comm": "world"}, TypeError, "comm must be an mpi4py communicator, got str"),
    ],
)
def test_argument_out_of_range(options, error, says):
    model = Net()
    for build in (
        lambda: made(model, **options),
        lambda: AdaLoader([1, 2, 3], model=model, **{"optimizer": None, **options}),
    ):
        with pytest.raises(error, match=says):
            build()
    made(model)[2].close()  # nothing was changed by the refusals


@pytest.mark.parametrize("options", [{"lookahead": -1}, {"staleness": -2}, {"min_rows": 0}, {"keys": 3}])
def test_arguments_are_looked_at_without_a_model(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaLoader([1, 2, 3], **options)


@pytest.mark.parametrize(("name", "given"), [("optimizer", SGD), ("batch_weight", len), ("comm", COMM)])
def test_arguments_that_need_a_model(name, given):
    with pytest.raises(ValueError, match=f"{name} but no model"):
        AdaLoader([1, 2, 3], **{name: given})


@pytest.mark.parametrize(
    "model", [None, 3, Net, [Net()], nn.Linear(2, 2).state_dict()], ids=["none", "int", "class", "list", "dict"]
)
def test_model_that_is_no_model(model):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
        AdaLoader.wrap([1], model=model)


def test_model_in_a_wrapper_of_data_parallel():
    model = Net()
    with pytest.raises(ValueError, match="DataParallel: pass the model itself"):
        AdaLoader.wrap([1], model=nn.DataParallel(model))
    made(model)[2].close()


@pytest.mark.parametrize("make", [iter, lambda b: (x for x in b), lambda b: map(int, b), lambda b: reversed(b)])
def test_iterator_where_something_to_iterate_again_belongs(make):
    with pytest.raises(TypeError, match="iterated again"):
        AdaLoader.wrap(make([1, 2]), model=Net())


def test_thing_that_cannot_be_iterated():
    with pytest.raises(TypeError, match="again, got int"):
        AdaLoader.wrap(3, model=Net())


# --- models and optimizers that do not fit ---


def test_table_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"'table.weight' is on device meta.*deferred_init"):
        made(model)


def test_dense_parameter_on_the_meta_device():
    model = Net()
    model.top.to("meta")
    with pytest.raises(ValueError, match=r"'top.weight' is on device meta"):
        made(model)


def test_layer_that_has_no_shape_yet():
    model = Net()
    model.top = torch.nn.LazyLinear(1)
    with pytest.raises(ValueError, match=r"'top.weight' has no shape yet.*call the model once on a batch"):
        made(model)
    with torch.no_grad():
        model(torch.zeros(2, 1, dtype=torch.int64))
    made(model)[2].close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_table_on_a_gpu():
    with pytest.raises(ValueError, match=r"'table.weight' is on device cuda.*model.cpu\(\)"):
        made(Net().cuda())


def test_optimizer_of_another_model():
    model = Net()
    before = model.table.weight.detach().clone()
    for other in (copy.deepcopy(model).parameters(), model.top.parameters()):
        with pytest.raises(ValueError, match=rf"no optimizer holds table 'table.weight' \[{ROWS}, 4\].*model.param"):
            made(model, optimizer=torch.optim.SGD(other, lr=0.1))
    assert torch.equal(model.table.weight, before), "a refused model is as it was"
    made(model)[2].close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: torch.optim.LBFGS(p, lr=0.1), "LBFGS.*SGD.*Adagrad"),
        (lambda p: torch.optim.ASGD(p, lr=0.1), "ASGD.*SGD.*Adagrad"),
        (lambda p: torch.optim.Rprop(p, lr=0.1), "Rprop.*SGD.*Adagrad"),
        (lambda p: torch.optim.Adam(p, lr=0.1, differentiable=True), "differentiable=True"),
        (lambda p: torch.optim.SparseAdam(p, lr=0.1), "sparse=False.*SparseAdam.*sparse=True"),
    ],
)
def test_optimizer_that_tables_cannot_have(make, says):
    model = Net()
    with pytest.raises(UnsupportedOptimizerError, match=f"'table.weight'.*{says}"):
        made(model, optimizer=make(model.parameters()))
    made(model)[2].close()


def test_two_loaders_with_different_settings():
    model, optimizer, loader = made(min_rows=1000)
    with pytest.raises(ValueError, match="already has a loader with min_rows=1000, and this one asks for min_rows=1"):
        AdaLoader.wrap([1], model=model, min_rows=1)
    second = AdaLoader.wrap([torch.zeros(1, 1).long()], model=model, lookahead=0, keys=None)
    for batch in second:
        model(batch)
    second.close()
    for batch in loader:
        train_step(model, optimizer, batch)
    loader.close()


def test_communicators_that_mean_the_same():
    MPI = pytest.importorskip("mpi4py.MPI")
    assert same_comm(None, None) and same_comm(None, MPI.COMM_SELF) and same_comm(MPI.COMM_SELF, MPI.COMM_WORLD)
    model, _, loader = made()
    AdaLoader.wrap([1], model=model, comm=MPI.COMM_SELF).close()
    loader.close()


def test_wrapping_draws_no_random_numbers():
    """A loader that is wrapped must draw, in its first epoch, what it would have drawn."""
    model = Net()
    source = torch.utils.data.DataLoader(range(20), batch_size=2, shuffle=True)
    torch.manual_seed(3)
    expected = [batch.tolist() for batch in source]
    torch.manual_seed(3)
    _, _, loader = made(model, source, keys=None)
    assert [batch.tolist() for batch in loader] == expected
    loader.close()


# --- launched as several, without mpi4py ---


@pytest.mark.parametrize("error", ["ImportError('no such module')", "RuntimeError('cannot load MPI library')"])
def test_launcher_without_mpi4py(error, tmp_path):
    """Each of two processes would train alone and never know; `mpirun` is played by its environment variables."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("")
    (tmp_path / "mpi4py" / "MPI.py").write_text(f"raise {error}\n")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; from adaloader import AdaLoader\n"
        "AdaLoader.wrap([1], model=torch.nn.Linear(1, 1))\n"
    )
    environment = {**os.environ, "PMI_SIZE": "2", "PMI_RANK": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "a launcher started 2 processes, but mpi4py cannot be imported" in done.stderr
    assert "pip install 'adaloader[mpi]'" in done.stderr
    assert "rank 1 of 2 failed" in done.stderr
