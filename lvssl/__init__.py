"""Latent-variable contrastive learning of image encoders.

The names below are those of `lvssl.api`, which is imported when the first of them is asked for: importing one
room of the package loads no other.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Encoding", "Model", "Neighbour", "load", "preset", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import sys

    try:
        return getattr(importlib.import_module("lvssl.api"), name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("pipelines."):
            raise
        ours = f"{sys.modules['pipelines']} hides lvssl's package of that name"
        raise ImportError(f"{ours}: rename it, or start elsewhere") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
