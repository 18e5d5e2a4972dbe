"""numba's compiler, also where the compiled code cannot be kept."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`njit` without Python's lock, kept on the disk for the next process if there is a place for it.

    numba keeps it beside the source or in the user's cache; a shared installation on a cluster may let a job
    write to neither, and then each process compiles anew. What is kept is that of these sources alone, also
    where a function calls one of another file, of which numba itself takes no notice.
    """

    def compile_it(function: Callable) -> Callable:
        try:
            made = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # "no locator available": no such place
            return njit(nogil=True, **options)(function)
        # numba's own names: tests/test_compiled.py holds them.
        kept = getattr(made._cache, "_cache_file", None)
        if kept is not None:
            kept._source_stamp = (kept._source_stamp, *map(digest, sorted(sources(function))))
        return made

    return compile_it


def sources(function: Any) -> set[str]:
    """The files of a function and of the compiled ones that it calls, by name or as part of a module."""
    names = function.__code__.co_names
    used = [function.__globals__.get(name) for name in names]
    modules = [each for each in used if isinstance(each, ModuleType)]
    used += [getattr(module, name, None) for module in modules for name in names]
    others = (each.py_func for each in used if hasattr(each, "py_func") and each.py_func is not function)
    return {function.__code__.co_filename}.union(*map(sources, others))


@cache
def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
