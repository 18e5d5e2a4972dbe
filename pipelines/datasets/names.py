"""Image names, stored one after the other: a Python string for each would take three times the memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.errors import InputError


class Names(Sequence[str]):
    """A sequence of strings that can be appended to, read and searched; each takes its UTF-8 and 8 bytes."""

    def __init__(self, names: Iterable[str] = ()):
        self._text, self._ends = bytearray(), array("Q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        try:
            self._text += name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise InputError(f"{name!r}: half a character, of a surrogate pair: correct this text") from error
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # counts from the end if negative; raises IndexError beyond
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")
