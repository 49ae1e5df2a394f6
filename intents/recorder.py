"""Watching one step of a training loop, on its own thread, without a trace."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import modes
from .batch import contents
from .derive import derive
from .eagerly import run_eagerly
from .program import Program
from .sites import Site, users_line
from .tape import PARAMETER, Tape


@dataclass
class Recording:
    """What one step showed: its lookups in order, and a program per batch. ``abandoned`` says why there is none."""

    sites: list[Site] = field(default_factory=list)
    programs: dict[int, Program] = field(default_factory=dict)
    abandoned: str | None = None

    def program(self, batch_number: int) -> Program:
        """The program of a batch that was live in the recorded step; KeyError for any other."""
        if batch_number not in self.programs:
            raise KeyError(f"batch {batch_number} was not recorded: recorded were {sorted(self.programs)}")
        return self.programs[batch_number]


class Recorder:
    """Records the operations of one thread from :meth:`start` to :meth:`stop` or :meth:`abandon`.

    Invariant: between these two calls, and only then, a mode of ours lies at the bottom of that thread's
    stack of dispatch modes; it looks at each operation after it ran and changes nothing. A recorder records
    once.
    """

    def __init__(self) -> None:
        self._tape = Tape()
        self._mode = _Watch(self)
        self._thread: int | None = None
        self._is_active = False
        self._failure: str | None = None
        self._pauses = 0

    @property
    def is_active(self) -> bool:
        """Whether a recording is under way."""
        return self._is_active

    def start(self) -> None:
        """Begin to watch the calling thread."""
        if self._thread is not None:
            raise RuntimeError("this recorder was started before: a recorder records once, make a new one")
        self._thread = threading.get_ident()
        self._is_active = True
        self._compile_again = run_eagerly()
        modes.insert_at_bottom(self._mode)

    def add_batch(self, number: int, batch: Any) -> None:
        """Make the tensors of a batch known, when it is handed out. Several batches may be live at once."""
        if number in self._tape.batches:
            raise ValueError(f"batch {number} was added before: every batch of a recording needs its own number")
        if self._is_listening():
            with self._contained(), torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                self._tape.add_batch(number, contents(batch).traced)

    def lookup(self, table: str, ids: Tensor, operation: str, on_host: np.ndarray | None = None) -> None:
        """Note that rows ``ids`` (any shape, any integer dtype) of ``table`` are looked up now, by ``operation``;
        ``on_host`` are the same ids, flat, where the caller has them there."""
        if self._is_listening() and not self._pauses:
            with self._contained(), torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                self._tape.add_lookup(Site(table, operation, users_line()), ids, on_host)

    def drawn(self, redraw: Callable[..., Tensor], *facts: Any) -> None:
        """Note a random draw that ``redraw`` repeats for any batch; ``facts`` as :meth:`Tape.add_draw` takes them."""
        if self._is_listening() and not self._pauses:
            with self._contained(), torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                self._tape.add_draw(redraw, *facts)

    def came_from_table(self, made: Any) -> None:
        """Note that ``made`` holds rows of a table, which are no constants: what is made of them cannot be derived."""
        if self._is_listening():
            with self._contained():
                self._tape.mark(made, PARAMETER)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around operations that are not the user's: what they make counts as coming out of a table."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def stop(self) -> Recording:
        """End the recording and derive what can be derived of it.

        Where our mode is no longer on the calling thread's stack, or recording failed, the recording is abandoned and
        says why.
        """
        reason = self._finish() or self._failure
        tape, self._tape = self._tape, Tape()
        if reason is None:
            with self._contained():
                programs = derive(tape)
                return Recording([lookup.site for lookup in tape.lookups], programs)
        return Recording(abandoned=reason or self._failure)

    def abandon(self) -> None:
        """End the recording and forget it. Does nothing where none is under way."""
        if self._is_active:
            self._finish()
        self._tape = Tape()

    def _finish(self) -> str | None:
        if not self._is_active:
            return "no recording was under way: start() comes before stop()"
        self._is_active = False
        self._compile_again()
        if threading.get_ident() != self._thread:
            return "it was ended on another thread than the one that it watched"
        if not modes.remove_when_possible(self._mode):
            return "something else took its mode from the stack of dispatch modes"
        return None

    def _is_listening(self) -> bool:
        return self._is_active and self._failure is None and threading.get_ident() == self._thread

    @contextmanager
    def _contained(self) -> Iterator[None]:
        """What goes wrong in recording ends the recording, not the user's step."""
        try:
            yield
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(line.filename)}:{line.lineno}"
            self._failure = f"recording failed with {type(error).__name__} at {place}: {error}"
            self._tape = Tape()

    def _watch(self, func: Any, args: tuple, kwargs: dict[str, Any], types: Any) -> Any:
        made = func(*args, **kwargs)
        if self._is_listening() and not modes.tracing():
            with self._contained():
                self._take_in(func, args, kwargs, types, made)
        return made

    def _take_in(self, func: Any, args: tuple, kwargs: dict[str, Any], types: Any, made: Any) -> None:
        if self._pauses:
            self._tape.mark(made, PARAMETER)
        elif not isinstance(func, torch._ops.OpOverload) or any(map(_has_own_dispatch, types)):
            self._tape.recognise(made, f"went through {func}, which cannot be looked into")
        else:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._tape.observe(func, args, kwargs, made)


def _has_own_dispatch(cls: type) -> bool:
    return any("__torch_dispatch__" in vars(base) for base in cls.__mro__[: cls.__mro__.index(Tensor)])


class _Watch(TorchDispatchMode):
    """The mode that a recorder puts on the stack; once the recorder is done it lets everything pass."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Otherwise torch.compile would skip what it meets under this mode, and never compile it again.
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return self._recorder._watch(func, args, kwargs or {}, types)
