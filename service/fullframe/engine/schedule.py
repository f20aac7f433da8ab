"""Which image is worked on next: a bounded pool of workers behind a queue with budgets of pixels and of memory."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Final

from fullframe.engine.jobs import Budget, Counters, Job, Taken, Turn
from fullframe.errors import DeadlinePassed, InvalidInput, Overloaded, Unavailable

SHUTTING_DOWN: Final = "shutting down: ask another server, or this one later"

_FIRST_RATE: Final = 2e6  # pixels a second on one worker, assumed until jobs have been timed
_DECAY: Final = 0.95  # how much of the past each new timing leaves in the rate
_SHORTEST_RETRY: Final = 0.1  # seconds
_EARLY: Final = 0.02  # seconds before its deadline that a caller who gives up then may be heard
_CANDIDATES: Final = 256  # jobs looked at for company: enough for a good choice, and soon done


@dataclass(slots=True, eq=False)
class _Entry:
    job: Job
    deadline: float
    future: Future[Any] = field(default_factory=Future)
    entered: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    steps: Generator[None, Turn, Any] | None = None
    prepared: Any = None

    @property
    def wide(self) -> bool:
        return self.job.wide or self.job.in_steps

    def close(self) -> None:
        """Let go of the image: the future, which others may keep, holds this by its callback."""
        if self.steps is not None:
            self.steps.close()
        del self.job, self.steps


_Outcome = tuple[str, Callable[[], object]]
"""The name of a counter, and what tells the future."""


class Scheduler:
    """Runs jobs first come, first served on `workers` threads; those in steps go to the end after each.

    Args:
        workers: jobs worked on at once.
        budget: what the jobs queued and running may take together; a request beyond that is refused whole.
    """

    def __init__(self, workers: int, budget: Budget) -> None:
        self._workers, self._budget = workers, budget
        self._taken = Taken(workers)
        self._wide_runs = False
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
        entries = [_Entry(job, float("inf") if deadline is None else deadline) for job in jobs]
        with self._lock:
            self._admit(jobs)
            self._counters.created += len(entries)
            self._counters.queued += len(entries)
            self._queue.extend(entries)
            self._arrived.notify(len(entries))
        for entry in entries:
            entry.future.add_done_callback(partial(self._drop_if_cancelled, entry))
        return [entry.future for entry in entries]

    def counters(self) -> Counters:
        """A consistent copy of the counts at this moment."""
        with self._lock:
            pixels, memory = self._taken.total()
            return replace(self._counters, pixels_in_flight=pixels, memory_in_flight=memory)

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
        with self._lock:
            self._arrived.notify_all()  # for those that waited for a wide job's turn
        for thread in self._threads:
            thread.join()

    def _admit(self, jobs: Sequence[Job]) -> None:
        if self._draining:
            raise Unavailable(SHUTTING_DOWN)
        for needed, most, text in zip(Taken(self._workers, jobs).total(), self._budget, _TEXTS, strict=True):
            if needed > most:
                rather = "send its images in several requests" if len(jobs) > 1 else "send a smaller image"
                raise InvalidInput(
                    f"the request takes {text(needed)}; at most {text(most)} can be in flight: {rather}", "images"
                )
        before = self._taken.total()
        for job in jobs:
            self._taken.add(job)
        after = self._taken.total()
        for held, needed, most, text in zip(before, after, self._budget, _TEXTS, strict=True):
            if needed > most:
                for job in jobs:
                    self._taken.remove(job)
                self._counters.refused += 1
                rate = self._timed_pixels / self._timed_seconds * self._workers
                raise Overloaded(
                    f"{text(held)} of {text(most)} are in flight: no room for {text(needed - held)} now",
                    # As long as so large a share of the pixels takes.
                    retry_after=max(_SHORTEST_RETRY, (needed - most) / needed * after.pixels / rate),
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
            entries, alone = taken
            started = time.monotonic()
            for entry in entries:
                entry.waited += started - entry.entered
            outcomes = self._run_together(entries) if entries[0].job.together else [self._run(entries[0], alone)]
            seconds = (time.monotonic() - started) / len(entries)
            with self._lock:
                outcomes = [self._settle(entry, *each, seconds) for entry, each in zip(entries, outcomes, strict=True)]
            # After the counting, so that whoever has an answer finds it counted.
            for entry, (outcome, deliver) in zip(entries, outcomes, strict=True):
                deliver()
                if outcome != "paused":
                    entry.close()
            del taken, entries, entry, outcomes, deliver  # an idle worker must not keep the last image alive

    def _settle(self, entry: _Entry, outcome: str, deliver: Callable[[], object], seconds: float) -> _Outcome:
        """Count what became of a job; returns the same, or what it has become since."""
        self._counters.running -= 1
        if entry.wide:
            self._wide_runs = False
            self._arrived.notify()  # another such may have waited for it
        if outcome == "paused":
            outcome, deliver = self._pause(entry)
        elif outcome == "finished" and not entry.job.in_steps:
            self._timed_pixels = _DECAY * self._timed_pixels + entry.job.pixels
            self._timed_seconds = _DECAY * self._timed_seconds + seconds
        if outcome != "paused":
            self._end(entry, outcome)
        return outcome, deliver

    def _pause(self, entry: _Entry) -> _Outcome:
        """Queue a job in steps again, behind the others, unless it is not wanted any more."""
        if self._closed or entry.future.cancelled():
            return "cancelled", entry.future.cancel
        entry.entered = time.monotonic()
        self._counters.queued += 1
        self._queue.append(entry)
        self._arrived.notify()
        return "paused", lambda: None

    def _take(self) -> tuple[list[_Entry], bool] | None:
        """The next job, those that go with it, and whether it has the machine to itself; None: no more will come."""
        with self._lock:
            while (entry := self._next()) is None:
                if self._closed and not self._queue:
                    return None
                self._arrived.wait()
            entries = [entry, *self._companions(entry)]
            for each in entries:
                self._queue.remove(each)
            self._counters.queued -= len(entries)
            self._counters.running += len(entries)
            self._wide_runs |= entry.wide
            return entries, self._counters.running == 1 and self._next() is None

    def _companions(self, entry: _Entry) -> list[_Entry]:
        together = entry.job.together
        if together is None:
            return []
        alike = (each for each in self._queue if each.job.together is together and each is not entry)
        others = list(islice(alike, _CANDIDATES))
        return [others[number] for number in together.choose(entry.job, [each.job for each in others])]

    def _next(self) -> _Entry | None:
        """The first in the queue that may run now."""
        return next((entry for entry in self._queue if not (entry.wide and self._wide_runs)), None)

    def _run_together(self, entries: Sequence[_Entry]) -> list[_Outcome]:
        """Each is prepared by itself, so that it can fail alone; those that are ready are worked on together."""
        outcomes = [self._run(entry, alone=False) for entry in entries]
        ready = [number for number, (outcome, _) in enumerate(outcomes) if outcome == "ready"]
        together = entries[0].job.together
        assert together is not None
        try:
            results = list(together.work([entries[number].prepared for number in ready])) if ready else []
        except BaseException as error:
            results = [error] * len(ready)
        for number, result in zip(ready, results, strict=True):
            entry = entries[number]
            entry.prepared = None
            failed = isinstance(result, BaseException)
            outcomes[number] = (
                _told(entry.future, "failed", result) if failed else _told(entry.future, "finished", result=result)
            )
        return outcomes

    def _run(self, entry: _Entry, alone: bool) -> _Outcome:
        """The outcome, or "paused" where there are more steps and "ready" where it is prepared, and what tells the
        future of it."""
        future, now = entry.future, time.monotonic()
        if future.cancelled() or not (entry.job.in_steps or future.set_running_or_notify_cancel()):
            return "cancelled", lambda: None
        if now >= entry.deadline:
            where = "queued" if entry.steps is None else "worked on"
            return _told(future, "expired", DeadlinePassed(f"the deadline passed while the image was {where}"))
        try:
            turn = Turn(entry.waited, alone)
            if entry.job.in_steps:
                return self._step(entry, turn)
            result = entry.job.work(turn)
            if entry.job.together is not None:
                entry.prepared = result
                return "ready", lambda: None
            return "finished", partial(future.set_result, result)
        except BaseException as error:  # whatever it is, it is the caller's: the worker goes on
            return _told(future, "failed", error)

    def _step(self, entry: _Entry, turn: Turn) -> _Outcome:
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
        if outcome == "cancelled" and time.monotonic() >= entry.deadline - _EARLY:
            outcome = "expired"
        setattr(self._counters, outcome, getattr(self._counters, outcome) + 1)
        self._taken.remove(entry.job)
        if self._is_empty():
            self._emptied.notify_all()

    def _is_empty(self) -> bool:
        return not self._counters.queued and not self._counters.running


def _told(future: Future[Any], outcome: str, error: BaseException | None = None, result: Any = None) -> _Outcome:
    """The outcome and what tells the future of it, which may have been cancelled until now."""
    if not future.running() and not future.set_running_or_notify_cancel():
        return "cancelled", lambda: None
    if error is not None:
        return outcome, partial(future.set_exception, error)
    return outcome, partial(future.set_result, result)


_TEXTS: Final[tuple[Callable[[int], str], ...]] = (
    lambda pixels: f"{pixels / 1e6:.3g} megapixels",
    lambda count: f"{count / 1e6:.3g} MB of memory",
)
