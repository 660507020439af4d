"""Work on threads whose results are taken in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(
    pool: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item], depth: int
) -> Iterator[_Result]:
    """What `function` makes of items, in their order; an item is drawn when at most `depth` are at work."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
