"""Launch shapes by measurement, with a timer that tells each shape's time as it likes."""

import json
import logging
import random

import numpy as np
import pytest
import torch

from cuda_ops.cuda import launch as launching
from cuda_ops.cuda import tuning
from cuda_ops.cuda.rows import gather
from cuda_ops.cuda.sparse_update import rowwise_adagrad_update
from cuda_ops.cuda.tuning import Shape, Tuner
from tests.cuda_ops.cuda.device import DEVICE, make_store, on_device

DEVICE_NAME = "A GPU, compute capability 9.0"
SHAPES = (Shape(8, 32), Shape(4, 32), Shape(2, 16))


class FakeTimer:
    """Says that a launch took what `seconds_of` has for its shape, or up to half more; `late` launches after it."""

    def __init__(self, seconds_of, late=0):
        self.seconds_of, self.late, self.launches = seconds_of, late, []

    def start(self):
        return len(self.launches)

    def stop(self, begun):
        return begun

    def run(self, shape):
        self.launches.append(shape)

    def seconds(self, ended):
        if len(self.launches) <= ended + self.late:
            return None
        shape = self.launches[ended]
        return 1e9 if ended == 0 else self.seconds_of(shape) * random.uniform(1.0, 1.5)


def settled(tuner, timer, key="gather", shapes=SHAPES):
    """Launch until the shape of `key` is known, and return how often that was."""
    for count in range(1, 200):
        tuner.launch(key, shapes, 10, timer.run)
        if tuner.shape(key):
            return count
    raise AssertionError("no shape was chosen in 200 launches")


@pytest.mark.parametrize("late", [0, 1, 7])
@pytest.mark.parametrize("best", SHAPES)
def test_the_fastest_shape_is_chosen_and_kept(tmp_path, best, late):
    path = tmp_path / "logs" / "gpu.json"
    timer = FakeTimer(lambda shape: 1.0 if shape == best else 2.0, late)
    tuner = Tuner(path, DEVICE_NAME, timer, trials=3)
    count = settled(tuner, timer)
    assert 3 * len(SHAPES) + 1 < count <= 3 * len(SHAPES) + 2 + late and len(timer.launches) == count
    assert tuner.shape("gather") == best == timer.launches[-1]
    for _ in range(3):
        tuner.launch("gather", SHAPES, 10, timer.run)
    assert timer.launches[-3:] == [best] * 3

    log = json.loads(path.read_text())
    assert log["device"] == DEVICE_NAME and list(log["shapes"]) == ["gather"]
    assert 1e8 <= log["shapes"]["gather"].pop("ns_per_row") <= 1.5e8
    assert log["shapes"]["gather"] == best._asdict()
    again = Tuner(path, DEVICE_NAME, None)  # which has no timer to try anything with
    again.launch("gather", SHAPES, 10, timer.run)
    assert timer.launches[-1] == best
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


def test_several_processes_write_one_log(tmp_path):
    path = tmp_path / "gpu.json"
    timers = [FakeTimer(lambda shape: 2.0**shape.lanes), FakeTimer(lambda shape: 2.0**-shape.lanes)]
    tuners = [Tuner(path, DEVICE_NAME, timer, trials=1) for timer in timers]
    for tuner, timer, key in zip(tuners, timers, ["gather", "scatter"], strict=True):
        settled(tuner, timer, key)
    last = Tuner(path, DEVICE_NAME, None)
    assert last.shape("gather") == SHAPES[2] and last.shape("scatter") == SHAPES[0]


def log_text(rest, device=DEVICE_NAME, version=1):
    return f'{{"version": {version}, "device": "{device}"{rest}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (log_text(', "shapes": {}', device="Another"), "device 'Another', not 'A GPU"),
        (log_text(', "shapes": {}', version=2), "version 2"),
        ('{"version": 1, "device":', "damaged (JSONDecodeError"),
        ("[]", "damaged (TypeError"),
        (log_text(""), "damaged (KeyError"),
        (log_text(', "shapes": {"gather": {"lanes": 64, "threads": 32}}'), "damaged"),
        (log_text(', "shapes": {"gather": 3}'), "damaged (TypeError"),
        ("\udcff", "damaged (UnicodeDecodeError"),
    ],
)
def test_a_log_that_cannot_be_used_is_ignored_with_a_warning_and_replaced(tmp_path, caplog, text, message):
    path = tmp_path / "gpu.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    timer = FakeTimer(lambda shape: 2.0**shape.lanes)
    with caplog.at_level(logging.WARNING, "cuda_ops.cuda.tuning"):
        tuner = Tuner(path, DEVICE_NAME, timer, trials=1)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and message in record.getMessage() and "remove it" in record.getMessage()
    assert tuner.shape("gather") is None
    settled(tuner, timer)
    caplog.clear()
    assert Tuner(path, DEVICE_NAME, None).shape("gather") == SHAPES[2] and not caplog.records


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    timer = FakeTimer(lambda shape: 2.0**shape.lanes)
    tuner = Tuner(tmp_path / "file" / "gpu.json", DEVICE_NAME, timer, trials=1)
    settled(tuner, timer)
    assert tuner.shape("gather") == SHAPES[2] and "cannot be kept" in caplog.text


