"""The click-through example: its data, its measures, and figures equal to plain PyTorch on 1 and 2 ranks."""

import json
from importlib.util import find_spec

import ctr
import numpy as np
import pytest
import torch
from ctr_data import FIELDS, Clicks, load_criteo, make_synthetic, split
from ctr_models import MODELS
from metrics import log_loss, roc_auc

from tests.launch import ROOT, launch, mpirun

CTR = ROOT / "examples" / "ctr.py"
CRITEO = ROOT.parent / "shared" / "data" / "criteo-subset"
TINY = ["--rows", "2600", "--dim", "4", "--samples", "1003", "--epochs", "2", "--lr", "0.05"]
needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None or mpirun() is None, reason="no mpi4py or no mpirun")


def train(ranks: int, folder, *options: str) -> dict:
    """Run the example on `ranks` ranks (0: without mpirun); return the figures that it wrote."""
    path = folder / "figures.json"
    result = launch(ranks, CTR, *options, "--json", str(path))
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[dict, dict]:
    """The figures of a small run of Wide & Deep on two ranks, and the model that it saved."""
    folder = tmp_path_factory.mktemp("ctr")
    figures = train(2, folder, *TINY, "--batch-size", "64", "--min-rows", "1", "--save", str(folder / "model.pt"))
    return figures, torch.load(folder / "model.pt", weights_only=True)


def train_here(*options: str) -> dict:
    """Run the example in this process, with its tables managed; return its epochs."""
    return {"epochs": [epoch.figures() for epoch in ctr.main(list(options))]}


def train_plain(*options: str) -> dict:
    """Run the example in plain PyTorch, in this process."""
    return train_here("--plain", *options)


def assert_equal_figures(figures: dict, plain: dict, tolerance: float) -> None:
    assert len(figures["epochs"]) == len(plain["epochs"]) > 0
    for ours, theirs in zip(figures["epochs"], plain["epochs"], strict=True):
        for name in ("train_loss", "test_log_loss", "test_auc"):
            assert ours[name] == pytest.approx(theirs[name], abs=tolerance), f"{name} of epoch {ours['epoch']}"


@pytest.mark.parametrize("model", sorted(MODELS))
def test_plain_learns_the_planted_signal(model):
    options = ["--model", model, "--rows", "2600", "--dim", "8", "--samples", "20000", "--epochs", "2"]
    epochs = train_plain(*options, "--batch-size", "128")["epochs"]
    assert epochs[-1]["test_auc"] > 0.65
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_one_rank_equals_plain_with_dropout(optimizer):
    options = [*TINY, "--optimizer", optimizer, "--batch-size", "64", "--dropout", "0.2", "--min-rows", "1"]
    plain = train_plain(*options)
    assert_equal_figures(train_here(*options), plain, 1e-5)


@needs_mpi
def test_two_ranks_equal_plain_with_the_global_batch(two_ranks):
    ranked, _ = two_ranks
    assert ranked["ranks"] == 2
    assert len(ranked["peak_memory_bytes"]) == 2
    assert_equal_figures(ranked, train_plain("--plain-ranks", "2", *TINY, "--batch-size", "64"), 1e-4)
    assert ranked["epochs"][-1]["intent_coverage"] >= 0.99


@needs_mpi
def test_a_declared_table_equals_plain_with_the_rows_used(tmp_path):
    options = [*TINY, "--model", "dlrm", "--batch-size", "64", "--deferred", "--min-rows", "1"]
    plain = train_plain("--plain-ranks", "2", *options)
    assert_equal_figures(train(2, tmp_path, *options), plain, 1e-4)


@needs_mpi
def test_saved_model_loads_in_plain_pytorch(two_ranks):
    figures, saved = two_ranks
    model = MODELS["wdl"](2600, 4)
    model.load_state_dict(saved)
    _, test = split(make_synthetic(1003, 2600, seed=0))
    with torch.no_grad():
        logits = model(test.dense, test.sparse).numpy()
    assert log_loss(test.label.numpy(), logits) == pytest.approx(figures["epochs"][-1]["test_log_loss"], abs=1e-5)


