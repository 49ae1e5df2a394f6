"""The commands of checkpoints: `inspect` and `export`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from adaloader import full_state_dict
from adaloader.command_line import main
from tests.resuming import begun


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "momentum"])
def test_exported_file_is_the_state_dict(tmp_path, seed, optimizer):
    safetensors = pytest.importorskip("safetensors.torch")
    script = begun(optimizer, 7, seed=seed, samples=40)
    script.save(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "out.safetensors")]) == 0
    exported = safetensors.load_file(tmp_path / "out.safetensors")
    expected = full_state_dict(script.model)
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor), name
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.safetensors", "saved"]
    script.close()


@pytest.mark.parametrize(
    "out, message",
    [
        ("", "is a folder"),
        (".", "is a folder"),
        ("/", "is a folder"),
        ("nowhere/..", "is a folder"),
        ("folder", "is a folder and would be replaced"),
        ("pipe", "is a device, pipe or socket and would be replaced"),
        ("link", "is a link and would be replaced"),
        ("run/step-000000000002/index.json", "lies in the checkpoint"),
        ("run/step-000000000004/new", "lies in the checkpoint"),
        ("aside/new", "lies in the checkpoint"),
        ("file/new", "cannot be written"),
        ("x" * 254, "cannot be written"),
    ],
)
def test_export_replaces_nothing_but_files(tmp_path, monkeypatch, capsys, out, message):
    script = begun(batches=0)
    script.loader.checkpoint(tmp_path / "run", every_steps=2)
    script.run(5)
    script.close()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("of somebody")
    (tmp_path / "aside").symlink_to("run/step-000000000002")
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", "run", out]) == 1
    said = capsys.readouterr().err
    assert message in said and f"adaloader: {os.path.normpath(out or '.')[:20]}" in said.replace("nowhere/..", ".")
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["inspect", "run/step-000000000002"]) == 0
    assert main(["export", "run", "file"]) == 0
    assert (tmp_path / "file").stat().st_size > 100


def test_inspect_of_a_file_says_so(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["inspect", str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'} is a file, not a folder: pass the folder" in capsys.readouterr().err


def test_inspect_ends_quietly_when_nobody_reads_on(tmp_path):
    script = begun()
    script.save(tmp_path)
    script.close()
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "adaloader", "inspect", str(tmp_path)]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_inspect_lists_and_verifies(tmp_path, capsys):
    script = begun("adam")
    script.save(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for text in ("5 steps, saved by 1 rank(s)", "of 211 rows x 4 float64, adam with exp_avg, exp_avg_sq", "out.weight"):
        assert text in said
    assert "extra: scheduler, losses" in said and "verified" in said
    script.close()