def test_a_shape_that_a_launch_cannot_have_is_not_taken_from_a_log(tmp_path):
    path = tmp_path / "gpu.json"
    shapes = {"gather": {"lanes": 3, "threads": 7, "ns_per_row": 1.0}}
    path.write_text(json.dumps({"version": 1, "device": DEVICE_NAME, "shapes": shapes}))
    timer = FakeTimer(lambda shape: 2.0**shape.lanes)
    Tuner(path, DEVICE_NAME, timer).launch("gather", SHAPES, 10, timer.run)
    assert timer.launches == [SHAPES[0]]


def test_a_launch_that_fails_is_no_trial(tmp_path):
    timer = FakeTimer(lambda shape: 2.0**shape.lanes)
    tuner = Tuner(tmp_path / "gpu.json", DEVICE_NAME, timer, trials=1)

    def fail(shape):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tuner.launch("gather", SHAPES, 10, fail)
    settled(tuner, timer)
    assert tuner.shape("gather") == SHAPES[2]


class CountingTimer:
    """The n-th launch took 1 / n seconds: the last shape tried is the fastest."""

    count = 0

    def start(self):
        return None

    def stop(self, begun):
        self.count += 1
        return self.count

    def seconds(self, ended):
        return 1 / ended


def test_launches_are_tuned_and_their_results_stay(tmp_path, monkeypatch):
    words, stride, steps, records = make_store(np.random.default_rng(), 9, 5, 1, torch.float32)
    slots = on_device(np.array([3, 8, 0]))
    shapes = []
    run = launching._run
    monkeypatch.setattr(
        launching, "_run", lambda body, grid, block, args: (shapes.append(block), run(body, grid, block, args))
    )
    tuner = Tuner(tmp_path / "gpu.json", DEVICE_NAME, CountingTimer(), trials=1)
    with tuning.using(tuner):
        for _ in range(2 * len(launching.shapes_for(5, False))):
            np.testing.assert_array_equal(gather(words, stride, slots, width=5).cpu().numpy(), records[[3, 8, 0], :5])
        assert len(set(shapes)) == len(launching.shapes_for(5, False)) > 3
        (entry,) = json.loads((tmp_path / "gpu.json").read_text())["shapes"]
        assert entry.startswith("copy/") and entry.endswith("5 pieces/2^2 rows")
        shapes.clear()
        grad = torch.ones(3, 5, device=DEVICE)
        for _ in range(8):
            rowwise_adagrad_update(words, stride, 5, steps, slots, grad, 0.1, 1e-8, 1.0, 3)
        assert len(set(shapes)) > 1 and len({lanes for lanes, _ in shapes}) == 1
    shapes.clear()
    gather(words, stride, slots, width=5)
    assert shapes == [(8, launching.THREADS // 8)]


def test_events_are_of_the_stream_of_the_devices_launches(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.stream = stream

        def query(self):
            return True

        def elapsed_time(self, ended):
            return 250.0 if (self.stream, ended.stream) == ("of device 1", "of device 1") else None

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=0: f"of device {device}")
    timer = tuning.EventTimer(1)
    assert timer.seconds(timer.stop(timer.start())) == 0.25


def test_nothing_is_tuned_unless_the_environment_names_a_folder(monkeypatch):
    monkeypatch.delenv(tuning.FOLDER, raising=False)
    assert tuning.tuner_for(DEVICE) is None
    monkeypatch.setenv(tuning.FOLDER, "")
    assert tuning.tuner_for(DEVICE) is None
    monkeypatch.setenv(tuning.FOLDER, "somewhere")
    assert tuning.tuner_for(torch.device("cpu")) is None
