"""`record=`: what a loader writes of its intents and moves, on one process; on several see `tests/mpi`."""

import json

import pytest
import torch
from torch import nn

from adaloader import AdaLoader


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(path, batches, staleness=0, **options):
    model = nn.Embedding(2000, 4)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    loader = AdaLoader.wrap(
        batches, model=model, optimizer=optimizer, min_rows=1, record=path, staleness=staleness, **options
    )
    for ids in loader:
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    return model, loader


@pytest.mark.parametrize("staleness", [0, 2, None])
def test_intents_are_written_and_a_second_run_adds_to_the_file(tmp_path, staleness):
    batches = [torch.randint(2000, (7,)) for _ in range(9)]
    for runs in (1, 2):
        run(str(tmp_path / "moves.jsonl"), batches, staleness)[1].close()
        lines = lines_of(tmp_path / "moves-0.jsonl")
        begins = [line for line in lines if line["what"] == "begins"]
        expected = {"what": "begins", "rank": 0, "ranks": 1, "staleness": staleness, "techniques": "all"}
        assert begins == [expected] * runs
    intended = {}
    for line in lines[lines.index(begins[0], 1) :]:
        if line["what"] == "intends":
            assert line["end"] is None
            if line["start"] in intended:  # a batch that is read before keys are known is planned again once they are
                assert line["start"] < 5 and line["keys"] == intended[line["start"]]
            intended[line["start"]] = line["keys"]
    assert set(range(5, 9)) <= set(intended), "but those that were read before keys were known"
    for step, keys in intended.items():
        assert sorted(keys) == sorted(set(batches[step].tolist()))


def test_a_file_that_cannot_be_written_is_said_before_the_model_is_touched(tmp_path):
    model = nn.Embedding(2000, 4)
    before = model.weight.detach().clone()
    for path in (tmp_path / "absent" / "moves.jsonl", tmp_path / "there"):
        (tmp_path / "there-0").mkdir(exist_ok=True)
        with pytest.raises(OSError, match="rank 0 cannot write .*-0"):
            AdaLoader.wrap([torch.arange(3)], model=model, min_rows=1, record=path)
        assert type(model.weight) is nn.Parameter
    loader = AdaLoader.wrap([torch.arange(3)], model=model, min_rows=1)
    for ids in loader:
        assert torch.equal(model(ids), before[ids])


@pytest.mark.parametrize("record", [3, True, "", b"moves"])
def test_what_is_no_path_is_refused(record):
    with pytest.raises(ValueError, match="record must be the path of a file"):
        AdaLoader.wrap([torch.arange(3)], model=nn.Embedding(2000, 4), min_rows=1, record=record)


def test_a_record_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got record but no model"):
        AdaLoader(torch.arange(3), record=tmp_path / "moves.jsonl")


def test_later_loaders_share_the_record(tmp_path):
    model, loader = run(tmp_path / "moves.jsonl", [torch.arange(5)] * 3)
    AdaLoader.wrap([torch.arange(3)], model=model, min_rows=1)
    AdaLoader.wrap([torch.arange(3)], model=model, min_rows=1, record=str(tmp_path / "moves.jsonl"))
    with pytest.raises(ValueError, match="record='.*moves.jsonl', and this one asks for '.*others.jsonl'"):
        AdaLoader.wrap([torch.arange(3)], model=model, min_rows=1, record=tmp_path / "others.jsonl")
    assert not (tmp_path / "others-0.jsonl").exists()
    loader.close()
