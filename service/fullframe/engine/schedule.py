"""Which image is worked on next: a bounded pool of workers behind a queue that is measured in pixels."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
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
    """What a job is told when its turn comes: seconds it has waited, and whether it has the machine to itself."""

    queued: float
    alone: bool


@dataclass(frozen=True, slots=True)
class Job:
    """Work on `pixels` pixels; `work` runs on a worker's thread and its result becomes the future's.

    Attributes:
        pixels: what it counts for in the queue.
        work: a function of the job's turn.
        in_steps: `work` is a generator function; what it returns is the result. It is sent the next turn where it
            yields, when others have had theirs; there it can be cancelled, and its deadline can pass.
    """

    pixels: int
    work: Callable[[Turn], Any]
    in_steps: bool = False


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
    waited: float = 0.0
    steps: Generator[None, Turn, Any] | None = None

    def close(self) -> None:
        """Let go of what a job in steps holds."""
        if self.steps is not None:
            self.steps.close()


class Scheduler:
    """Runs jobs first come, first served on `workers` threads; those in steps go to the end after each.

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
            queued = entry in self._queue
            if queued:  # otherwise a worker has just taken it, and finds it cancelled
                self._queue.remove(entry)
                self._counters.queued -= 1
                self._end(entry, "cancelled")
        if queued:
            entry.close()

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            entry, alone = taken
            started = time.monotonic()
            entry.waited += started - entry.entered
            outcome, deliver = self._run(entry, Turn(entry.waited, alone), started)
            with self._lock:
                self._counters.running -= 1
                if outcome == "paused":
                    outcome, deliver = self._pause(entry)
                elif outcome == "finished" and not entry.job.in_steps:
                    self._timed_pixels = _MEMORY * self._timed_pixels + entry.job.pixels
                    self._timed_seconds = _MEMORY * self._timed_seconds + time.monotonic() - started
                if outcome != "paused":
                    self._end(entry, outcome)
            deliver()  # after the counting, so that whoever has an answer finds it counted
            if outcome != "paused":
                entry.close()
            del taken, entry, deliver  # an idle worker must not keep the last image alive

    def _pause(self, entry: _Entry) -> tuple[str, Callable[[], object]]:
        """Queue a job in steps again, behind the others, unless it is not wanted any more."""
        if self._closed or entry.future.cancelled():
            return "cancelled", entry.future.cancel
        entry.entered = time.monotonic()
        self._counters.queued += 1
        self._queue.append(entry)
        self._arrived.notify()
        return "paused", lambda: None

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

    def _run(self, entry: _Entry, turn: Turn, now: float) -> tuple[str, Callable[[], object]]:
        """The outcome, or "paused" where there are more steps, and what tells the future of it."""
        future = entry.future
        if future.cancelled() or not (entry.job.in_steps or future.set_running_or_notify_cancel()):
            return "cancelled", lambda: None
        if now >= entry.deadline:
            where = "queued" if entry.steps is None else "worked on"
            return _told(future, "expired", DeadlinePassed(f"the deadline passed while the image was {where}"))
        try:
            if entry.job.in_steps:
                return self._step(entry, turn)
            return "finished", partial(future.set_result, entry.job.work(turn))
        except BaseException as error:  # whatever it is, it is the caller's: the worker goes on
            return _told(future, "failed", error)

    def _step(self, entry: _Entry, turn: Turn) -> tuple[str, Callable[[], object]]:
        """As `_run`, of a job in steps; raises what the job raises."""
        try:
            if entry.steps is None:
                entry.steps = entry.job.work(turn)
                next(entry.steps)
            else:
                entry.steps.send(turn)
        except StopIteration as end:
            return _told(entry.future, "finished", result=end.value)
        return "paused", lambda: None

    def _end(self, entry: _Entry, outcome: str) -> None:
        setattr(self._counters, outcome, getattr(self._counters, outcome) + 1)
        self._counters.pixels_in_flight -= entry.job.pixels
        if self._is_empty():
            self._emptied.notify_all()

    def _is_empty(self) -> bool:
        return not self._counters.queued and not self._counters.running


def _told(
    future: Future[Any], outcome: str, error: BaseException | None = None, result: Any = None
) -> tuple[str, Callable[[], object]]:
    """The outcome and what tells the future of it, which may have been cancelled until now."""
    if not future.running() and not future.set_running_or_notify_cancel():
        return "cancelled", lambda: None
    if error is not None:
        return outcome, partial(future.set_exception, error)
    return outcome, partial(future.set_result, result)


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:.3g} megapixels"
