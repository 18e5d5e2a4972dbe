"""numba's compiler, which also works where compiled code can't be cached."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`njit` without the GIL, cached on disk for the next process if possible.

    numba caches next to the source or in the user's cache folder. A job on a cluster with a shared
    installation may have write access to neither; then each process compiles again. The cache is valid only
    for these exact sources, including those of called functions in other files, which numba itself ignores.
    """

    def compile_it(function: Callable) -> Callable:
        try:
            made = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # "no locator available": no place for a cache
            return njit(nogil=True, **options)(function)
        # Private names of numba, checked by tests/test_compiled.py.
        kept = getattr(made._cache, "_cache_file", None)
        if kept is not None:
            kept._source_stamp = (kept._source_stamp, *map(digest, sorted(sources(function))))
        return made

    return compile_it


def sources(function: Any) -> set[str]:
    """The files of a function and of the compiled functions that it calls, by name or as part of a module."""
    names = function.__code__.co_names
    used = [function.__globals__.get(name) for name in names]
    modules = [each for each in used if isinstance(each, ModuleType)]
    used += [getattr(module, name, None) for module in modules for name in names]
    others = (each.py_func for each in used if hasattr(each, "py_func") and each.py_func is not function)
    return {function.__code__.co_filename}.union(*map(sources, others))


@cache
def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
