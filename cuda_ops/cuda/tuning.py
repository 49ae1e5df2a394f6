"""Launch shapes by measurement: which split of a block into rows and lanes is the fastest for a kernel on this device.

Nothing is launched for the sake of measuring, for kernels change what they are given: the launches that a program
makes anyway try the shapes in turns, and once each has been tried often enough the fastest is kept, in this process and
in the device's log. A shape never changes a result, so that no run depends on what was tried (kernels in which it would
keep their lanes). Times are those between two events of the stream, the launch itself included where the device is
idle.

Off unless the environment variable `ADALOADER_TUNING_FOLDER` names a folder (and there is a GPU): logs are kept there,
a JSON file per device:

    {"version": 1, "device": name and compute capability,
     "shapes": {kernel, its constants, pieces in a row, power of two of rows: {"lanes", "threads", "ns_per_row"}}}

A log that cannot be read, or is another device's, is left aside with a warning, and replaced when something is learned.
Logs as records of measurements to start from are TVM's idea (Chen et al., OSDI 2018).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

FOLDER = "ADALOADER_TUNING_FOLDER"
"""The environment variable that names the folder of the logs; unset or empty, nothing is tuned."""

_VERSION = 1
_TRIALS = 5
_log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """Of a block: threads in all, and how many of them work on one row."""

    lanes: int
    threads: int


class Timer(Protocol):
    """Times what is launched between `start` and `stop`; `seconds` gives None until that has ended."""

    def start(self) -> Any: ...

    def stop(self, begun: Any) -> Any: ...

    def seconds(self, ended: Any) -> float | None: ...


class EventTimer:
    """A timer of events on the current stream of a device (its number), for which nobody waits."""

    def __init__(self, device: int):
        self._device = device

    def start(self):
        return self._event()

    def stop(self, begun):
        return begun, self._event()

    def seconds(self, ended):
        begun, ended = ended
        return begun.elapsed_time(ended) * 1e-3 if ended.query() else None

    def _event(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # which the launch is on; the thread may be at another's
        return event


class Tuner:
    """The shapes of one device, learned from trials.

    Args:
        path: of the log.
        device: its name, which a log must bear to be used.
        timer: what measures a launch.
        trials: timed launches of each shape, of which the shortest counts.
    """

    def __init__(self, path: Path, device: str, timer: Timer, trials: int = _TRIALS):
        self._path, self._device, self._timer, self._trials = path, device, timer, trials
        self._lock = threading.Lock()
        self._known = {key: _shape_of(entry) for key, entry in self._read().items()}
        self._searches: dict[str, _Search] = {}

    def shape(self, key: str) -> Shape | None:
        """Return the shape that is known to be the fastest for a kind of launch; None while it is not known."""
        return self._known.get(key)

    def launch(self, key: str, shapes: Sequence[Shape], rows: int, run: Callable[[Shape], None]) -> None:
        """Call `run` once, with the fastest of `shapes`, or while that is not known with one that is to be tried.

        Args:
            key: tells this kind of launch from others.
            shapes: all that may be chosen; the first is taken where nothing is known.
            rows: by which times are divided.
        """
        with self._lock:
            shape = self._known.get(key)
            if shape not in shapes:
                search = self._searches.setdefault(key, _Search(shapes))
                shape = search.next_shape(self._timer, self._trials)
                if shape is None:
                    shape = self._settle(key, search)
                else:
                    begun = self._timer.start()
                    run(shape)
                    search.note(shape, rows, self._timer.stop(begun))
                    return
        run(shape)

    def _settle(self, key: str, search: _Search) -> Shape:
        shape, seconds = search.fastest()
        self._known[key] = shape
        del self._searches[key]
        entries = self._read()  # other processes write here too
        entries[key] = {**shape._asdict(), "ns_per_row": seconds * 1e9}
        self._write(entries)
        return shape

    def _read(self) -> dict[str, dict[str, Any]]:
        """The entries of the log; none, and a warning, where it is damaged or another device's."""
        try:
            log = json.loads(self._path.read_text())
            if log["version"] != _VERSION or log["device"] != self._device:
                found = f"version {log['version']}, device {log['device']!r}"
                _log.warning("%s is ignored: it is of %s, not %r; remove it", self._path, found, self._device)
                return {}
            for entry in log["shapes"].values():
                _shape_of(entry)
            return dict(log["shapes"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("%s is ignored: it is damaged (%s: %s); remove it", self._path, type(error).__name__, error)
            return {}

    def _write(self, entries: dict[str, dict[str, Any]]) -> None:
        text = json.dumps({"version": _VERSION, "device": self._device, "shapes": entries}, indent=1, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                file.write(text + "\n")
            os.replace(file.name, self._path)
        except OSError as error:
            _log.warning("what was learned of launches cannot be kept in %s: %s", self._path, error)


class _Search:
    """The trials of one kind of launch. The first launch of all is not counted: it compiles the kernel."""

    def __init__(self, shapes: Sequence[Shape]):
        self._shapes = tuple(shapes)
        self._begun = dict.fromkeys(self._shapes, 0)
        self._begun[self._shapes[0]] = -1
        self._running: list[tuple[Shape, int, Any]] = []
        self._seconds: dict[Shape, list[float]] = {shape: [] for shape in self._shapes}

    def next_shape(self, timer: Timer, trials: int) -> Shape | None:
        """The shape that was tried least; None when all were tried often enough and their times are known."""
        still = []
        for shape, rows, ended in self._running:
            seconds = timer.seconds(ended)
            if seconds is None:
                still.append((shape, rows, ended))
            else:
                self._seconds[shape].append(seconds / rows)
        self._running = still
        if all(len(times) >= trials for times in self._seconds.values()):
            return None
        return min(self._shapes, key=self._begun.__getitem__)

    def note(self, shape: Shape, rows: int, ended: Any) -> None:
        self._begun[shape] += 1
        if self._begun[shape] > 0:
            self._running.append((shape, rows, ended))

    def fastest(self) -> tuple[Shape, float]:
        """The shape of the shortest time a row, and that in seconds."""
        shape = min(self._shapes, key=lambda shape: min(self._seconds[shape]))
        return shape, min(self._seconds[shape])


def _shape_of(entry: dict[str, Any]) -> Shape:
    lanes, threads = entry["lanes"], entry["threads"]
    if not (isinstance(lanes, int) and isinstance(threads, int) and 0 < lanes <= threads):
        raise ValueError(f"lanes {lanes!r} of {threads!r} threads")
    return Shape(lanes, threads)


_given: list[Tuner] = []


@contextlib.contextmanager
def using(tuner: Tuner) -> Iterator[Tuner]:
    """Have all launches ask this tuner inside, whatever the environment says."""
    _given.append(tuner)
    try:
        yield tuner
    finally:
        _given.remove(tuner)


def tuner_for(device: torch.device) -> Tuner | None:
    """Return the tuner of a device, if launches there are to be tuned."""
    if _given:
        return _given[-1]
    folder = os.environ.get(FOLDER)
    if not folder or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return _tuner_of(folder, device.index or 0)


@functools.lru_cache(None)
def _tuner_of(folder: str, index: int) -> Tuner:
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    name = f"{torch.cuda.get_device_name(index)}, compute capability {capability}"
    file = re.sub(r"[^A-Za-z0-9.]+", "-", name) + ".json"
    return Tuner(Path(folder) / file, name, EventTimer(index))
