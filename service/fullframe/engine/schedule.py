"""Which image is worked on next: a bounded pool of workers behind a queue that is measured in pixels."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from fullframe.errors import DeadlinePassed, InvalidInput, Overloaded, Unavailable

_FIRST_RATE: Final = 2e6  # pixels a second on one worker, assumed until jobs have been timed
_MEMORY: Final = 0.95  # how much of the past each new timing leaves in the rate
_SHORTEST_RETRY: Final = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class Turn:
    """What a job is told when its turn comes: seconds it waited, and whether it has the machine to itself."""

    queued: float
    alone: bool


@dataclass(frozen=True, slots=True)
class Job:
    """Work on `pixels` pixels; `work` runs on a worker's thread and its result becomes the future's."""

    pixels: int
    work: Callable[[Turn], Any]


@dataclass(slots=True)
class Counters:
    """What became of the jobs: created = queued + running + finished + failed + cancelled + expired, always.

    `refused` requests never became jobs; `pixels_in_flight` counts queued and running jobs.
    """

    created: int = 0
    queued: int = 0
    running: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0
    pixels_in_flight: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    job: Job
    deadline: float
    future: Future[Any] = field(default_factory=Future)
    entered: float = field(default_factory=time.monotonic)


class Scheduler:
    """Runs jobs first come, first served on `workers` threads.

    Args:
        workers: jobs worked on at once.
        max_pixels: how many pixels may be queued and running together; a request beyond that is refused whole.
    """

    def __init__(self, workers: int, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._counters = Counters()
        self._queue: deque[_Entry] = deque()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)  # for workers
        self._emptied = threading.Condition(self._lock)  # for who drains
        self._draining = False
        self._closed = False
        self._timed_pixels, self._timed_seconds = _FIRST_RATE, 1.0
        self._threads = [
            threading.Thread(target=self._serve, name=f"fullframe-worker-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Sequence[Job], deadline: float | None = None) -> list[Future[Any]]:
        """Queue all of `jobs` or none; cancelling a future whose job is still queued frees its room at once.

        Args:
            deadline: the time.monotonic() instant after which no answer is wanted; a job still queued then fails
                with DeadlinePassed and is never begun.

        Raises:
            InvalidInput: the jobs together could never be admitted.
            Overloaded: there is no room for them now.
            Unavailable: draining.
        """
        pixels = sum(job.pixels for job in jobs)
        entries = [_Entry(job, float("inf") if deadline is None else deadline) for job in jobs]
        with self._lock:
            self._admit(pixels)
            self._counters.created += len(entries)
            self._counters.queued += len(entries)
            self._counters.pixels_in_flight += pixels
            self._queue.extend(entries)
            self._arrived.notify(len(entries))
        for entry in entries:
            entry.future.add_done_callback(partial(self._drop_if_cancelled, entry))
        return [entry.future for entry in entries]

    def counters(self) -> Counters:
        """A consistent copy of the counts at this moment."""
        with self._lock:
            return replace(self._counters)

    def healthy(self) -> bool:
        """Whether every worker is there to take a job."""
        return all(thread.is_alive() for thread in self._threads)

    def drain(self, grace: float) -> bool:
        """Refuse new jobs and wait up to `grace` seconds for those in flight; returns whether all are done."""
        with self._lock:
            self._draining = True
            return self._emptied.wait_for(self._is_empty, grace)

    def close(self) -> None:
        """Cancel what is queued and end the workers once they finish what they run."""
        with self._lock:
            self._draining = self._closed = True
            waiting = [entry.future for entry in self._queue]
            self._arrived.notify_all()
        for future in waiting:
            future.cancel()
        for thread in self._threads:
            thread.join()

    def _admit(self, pixels: int) -> None:
        if self._draining:
            raise Unavailable("shutting down: ask another server, or this one later")
        if pixels > self.max_pixels:
            raise InvalidInput(
                f"the request holds {_megapixels(pixels)}; at most {_megapixels(self.max_pixels)} can be in flight: "
                "send its images in several requests",
                "images",
            )
        in_flight = self._counters.pixels_in_flight
        if in_flight + pixels > self.max_pixels:
            self._counters.refused += 1
            rate = self._timed_pixels / self._timed_seconds * len(self._threads)
            raise Overloaded(
                f"{_megapixels(in_flight)} of {_megapixels(self.max_pixels)} are in flight: "
                f"no room for {_megapixels(pixels)} now",
                retry_after=max(_SHORTEST_RETRY, (in_flight + pixels - self.max_pixels) / rate),
            )

    def _drop_if_cancelled(self, entry: _Entry, future: Future[Any]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            if entry in self._queue:  # otherwise a worker has just taken it, and finds it cancelled
                self._queue.remove(entry)
                self._counters.queued -= 1
                self._end(entry, "cancelled")

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            entry, alone = taken
            started = time.monotonic()
            outcome, deliver = self._run(entry, Turn(started - entry.entered, alone), started)
            with self._lock:
                self._counters.running -= 1
                if outcome == "finished":
                    self._timed_pixels = _MEMORY * self._timed_pixels + entry.job.pixels
                    self._timed_seconds = _MEMORY * self._timed_seconds + time.monotonic() - started
                self._end(entry, outcome)
            deliver()  # after the counting, so that whoever has an answer finds it counted
            del taken, entry, deliver  # an idle worker must not keep the last image alive

    def _take(self) -> tuple[_Entry, bool] | None:
        """The next job, and whether it has the machine to itself; None when there will be no more."""
        with self._lock:
            while not self._queue:
                if self._closed:
                    return None
                self._arrived.wait()
            entry = self._queue.popleft()
            self._counters.queued -= 1
            self._counters.running += 1
            return entry, self._counters.running == 1 and not self._queue

    def _run(self, entry: _Entry, turn: Turn, now: float) -> tuple[str, Callable[[], None]]:
        """The outcome, and what tells the future of it."""
        if not entry.future.set_running_or_notify_cancel():
            return "cancelled", lambda: None
        if now >= entry.deadline:
            late = DeadlinePassed("the deadline passed while the image was queued")
            return "expired", partial(entry.future.set_exception, late)
        try:
            return "finished", partial(entry.future.set_result, entry.job.work(turn))
        except BaseException as error:  # whatever it is, it is the caller's: the worker goes on
            return "failed", partial(entry.future.set_exception, error)

    def _end(self, entry: _Entry, outcome: str) -> None:
        setattr(self._counters, outcome, getattr(self._counters, outcome) + 1)
        self._counters.pixels_in_flight -= entry.job.pixels
        if self._is_empty():
            self._emptied.notify_all()

    def _is_empty(self) -> bool:
        return not self._counters.queued and not self._counters.running


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:.3g} megapixels"
