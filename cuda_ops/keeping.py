"""Compiled functions are kept on disk by Numba where that can be; where it cannot, a run goes on without."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from numba.core import config

_log = logging.getLogger(__name__)
_NO_FOLDER = "no locator available"  # of Numba's message: of the folders that it has tried none can be written


def kept(decorator: Callable) -> Callable:
    """Return a decorator that compiles as `decorator`, one of Numba's, does, and keeps on disk what was compiled.

    As Numba's own `cache=True`, but for two things. What was compiled is for all of `cuda_ops` as it was then: Numba
    looks at a function's own file, and not at those of the functions that it calls. And no disk makes an import or a
    call fail. Without a folder that can be written, each process compiles all again; with one that fails or is full,
    what could not be written or read there. The log says either once.
    """

    def decorate(function: Callable) -> Callable:
        compiled = decorator(function)
        if hasattr(compiled, "enable_caching"):  # with NUMBA_DISABLE_JIT it is the function itself
            _keep(compiled)
        return compiled

    return decorate


def _keep(dispatcher) -> None:
    try:
        dispatcher.enable_caching()
    except RuntimeError as error:
        if _NO_FOLDER not in str(error):
            raise
        _say_once("kept in", _folders_tried(), "none of them can be written")
        return
    cache = dispatcher._cache
    file = cache._cache_file
    file._source_stamp = (file._source_stamp, _stamp_of_all())
    cache.save_overload = _none_of_a_failing_disk(cache.save_overload, "written to", cache.cache_path)
    cache.load_overload = _none_of_a_failing_disk(cache.load_overload, "read from", cache.cache_path)


def _none_of_a_failing_disk(access: Callable, done: str, folder: str) -> Callable:
    """Return a method of a cache that returns None, as of what is not there, where `access` finds the disk failing."""

    def call(*args):
        try:
            return access(*args)
        except OSError as error:
            _say_once(done, folder, error)
            return None

    return call


@functools.cache
def _stamp_of_all() -> str:
    """Return what changes with any source of `cuda_ops`."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.name} {len(source)} ".encode() + source)
    return digest.hexdigest()


def _folders_tried() -> str:
    named = f"NUMBA_CACHE_DIR={config.CACHE_DIR}, " if config.CACHE_DIR else ""
    return f"{named}the folder of their source or the user's cache folder"


_said: set[str] = set()


def _say_once(done: str, where: str, why: object) -> None:
    """Log what cannot be `done` with compiled functions: the first time in this process."""
    if done not in _said:
        _said.add(done)
        _log.warning(
            "compiled functions cannot be %s %s (%s): each start compiles them again; set NUMBA_CACHE_DIR to a folder "
            "that has room and can be written",
            done,
            where,
            why,
        )
