"""What the main thread of this process is doing, for whoever waits for it."""

from __future__ import annotations

import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType

_OURS = tuple(f"{Path(__file__).resolve().parents[2] / room}/" for room in ("adaloader", "pm", "intents", "cuda_ops"))
_INSTALLED = tuple({f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def describe_main_thread() -> str:
    """Return at which line of whose code the main thread is: "train.py:31 in main", say. Any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    inner = outer = None
    while frame is not None:
        if frame.f_code.co_filename.startswith(_OURS):
            inner = inner or frame
        elif not frame.f_code.co_filename.startswith(_INSTALLED) and not frame.f_code.co_filename.startswith("<"):
            outer = frame
            break
        frame = frame.f_back
    if outer is None and inner is None:
        return "at no line of Python that is known"
    if outer is None:
        return f"at {_place(inner)}"
    return f"at {_place(outer)}" + (f", waiting or at work in {_place(inner)}" if inner is not None else "")


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
