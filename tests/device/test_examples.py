"""The examples with their model on a device: the figures of plain PyTorch."""

import subprocess
import sys

import ctr
import gcn
import pytest
import torch

from tests.launch import ROOT

SIZES = {
    ctr: ["--rows", "1300", "--dim", "4", "--samples", "700", "--batch-size", "64", "--epochs", "2", "--min-rows", "1"],
    gcn: ["--nodes", "300", "--dim", "6", "--hidden", "5", "--batch-size", "64", "--epochs", "2", "--min-rows", "1"],
}


@pytest.mark.parametrize(("example", "cache"), [(ctr, "60000"), (gcn, "0")])
def test_figures_are_those_of_plain_pytorch(example, cache, device):
    ours = example.main([*SIZES[example], "--device", str(device), "--device-cache-bytes", cache])
    plain = example.main([*SIZES[example], "--plain"])
    assert len(ours) == len(plain) == 2
    for mine, its in zip(ours, plain, strict=True):
        assert mine.train_loss == pytest.approx(its.train_loss, abs=1e-5)
        for name, score in its.scores.items():
            assert mine.scores[name] == pytest.approx(score, abs=1e-4), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["ctr", "gcn"])
def test_without_a_cuda_device_they_say_so(name):
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--device", "cuda"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "argument --device: 'cuda': this PyTorch" in run.stderr and "sees no CUDA device here" in run.stderr
