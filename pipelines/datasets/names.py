"""The names of a source's images, one behind the other: a Python string each is three times as much."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any


class Names(Sequence[str]):
    """Strings that can be appended, read and searched, and take their UTF-8 and 8 bytes each."""

    def __init__(self, names: Iterable[str] = ()):
        self._text, self._ends = bytearray(), array("Q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        self._text += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # from the end, if negative; IndexError beyond
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")
