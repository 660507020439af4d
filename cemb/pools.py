"""Work on threads whose results are taken in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future


def in_order(pool: Executor, function: Callable, items: Iterable, depth: int) -> Iterator:
    """What `function` makes of items, in their order; an item is drawn when at most `depth` are at work."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
