"""Who is admitted, and when it is worked on: workers behind stages.Stages with budgets of pixels and of memory."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Final

from fullframe.engine.jobs import Budget, Counters, Job, Taken, Turn
from fullframe.engine.stages import Entry, Stages, Task
from fullframe.errors import DeadlinePassed, InvalidInput, Overloaded, Unavailable

SHUTTING_DOWN: Final = "shutting down: ask another server, or this one later"

_FIRST_RATE: Final = 2e6  # pixels a second on one worker, assumed until jobs have been timed
_DECAY: Final = 0.95  # how much of the past each new timing leaves in the rate
_SHORTEST_RETRY: Final = 0.1  # seconds
_EARLY: Final = 0.02  # seconds before its deadline that a caller who gives up then may be heard

_Outcome = tuple[str, Callable[[], object]]
"""The name of a counter, or one of _UNENDED, and what tells the future."""


class Scheduler:
    """Runs jobs first come, first served on `workers` threads; those in steps go to the end after each.

    Args:
        workers: jobs worked on at once.
        budget: what the jobs in flight may take together; a request beyond that is refused whole.
        batches, ready: as Stages', of jobs that are worked on together.
    """

    def __init__(self, workers: int, budget: Budget, *, batches: int = 2, ready: int = 2**62) -> None:
        self._workers, self._budget = workers, budget
        self._no_jobs = partial(Taken, workers, batches, ready)
        self._taken = self._no_jobs()
        self._stages = Stages(batches, ready)
        self._counters = Counters()
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
        """Queue all of `jobs` or none; cancelling a future whose job waits frees its room at once.

        Args:
            deadline: the time.monotonic() instant after which no answer is wanted; a job that then waits fails with
                DeadlinePassed.

        Raises:
            InvalidInput: the jobs together could never be admitted.
            Overloaded: there is no room for them now.
            Unavailable: draining.
        """
        entries = [Entry(job, float("inf") if deadline is None else deadline) for job in jobs]
        with self._lock:
            self._admit(jobs)
            self._counters.created += len(entries)
            self._counters.queued += len(entries)
            self._stages.add(entries)
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
        """Cancel what waits and end the workers once they finish what they run."""
        with self._lock:
            self._draining = self._closed = True
            waiting = [entry.future for entry in self._stages.waiting()]
        for future in waiting:
            future.cancel()
        with self._lock:
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join()

    def _admit(self, jobs: Sequence[Job]) -> None:
        if self._draining:
            raise Unavailable(SHUTTING_DOWN)
        for needed, most, text in zip(self._no_jobs(jobs).total(), self._budget, _TEXTS, strict=True):
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

    def _drop_if_cancelled(self, entry: Entry, future: Future[Any]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            waited = self._stages.remove(entry)
            if waited is None:  # a worker has it, and finds it cancelled
                return
            if waited == "ready":
                self._counters.ready -= 1
            else:
                self._counters.queued -= 1
            self._arrived.notify_all()  # who waited for it, for its room or, closing, for the last to leave
            self._end(entry, "cancelled")
        entry.close()

    def _serve(self) -> None:
        while (taken := self._take()) is not None:
            task, alone = taken
            entries = task.entries
            started = time.monotonic()
            for entry in entries:
                entry.waited += started - entry.entered
            outcomes = self._run_batch(entries) if task.stage == "batch" else [self._run(entries[0], alone)]
            seconds = (time.monotonic() - started) / len(entries)
            with self._lock:
                outcomes = [self._settle(entry, *each, seconds) for entry, each in zip(entries, outcomes, strict=True)]
                self._stages.ended(task, outcomes[0][0] == "ready")
            # After the counting, so that whoever has an answer finds it counted.
            for entry, (outcome, deliver) in zip(entries, outcomes, strict=True):
                deliver()
                if outcome not in _UNENDED:
                    entry.close()
            del taken, task, entries, entry, outcomes, deliver  # an idle worker must not keep the last image alive

    def _take(self) -> tuple[Task, bool] | None:
        """What to do next, and whether it has the machine to itself; None: no more will come."""
        with self._lock:
            while (task := self._stages.take()) is None:
                if self._closed and not self._stages.waiting():
                    return None
                self._arrived.wait()
            count = len(task.entries)
            self._counters.running += count
            if task.stage == "batch":
                self._counters.ready -= count
            else:
                self._counters.queued -= count
            if task.stage == "whole":
                return task, self._counters.running == 1 and not self._stages.any_next()
            if self._stages.any_next():
                self._arrived.notify()  # what ended or begins here may have made room for more than one
            return task, False

    def _run(self, entry: Entry, alone: bool) -> _Outcome:
        """The outcome of a job, of its next step or of its preparation, and what tells the future of it."""
        job = entry.job
        if (outcome := _unwanted(entry, begins=not job.in_steps and job.together is None)) is not None:
            return outcome
        try:
            turn = Turn(entry.waited, alone)
            if job.in_steps:
                return self._step(entry, turn)
            result = job.work(turn)
        except BaseException as error:  # whatever it is, it is the caller's: the worker goes on
            return _told(entry.future, "failed", error)
        if job.together is None:
            return _told(entry.future, "finished", result=result)
        entry.prepared = result
        return "ready", _nothing

    def _step(self, entry: Entry, turn: Turn) -> _Outcome:
        """As `_run`, of a job in steps; raises what the job raises."""
        try:
            if entry.steps is None:
                entry.steps = entry.job.work(turn)
                next(entry.steps)
            else:
                entry.steps.send(turn)
        except StopIteration as end:
            return _told(entry.future, "finished", result=end.value)
        return "paused", _nothing

    def _run_batch(self, entries: Sequence[Entry]) -> list[_Outcome]:
        """The outcomes of jobs that are ready, worked on together."""
        outcomes = [_unwanted(entry, begins=True) for entry in entries]
        wanted = [entry for entry, outcome in zip(entries, outcomes, strict=True) if outcome is None]
        together = entries[0].job.together
        assert together is not None
        try:
            results = list(together.work([entry.prepared for entry in wanted])) if wanted else []
        except BaseException as error:
            results = [error] * len(wanted)
        found = (
            _told(entry.future, "failed", result)
            if isinstance(result, BaseException)
            else _told(entry.future, "finished", result=result)
            for entry, result in zip(wanted, results, strict=True)
        )
        return [next(found) if outcome is None else outcome for outcome in outcomes]

    def _settle(self, entry: Entry, outcome: str, deliver: Callable[[], object], seconds: float) -> _Outcome:
        """Count what became of a job; returns the same, or what it has become since."""
        self._counters.running -= 1
        entry.worked += seconds
        if entry.wide:
            self._arrived.notify()  # another such may have waited for it
        if outcome in _UNENDED:
            outcome, deliver = self._go_on(entry, outcome)
        elif outcome == "finished" and not entry.job.in_steps:
            self._timed_pixels = _DECAY * self._timed_pixels + entry.job.pixels
            self._timed_seconds = _DECAY * self._timed_seconds + entry.worked
        if outcome not in _UNENDED:
            self._end(entry, outcome)
        return outcome, deliver

    def _go_on(self, entry: Entry, outcome: str) -> _Outcome:
        """Count a job that is to wait again, unless it is not wanted any more."""
        if self._closed or entry.future.cancelled():
            return "cancelled", entry.future.cancel
        entry.entered = time.monotonic()
        if entry.entered >= entry.deadline:
            return _late(entry)
        if outcome == "ready":
            self._counters.ready += 1
        else:
            self._counters.queued += 1
            self._stages.add([entry])
            self._arrived.notify()
        return outcome, _nothing

    def _end(self, entry: Entry, outcome: str) -> None:
        if outcome == "cancelled" and time.monotonic() >= entry.deadline - _EARLY:
            outcome = "expired"
        setattr(self._counters, outcome, getattr(self._counters, outcome) + 1)
        self._taken.remove(entry.job)
        if self._is_empty():
            self._emptied.notify_all()

    def _is_empty(self) -> bool:
        return not (self._counters.queued or self._counters.running or self._counters.ready)


def _unwanted(entry: Entry, begins: bool) -> _Outcome | None:
    """What became of a job whose turn has come, if nobody waits for it; once it `begins` it can't be cancelled."""
    if entry.future.cancelled():
        return "cancelled", _nothing
    if time.monotonic() >= entry.deadline:
        return _late(entry)
    if begins and not entry.future.set_running_or_notify_cancel():
        return "cancelled", _nothing
    return None


def _late(entry: Entry) -> _Outcome:
    where = "worked on" if entry.worked else "queued"
    return _told(entry.future, "expired", DeadlinePassed(f"the deadline passed while the image was {where}"))


def _told(future: Future[Any], outcome: str, error: BaseException | None = None, result: Any = None) -> _Outcome:
    """The outcome and what tells the future of it, which may have been cancelled until now."""
    if not future.running() and not future.set_running_or_notify_cancel():
        return "cancelled", _nothing
    if error is not None:
        return outcome, partial(future.set_exception, error)
    return outcome, partial(future.set_result, result)


def _nothing() -> None:
    """There is nobody to tell."""


def _millions(number: int) -> str:
    """To three digits, in plain figures."""
    return f"{float(f'{number / 1e6:.3g}'):,.12g}"


_UNENDED: Final = ("paused", "ready")
"""Outcomes of a job that has another turn."""

_TEXTS: Final[tuple[Callable[[int], str], ...]] = (
    lambda pixels: f"{_millions(pixels)} megapixels",
    lambda count: f"{_millions(count)} MB of memory",
)
