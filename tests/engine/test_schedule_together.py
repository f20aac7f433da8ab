"""Jobs that are worked on together: the same order, deadlines, cancellation and counters as jobs alone."""

import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullframe.engine.jobs import Budget, Counters, Job
from fullframe.engine.schedule import Scheduler
from fullframe.errors import DeadlinePassed
from tests.serving import eventually


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

    def job(self, number: int, height: int = 1, pixels: int = 1, held: int = 0, seconds: float = 0) -> Job:
        def prepare(turn: object) -> int:
            time.sleep(seconds)
            if number == -1:
                raise KeyError("not to be had")
            return number

        return Job(pixels, prepare, together=self, shape=(height, 1), held=held)


def assert_all_ended(scheduler: Scheduler) -> Counters:
    """Nothing is in flight, and each job came to one end."""
    c = scheduler.counters()
    assert c.created == c.finished + c.failed + c.cancelled + c.expired
    assert (c.queued, c.running, c.ready, c.pixels_in_flight, c.memory_in_flight) == (0, 0, 0, 0, 0)
    return c


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(workers=1, budget=Budget(1000))
    yield made
    made.close()
    assert_all_ended(made)


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


# -- the stages: prepared by any worker, ready, worked on together


class Held(Doubling):
    """Each number's preparation, and each batch, says that it runs and waits to be let go."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(go=threading.Event())
        self.preparing = {number: threading.Event() for number in numbers}
        self.prepare = {number: threading.Event() for number in numbers}
        self.prepared: list[int] = []

    def job(self, number: int, height: int = 1, pixels: int = 1, held: int = 0, seconds: float = 0) -> Job:
        def prepare(turn: object) -> int:
            if number in self.prepare:
                self.preparing[number].set()
                assert self.prepare[number].wait(30)
            self.prepared.append(number)
            return number

        return Job(pixels, prepare, together=self, shape=(height, 1), held=held)

    def let_go(self) -> None:
        assert self.go is not None
        self.go.set()
        for event in self.prepare.values():
            event.set()


@contextmanager
def stages(workers: int, *, ready: int = 2**62) -> Iterator[Scheduler]:
    """A scheduler of one batch at a time."""
    made = Scheduler(workers, Budget(1000), batches=1, ready=ready)
    try:
        yield made
        assert made.drain(30)
    finally:
        made.close()
    assert_all_ended(made)


def is_busy(scheduler: Scheduler, doubling: Doubling, number: int) -> Future[int]:
    """The future of a job that is worked on, by itself."""
    [future] = scheduler.submit([doubling.job(number)])
    assert doubling.begun.wait(10)
    return future


def test_the_next_are_prepared_while_one_batch_is_worked_on_and_go_together() -> None:
    with stages(workers=2) as scheduler:
        held = Held(2)
        first = is_busy(scheduler, held, 1)
        rest = [future for number in (2, 3, 4) for future in scheduler.submit([held.job(number)])]
        assert held.preparing[2].wait(10) and not first.done()
        held.prepare[2].set()
        eventually(lambda: scheduler.counters().ready == 3)
        counters = scheduler.counters()
        assert (counters.running, counters.queued) == (1, 0)
        held.let_go()
        assert [future.result(10) for future in (first, *rest)] == [2, 4, 6, 8]
        assert held.groups == [[1], [2, 3, 4]]


@pytest.mark.parametrize(("ready", "most"), [(25, 2), (2**62, 6)])
def test_preparing_stops_while_enough_are_ready(ready: int, most: int) -> None:
    """And with room for all, all are."""
    with stages(workers=3, ready=ready) as scheduler:
        held = Held()
        futures = [is_busy(scheduler, held, 0)]
        futures += scheduler.submit([held.job(number, held=10) for number in range(1, 7)])
        eventually(lambda: scheduler.counters().ready == most)
        counters = scheduler.counters()
        assert (counters.running, counters.queued) == (1, 6 - most)
        assert len(held.prepared) == 1 + most
        held.let_go()
        assert [future.result(10) for future in futures] == [0, 2, 4, 6, 8, 10, 12]


def test_a_batch_that_begins_makes_room_for_the_next_to_be_prepared() -> None:
    with stages(workers=3, ready=10) as scheduler:
        held, next_one = Held(), Held()
        futures = [is_busy(scheduler, held, 1)]
        futures += scheduler.submit([next_one.job(number, height=number, held=10) for number in (2, 3)])
        eventually(lambda: scheduler.counters().ready == 1)
        held.let_go()
        assert next_one.begun.wait(10)
        eventually(lambda: next_one.prepared == [2, 3])
        assert next_one.groups == [[2]]
        next_one.let_go()
        assert [future.result(10) for future in futures] == [2, 4, 6]


def test_nobody_waits_for_those_that_came_later_or_do_not_go_with_it() -> None:
    with stages(workers=3) as scheduler:
        held = Held(1, 2, 3)
        assert held.go is not None
        held.go.set()
        [first, other] = scheduler.submit([held.job(1), held.job(2, height=2)])
        assert held.preparing[1].wait(10)
        [later] = scheduler.submit([held.job(3)])
        assert held.preparing[2].wait(10) and held.preparing[3].wait(10)
        held.prepare[1].set()
        assert first.result(10) == 2
        assert not other.done() and not later.done()
        held.let_go()


def test_who_came_with_others_waits_for_them_unless_they_fail() -> None:
    with stages(workers=3) as scheduler:
        held, go = Held(2), [hold(scheduler) for _ in range(3)]
        assert held.go is not None
        held.go.set()
        [first, second, failing] = scheduler.submit([held.job(1), held.job(2), Doubling.job(held, -1)])
        for each in go:
            each.set()
        assert held.preparing[2].wait(10)
        eventually(lambda: scheduler.counters().failed == scheduler.counters().ready == 1)
        assert not first.done()
        held.let_go()
        assert (first.result(10), second.result(10)) == (2, 4)
        assert held.groups == [[1, 2]]
        with pytest.raises(KeyError):
            failing.result(10)


def test_a_ready_one_that_is_cancelled_leaves_at_once_with_all_that_it_holds() -> None:
    class Pixels:
        pass

    held, made = Held(), list[Any]()

    def prepare(turn: object) -> Pixels:
        pixels = Pixels()
        made.append(weakref.ref(pixels))
        return pixels

    with stages(workers=2, ready=10) as scheduler:
        first = is_busy(scheduler, held, 1)
        [unwanted] = scheduler.submit([Job(7, prepare, together=held, held=10)])
        eventually(lambda: scheduler.counters().ready == 1)
        [last] = scheduler.submit([held.job(2, held=10)])
        time.sleep(0.05)  # the other worker has found that there is no room for it
        assert (scheduler.counters().queued, held.prepared) == (1, [1])
        assert unwanted.cancel()
        counters = scheduler.counters()
        assert (counters.cancelled, counters.pixels_in_flight) == (1, 2)
        eventually(lambda: scheduler.counters().ready == 1)  # the last has its room
        assert made[0]() is None and held.prepared == [1, 2]
        held.let_go()
        assert (first.result(10), last.result(10)) == (2, 4)


def test_deadlines_and_cancellation_are_heard_between_the_stages() -> None:
    with stages(workers=4) as scheduler:
        held = Held(2, 3)
        first = is_busy(scheduler, held, 1)
        [cancelled] = scheduler.submit([held.job(2)])
        soon = time.monotonic() + 0.5
        [slow] = scheduler.submit([held.job(3)], soon)
        [late] = scheduler.submit([held.job(4)], soon)
        assert held.preparing[2].wait(10) and held.preparing[3].wait(10)
        eventually(lambda: scheduler.counters().ready == 1)
        assert cancelled.cancel()
        time.sleep(max(0.0, soon - time.monotonic()))
        held.prepare[2].set()
        held.prepare[3].set()
        eventually(lambda: scheduler.counters().cancelled == 1)
        with pytest.raises(DeadlinePassed, match="while the image was worked on"):
            slow.result(10)
        held.let_go()
        with pytest.raises(DeadlinePassed, match="while the image was worked on"):
            late.result(10)
        assert first.result(10) == 2
        assert held.groups == [[1]] and sorted(held.prepared) == [1, 2, 3, 4]
        assert scheduler.drain(10)
        assert (scheduler.counters().cancelled, scheduler.counters().expired) == (1, 2)


def test_draining_waits_for_what_is_ready_and_closing_cancels_it() -> None:
    for closing in (False, True):
        scheduler, held = Scheduler(2, Budget(1000), batches=1), Held(3)
        first = is_busy(scheduler, held, 1)
        ready, preparing = scheduler.submit([held.job(2, height=2)]) + scheduler.submit([held.job(3)])
        assert held.preparing[3].wait(10)
        assert not scheduler.drain(0.01)
        if closing:
            threading.Timer(0.05, held.let_go).start()
            scheduler.close()
            assert ready.cancelled() and preparing.cancelled() and first.result(0) == 2
        else:
            held.let_go()
            assert scheduler.drain(10)
            assert [future.result(1) for future in (first, ready, preparing)] == [2, 4, 6]
            scheduler.close()
        assert_all_ended(scheduler)


def test_memory_counts_the_batches_that_may_run_and_what_may_be_ready() -> None:
    """Two batches of all the jobs that claim one each, the largest; of 6 times 10 bytes no more than are let in."""
    scheduler, held = Scheduler(4, Budget(1000), batches=2, ready=25), Held()
    first = is_busy(scheduler, held, 1)
    jobs = [Job(1, lambda turn: 5, together=held, shape=(9, 1), memory=100 + n, held=10) for n in range(6)]
    futures = scheduler.submit(jobs)
    assert scheduler.counters().memory_in_flight == 105 + 104 + 25
    futures += scheduler.submit([Job(1, lambda turn: 0, memory=200, wide=True), Job(1, lambda turn: 0, memory=1)])
    assert scheduler.counters().memory_in_flight == 200 + 105 + 104 + 1 + 25
    held.let_go()
    for future in (first, *futures):
        future.result(10)
    scheduler.close()
    assert scheduler.counters().memory_in_flight == 0


def test_a_job_in_steps_goes_on_beside_a_stream_of_batches() -> None:
    with stages(workers=2) as scheduler:
        doubling, went_on = Doubling(most=2), threading.Event()

        def work(turn: object) -> Generator[None, object, str]:
            for _ in range(20):
                yield
            went_on.set()
            return "huge"

        [huge] = scheduler.submit([Job(1, work, in_steps=True)])
        futures = []
        while not went_on.is_set():
            futures += scheduler.submit([doubling.job(number) for number in (1, 2, 3)])
            futures[-1].result(10)
        assert huge.result(10) == "huge"


fates = st.tuples(
    st.integers(-1, 15),  # the number: see Doubling
    st.integers(1, 3),
    st.sampled_from(["", "", "cancel", "cancel later", "late", "soon", "alone"]),
    st.sampled_from([0, 0.0002, 0.002]),  # seconds that preparing takes
)


@given(st.lists(fates, max_size=30), st.integers(1, 3), st.integers(1, 2), st.sampled_from([0, 20, 2**62]))
def test_the_counters_add_up_at_every_instant(
    wanted: list[tuple[int, int, str, float]], workers: int, batches: int, ready: int
) -> None:
    doubling, scheduler = Doubling(most=4), Scheduler(workers, Budget(1000), batches=batches, ready=ready)
    done, sums, futures = threading.Event(), list[bool](), list[Future[Any]]()

    def watch() -> None:
        while not done.is_set():
            c = scheduler.counters()
            now = c.queued + c.running + c.ready
            sums.append(c.created == now + c.finished + c.failed + c.cancelled + c.expired)
            sums.append((now == 0) == (c.pixels_in_flight == 0))
            time.sleep(0.0002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number, height, fate, seconds in wanted:
        job = doubling.job(number, height, number + 2, held=10, seconds=seconds)
        if fate == "alone":
            job = replace(job, together=None)
        deadline = {"late": time.monotonic(), "soon": time.monotonic() + 0.003}.get(fate)
        futures += scheduler.submit([job], deadline)
        if fate == "cancel":
            futures[-1].cancel()
    for future, (_, _, fate, _) in zip(futures, wanted, strict=True):
        if fate == "cancel later":
            future.cancel()
    assert scheduler.drain(30)
    done.set()
    watcher.join()
    scheduler.close()
    counters = assert_all_ended(scheduler)
    assert all(sums)
    given_up = sum(future.cancelled() for future in futures)
    errors = [future.exception() for future in futures if not future.cancelled()]
    late = sum(isinstance(error, DeadlinePassed) for error in errors)
    assert counters.created == len(wanted)
    assert counters.cancelled + counters.expired == given_up + late
    assert counters.failed == sum(error is not None for error in errors) - late
    assert max(map(len, doubling.groups), default=0) <= 4
