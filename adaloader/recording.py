"""The file of `AdaLoader(record=)`, which is opened before anything is changed.

It is open as long as the manager is there: a rank goes on serving its rows when its own loader is closed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pm
from adaloader.ranks.table_values import all_texts
from adaloader.settings import Settings
from pm.recorder import Recorder, path_of_rank

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel


def open_record(manager: pm.Manager, record: object) -> Recorder | None:
    """Open this rank's file of `record`, if it is not None (collective).

    Raises:
        OSError: on every rank, if a rank cannot write its own; names it and the reason.
        ValueError: on every rank, if some have `record=` and others have not.
    """
    recorder, said = None, ""
    if record is not None:
        path = path_of_rank(record, manager.rank)
        try:
            recorder = Recorder(path, append=True)
        except OSError as error:
            said = f"rank {manager.rank} cannot write {path}, where record={str(record)!r} has it: {error.strerror}"
    everyones = all_texts(manager, said or ("none" if record is None else "open"))
    failed = [text for text in everyones if text not in ("none", "open")]
    if failed or len(set(everyones)) > 1:
        if recorder is not None:
            recorder.close()
        if failed:
            raise OSError(f"{failed[0]}; give a path in a folder that exists and can be written on every rank")
        without = [rank for rank, text in enumerate(everyones) if text == "none"]
        raise ValueError(f"ranks {without} have no record=, and the others have; give it on all of them, or on none")
    return recorder


def begin_record(managed: ManagedModel, recorder: Recorder, settings: Settings) -> None:
    """Write to the file from now on, of tables that come later too."""
    manager = managed.manager
    recorder.begin(manager.rank, manager.ranks, staleness=settings.staleness, techniques=settings.techniques)
    manager.record(recorder)
    managed.recorded_in = Path(settings.record)


def check_same_record(managed: ManagedModel, settings: Settings) -> None:
    """Raise ValueError if a later loader of a model asks for another file."""
    if settings.record is not None and Path(settings.record) != managed.recorded_in:
        first = None if managed.recorded_in is None else str(managed.recorded_in)
        raise ValueError(
            f"this model's first loader had record={first!r}, and this one asks for {str(settings.record)!r}; leave it "
            "out, for loaders of one model share it"
        )
