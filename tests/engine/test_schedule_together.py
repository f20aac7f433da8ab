"""Jobs that one worker takes together: the same order, deadlines, cancellation and counters as jobs alone."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullframe.engine.jobs import Budget, Job
from fullframe.engine.schedule import Scheduler
from fullframe.errors import DeadlinePassed


@dataclass(eq=False)
class Doubling:
    """Doubles numbers, jobs of the same height at once; -1 can't be prepared, 13 not doubled, 7 ruins all."""

    groups: list[list[int]] = field(default_factory=list)
    most: int = 100
    begun: threading.Event = field(default_factory=threading.Event)
    go: threading.Event | None = None

    def choose(self, first: Job, others: Sequence[Job]) -> list[int]:
        return [number for number, job in enumerate(others) if job.shape[0] == first.shape[0]][: self.most - 1]

    def work(self, prepared: Sequence[int]) -> list[Any]:
        self.groups.append(list(prepared))
        self.begun.set()
        assert self.go is None or self.go.wait(30)
        if 7 in prepared:
            raise OverflowError("all of it")
        return [ValueError("unlucky") if number == 13 else 2 * number for number in prepared]

    def job(self, number: int, height: int = 1, pixels: int = 1) -> Job:
        def prepare(turn: object) -> int:
            if number == -1:
                raise KeyError("not to be had")
            return number

        return Job(pixels, prepare, together=self, shape=(height, 1))


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(workers=1, budget=Budget(1000))
    yield made
    made.close()
    counters = made.counters()
    assert counters.created == counters.finished + counters.failed + counters.cancelled + counters.expired
    assert (counters.queued, counters.running, counters.pixels_in_flight) == (0, 0, 0)


def hold(scheduler: Scheduler) -> threading.Event:
    """Keep the one worker busy until the event is set."""
    running, go = threading.Event(), threading.Event()

    def wait(turn: object) -> None:
        running.set()
        assert go.wait(30)

    scheduler.submit([Job(1, wait)])
    assert running.wait(10)
    return go


def test_jobs_that_fit_go_together_and_others_keep_their_place(scheduler: Scheduler) -> None:
    doubling, other, order = Doubling(), Doubling(), []
    go = hold(scheduler)
    jobs = [doubling.job(1), other.job(2), Job(1, lambda turn: order.append(len(doubling.groups))), doubling.job(3)]
    futures = scheduler.submit([*jobs, doubling.job(4, height=2), doubling.job(5)])
    go.set()
    assert [future.result(10) for future in futures] == [2, 4, None, 6, 8, 10]
    assert doubling.groups == [[1, 3, 5], [4]]
    assert other.groups == [[2]]
    assert order == [1]


def test_each_fails_alone_while_it_is_prepared_and_after(scheduler: Scheduler) -> None:
    doubling = Doubling()
    go = hold(scheduler)
    futures = scheduler.submit([doubling.job(number) for number in (1, -1, 13, 4)])
    go.set()
    assert futures[0].result(10) == 2
    with pytest.raises(KeyError):
        futures[1].result(10)
    with pytest.raises(ValueError, match="unlucky"):
        futures[2].result(10)
    assert futures[3].result(10) == 8
    assert doubling.groups == [[1, 13, 4]]
    assert scheduler.counters().failed == 2


def test_what_fails_all_of_them_ends_with_them(scheduler: Scheduler) -> None:
    doubling = Doubling()
    go = hold(scheduler)
    futures = scheduler.submit([doubling.job(number) for number in (1, 7)])
    go.set()
    for future in futures:
        with pytest.raises(OverflowError):
            future.result(10)
    assert scheduler.submit([doubling.job(9)])[0].result(10) == 18, "the worker goes on"


def test_those_that_are_late_or_cancelled_are_left_out(scheduler: Scheduler) -> None:
    doubling = Doubling()
    go = hold(scheduler)
    [first] = scheduler.submit([doubling.job(1)])
    [late] = scheduler.submit([doubling.job(2)], deadline=time.monotonic() + 0.01)
    [cancelled, last] = scheduler.submit([doubling.job(3), doubling.job(4)])
    assert cancelled.cancel()
    time.sleep(0.02)
    go.set()
    assert (first.result(10), last.result(10)) == (2, 8)
    with pytest.raises(DeadlinePassed):
        late.result(10)
    with pytest.raises(CancelledError):
        cancelled.result(10)
    assert doubling.groups == [[1, 4]]
    counters = scheduler.counters()
    assert (counters.expired, counters.cancelled, counters.finished) == (1, 1, 3)


def test_all_of_them_count_while_they_run(scheduler: Scheduler) -> None:
    doubling = Doubling(go=threading.Event())
    go = hold(scheduler)
    futures = scheduler.submit([doubling.job(number, pixels=10) for number in range(5)])
    go.set()
    assert doubling.begun.wait(10)
    counters = scheduler.counters()
    assert (counters.running, counters.queued, counters.pixels_in_flight) == (5, 0, 50)
    assert not any(future.cancel() for future in futures)
    assert doubling.go is not None
    doubling.go.set()
    assert [future.result(10) for future in futures] == [0, 2, 4, 6, 8]


@given(st.lists(st.tuples(st.integers(-1, 15), st.integers(1, 3), st.booleans()), max_size=30), st.integers(1, 3))
def test_the_counters_always_add_up(wanted: list[tuple[int, int, bool]], workers: int) -> None:
    doubling = Doubling(most=4)
    scheduler = Scheduler(workers, Budget(1000))
    futures: list[Future[int]] = []
    for number, height, cancel in wanted:
        futures += scheduler.submit([doubling.job(number, height, pixels=number + 2)])
        if cancel:
            futures[-1].cancel()
    assert scheduler.drain(30)
    counters = scheduler.counters()
    scheduler.close()
    cancelled = sum(future.cancelled() for future in futures)
    failed = sum(not future.cancelled() and future.exception() is not None for future in futures)
    assert (counters.created, counters.cancelled, counters.failed) == (len(wanted), cancelled, failed)
    assert counters.finished == len(wanted) - cancelled - failed
    assert (counters.queued, counters.running, counters.pixels_in_flight) == (0, 0, 0)
    assert max(map(len, doubling.groups), default=0) <= 4
