"""Work in threads, in order and with a bounded number of items under way."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def map_in_order(
    function: Callable[[Any], Any], items: Iterable[Any], threads: int, ahead: int = 8
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) for every item, like `map`, but computed ahead in `threads` threads.

    Args:
      ahead: items under way per thread.
    """
    pending: collections.deque = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(function, item)))
                if len(pending) > ahead * threads:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:  # after an error, what has not begun is not waited for
            for _, future in pending:
                future.cancel()
