"""Headers of image files, read beside the queue since admission needs their sizes: two at once, and a bounded wait."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from fullframe.errors import Overloaded
from fullframe.image import Limits, OnDisk, Picture, open_encoded

MOST_OPENING: Final = 1024
"""Files that wait for it, at most: as many as the largest request may bring."""

_RETRY_AFTER: Final = 0.5
"""Seconds: a header of the slow formats takes milliseconds."""


class Opening:
    """Threads that open files.

    Args:
        most: files that are opened or wait for it; one more is refused.
    """

    def __init__(self, most: int = MOST_OPENING) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._opening = self._refused = 0
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="fullframe-open")

    def submit(self, data: bytes | OnDisk, limits: Limits) -> Future[Picture]:
        """Open a file as open_encoded does; cancelling the future makes room at once. Raises Overloaded."""
        with self._lock:
            if self._opening >= self._most:
                self._refused += 1
                raise Overloaded(f"{self._most} images wait to be opened: no room for more now", _RETRY_AFTER)
            self._opening += 1
        future = self._threads.submit(open_encoded, data, limits)
        future.add_done_callback(self._ended)
        return future

    def counts(self) -> tuple[int, int]:
        """Files opened or waiting now, and those refused so far."""
        with self._lock:
            return self._opening, self._refused

    def close(self) -> None:
        """Cancel what waits, end the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _ended(self, _: object) -> None:
        with self._lock:
            self._opening -= 1
