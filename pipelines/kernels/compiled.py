"""numba's compiler, also where the compiled code cannot be kept."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`njit` without Python's lock, kept on the disk for the next process if there is a place for it.

    numba keeps it beside the source or in the user's cache; a shared installation on a cluster may let a job
    write to neither, and then each process compiles anew.
    """

    def compile_it(function: Callable) -> Callable:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # "no locator available": no such place
            return njit(nogil=True, **options)(function)

    return compile_it
