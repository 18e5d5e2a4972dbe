"""Fill dataclasses of settings from TOML values: their names, and the values that fit."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any


def fields_of(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def is_path(hint: Any) -> bool:
    return any(each is Path or Path in typing.get_args(each) for each in _alternatives(hint))


def words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list",
             dict: "a table", Path: "a path"}  # fmt: skip
    return " or ".join(
        names.get(each, str(each).replace("typing.", ""))
        for each in _alternatives(hint)
        if each is not type(None)
    )