@needs_mpi
@pytest.mark.skipif(not CRITEO.exists(), reason="the Criteo sample is not beside the repository, in ../shared/data")
def test_criteo_on_two_ranks_equals_plain_in_the_memory_of_rows_touched(tmp_path, two_ranks):
    """33,762,588 rows x 128 with Adagrad, 34 GB if built: a rank takes what a tiny run takes, and its rows twice."""
    options = ["--data", str(CRITEO)]
    ranked = train(2, tmp_path, *options)
    plain = train_plain("--plain-ranks", "2", *options)
    assert len(ranked["epochs"]) == len(plain["epochs"]) == 3
    for ours, theirs in zip(ranked["epochs"], plain["epochs"], strict=True):
        assert ours["test_log_loss"] == pytest.approx(theirs["test_log_loss"], abs=1e-4)
        assert ours["test_auc"] == pytest.approx(theirs["test_auc"], abs=0.005)
        assert ours["intent_coverage"] >= 0.99
    assert ranked["epochs"][-1]["test_auc"] > 0.7
    tiny, _ = two_ranks
    assert sum(ranked["row_memory_bytes"]) < 2 * 39_910 * (2 * 128 * 4 + 8)
    for peak, rows in zip(ranked["peak_memory_bytes"], ranked["row_memory_bytes"], strict=True):
        assert peak <= max(tiny["peak_memory_bytes"]) + 2 * rows + 150e6


def test_bad_options_are_named(capsys):
    with pytest.raises(ValueError, match="--rows 25"):
        ctr.main(["--plain", "--rows", "25"])
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        ctr.main(["--plain", "--data", "no-such-folder"])
    for option in (["--epochs", "0"], ["--save", "model.pt", "--deferred"]):
        with pytest.raises(SystemExit):
            ctr.main(["--plain", *option])
        assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_synthetic_ids_stay_in_their_field_and_repeat(seed):
    rows = int(np.random.default_rng(seed).integers(FIELDS, 5000))
    clicks, again = make_synthetic(500, rows, seed), make_synthetic(500, rows, seed)
    assert torch.equal(clicks.sparse, again.sparse) and torch.equal(clicks.label, again.label)
    assert torch.equal(clicks.sparse // (rows // FIELDS), torch.arange(FIELDS).expand(500, FIELDS))
    assert 0.1 < clicks.label.mean() < 0.5


def test_popular_ids_follow_zipfs_law():
    clicks = make_synthetic(20_000, 26_000, seed=1)
    counts = clicks.sparse[:, 3].bincount(minlength=26_000).sort(descending=True).values[:100].double()
    ranks = torch.arange(1, 101, dtype=torch.float64)
    slope = torch.linalg.lstsq(torch.stack([ranks.log(), torch.ones(100).double()], 1), counts.log()).solution[0]
    assert slope == pytest.approx(-1.05, abs=0.1)


def test_a_batch_read_whole_equals_its_samples():
    clicks = make_synthetic(50, 2600, seed=2)
    batch, samples = clicks.__getitems__([7, 7, 3]), [clicks[i] for i in (7, 7, 3)]
    assert all(torch.equal(batch[name], torch.stack([s[name] for s in samples])) for name in batch)


def test_split_keeps_every_sample():
    clicks = make_synthetic(109, 2600, seed=3)
    train_set, test_set = split(clicks)
    assert (len(train_set), len(test_set)) == (99, 10)
    assert torch.equal(torch.cat([train_set.sparse, test_set.sparse]), clicks.sparse)


def test_criteo_files_of_another_shape_are_refused(tmp_path):
    np.save(tmp_path / "sampled_dense_feats.npy", np.zeros((4, 13)))
    np.save(tmp_path / "sampled_sparse_feats.npy", np.zeros((4, 25), dtype=np.int64))
    with pytest.raises(ValueError, match=r"sampled_sparse_feats.npy has shape \(4, 25\)"):
        load_criteo(tmp_path)
    np.save(tmp_path / "sampled_sparse_feats.npy", np.zeros((4, 26), dtype=np.int64))
    np.save(tmp_path / "sampled_labels.npy", np.zeros(5, dtype=np.int64))
    with pytest.raises(ValueError, match="4, 4, 5"):
        load_criteo(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_auc_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    labels, logits = rng.integers(0, 2, 60).astype(float), rng.integers(-3, 3, 60).astype(float)
    pairs = logits[labels == 1][:, None] - logits[labels == 0][None, :]
    assert roc_auc(labels, logits) == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    assert np.isnan(roc_auc(np.ones(3), logits[:3]))


def test_log_loss_equals_pytorchs_and_stands_large_logits():
    labels, logits = np.array([0.0, 1.0, 1.0]), np.array([-1.5, 800.0, -800.0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels))
    assert log_loss(labels, logits) == pytest.approx(float(expected))


@pytest.mark.parametrize("model", sorted(MODELS))
def test_models_take_one_sample_and_none(model):
    net = MODELS[model](2600, 4)
    for samples in (0, 1, 5):
        clicks = Clicks(torch.zeros(samples, 13), torch.zeros(samples, 26, dtype=torch.int64), torch.zeros(samples))
        assert net(clicks.dense, clicks.sparse).shape == (samples,)
