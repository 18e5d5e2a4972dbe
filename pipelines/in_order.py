"""Results of tasks in the order in which the tasks were given, with a few under way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    start: Callable[[Item], Callable[[], Result]], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """start(item)() for each item, with `ahead` of them under way: `start` begins one, the call it returns
    waits for it. So memory doesn't grow with the number of items."""
    waiting: deque[Callable[[], Result]] = deque()
    for item in items:
        waiting.append(start(item))
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()
