"""The scheduler: order, admission, deadlines, cancellation, and counts that always add up."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullframe.engine.jobs import Budget, Counters, Job, Turn
from fullframe.engine.schedule import Scheduler
from fullframe.errors import DeadlinePassed, InvalidInput, Overloaded, Unavailable
from tests.serving import eventually

Steps = Generator[None, Turn, object]


class Gate:
    """A job that says when it runs and waits to be let go."""

    def __init__(self, pixels: int = 100) -> None:
        self.running, self.go = threading.Event(), threading.Event()
        self.job = Job(pixels, self._work)

    def _work(self, turn: Turn) -> Turn:
        self.running.set()
        assert self.go.wait(30)
        return turn


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(workers=1, budget=Budget(1000))
    yield made
    made.close()
    assert_all_accounted(made.counters())


def assert_all_accounted(counters: Counters) -> None:
    ended = counters.finished + counters.failed + counters.cancelled + counters.expired
    assert counters.created == ended
    assert (counters.queued, counters.running, counters.pixels_in_flight) == (0, 0, 0)


def blocked(scheduler: Scheduler, pixels: int = 100) -> tuple[Gate, Future[Turn]]:
    gate = Gate(pixels)
    [future] = scheduler.submit([gate.job])
    assert gate.running.wait(10)
    return gate, future


def test_first_come_first_served(scheduler: Scheduler) -> None:
    gate, first = blocked(scheduler)
    order: list[int] = []
    futures = scheduler.submit([Job(1, lambda turn, i=i: order.append(i)) for i in range(10)])  # type: ignore[misc]
    gate.go.set()
    for future in [first, *futures]:
        future.result(10)
    assert order == list(range(10))


def test_a_turn_knows_its_wait_and_whether_it_is_alone() -> None:
    scheduler = Scheduler(workers=2, budget=Budget(1000))
    first, lone = blocked(scheduler)
    second, crowded = blocked(scheduler)
    [queued] = scheduler.submit([Job(1, lambda turn: turn)])
    time.sleep(0.05)
    second.go.set()
    first.go.set()
    assert lone.result(10).alone and not crowded.result(10).alone
    assert queued.result(10).queued >= 0.05
    scheduler.close()


def test_a_request_is_admitted_whole_or_not_at_all(scheduler: Scheduler) -> None:
    gate, _ = blocked(scheduler, pixels=600)
    with pytest.raises(Overloaded, match=r"no room for 0\.0005 megapixels") as refusal:
        scheduler.submit([Job(100, lambda _: None)] * 5)
    assert refusal.value.retry_after > 0
    assert scheduler.counters().queued == 0
    futures = scheduler.submit([Job(100, lambda _: None)] * 4)
    gate.go.set()
    for future in futures:
        future.result(10)
    assert scheduler.counters().refused == 1


def test_a_request_that_could_never_fit_is_invalid(scheduler: Scheduler) -> None:
    with pytest.raises(InvalidInput, match="several requests"):
        scheduler.submit([Job(600, lambda _: None)] * 2)
    scheduler.submit([Job(1000, lambda _: None)])[0].result(10)


def test_cancelling_a_queued_job_frees_its_room_at_once(scheduler: Scheduler) -> None:
    gate, _ = blocked(scheduler, pixels=100)
    ran: list[Turn] = []
    [queued] = scheduler.submit([Job(900, ran.append)])
    with pytest.raises(Overloaded):
        scheduler.submit([Job(900, ran.append)])
    assert queued.cancel()
    counters = scheduler.counters()
    assert (counters.cancelled, counters.pixels_in_flight, counters.queued) == (1, 100, 0)
    [admitted] = scheduler.submit([Job(900, lambda _: "now")])
    gate.go.set()
    assert admitted.result(10) == "now"
    assert ran == []


def test_a_running_job_cannot_be_cancelled(scheduler: Scheduler) -> None:
    gate, future = blocked(scheduler)
    assert not future.cancel()
    gate.go.set()
    assert isinstance(future.result(10), Turn)


def test_a_deadline_that_passes_in_the_queue_drops_the_job(scheduler: Scheduler) -> None:
    gate, _ = blocked(scheduler)
    ran: list[Turn] = []
    [late] = scheduler.submit([Job(1, ran.append)], deadline=time.monotonic() + 0.02)
    [patient] = scheduler.submit([Job(1, ran.append)], deadline=time.monotonic() + 30)
    time.sleep(0.05)
    gate.go.set()
    with pytest.raises(DeadlinePassed):
        late.result(10)
    patient.result(10)
    assert len(ran) == 1
    assert scheduler.counters().expired == 1


def test_a_job_cancelled_at_its_deadline_has_expired_and_one_before_was_cancelled(scheduler: Scheduler) -> None:
    """Whoever waits for an answer may give up at the deadline before a worker sees that it has passed."""
    gate, _ = blocked(scheduler)
    [late] = scheduler.submit([Job(1, lambda _: None)], deadline=time.monotonic() + 0.02)
    [early] = scheduler.submit([Job(1, lambda _: None)], deadline=time.monotonic() + 30)
    [whenever] = scheduler.submit([Job(1, lambda _: None)])
    time.sleep(0.02)
    assert late.cancel() and early.cancel() and whenever.cancel()
    counters = scheduler.counters()
    assert (counters.expired, counters.cancelled) == (1, 2)
    gate.go.set()


def test_a_failing_job_fails_alone(scheduler: Scheduler) -> None:
    class Poison(BaseException):
        pass

    def fail(turn: Turn) -> None:
        raise Poison

    bad, good = scheduler.submit([Job(1, fail), Job(1, lambda _: "well")])
    with pytest.raises(Poison):
        bad.result(10)
    assert good.result(10) == "well"
    assert scheduler.healthy()


def test_a_future_that_is_kept_does_not_keep_its_image(scheduler: Scheduler) -> None:
    class Image:
        def work(self, turn: Turn) -> int:
            return 1

        def steps(self, turn: Turn) -> Steps:
            yield
            return self.work(turn)

    gate, _ = blocked(scheduler)
    images = [Image() for _ in range(3)]
    held = [weakref.ref(image) for image in images]
    gc.disable()
    try:
        jobs = [Job(1, images[0].work), Job(1, images[1].work), Job(1, images[2].steps, in_steps=True)]
        cancelled, plain, stepping = scheduler.submit(jobs)
        del jobs
        images.clear()
        assert all(ref() is not None for ref in held)
        assert cancelled.cancel()
        gate.go.set()
        assert [plain.result(10), stepping.result(10)] == [1, 1]
        eventually(lambda: all(ref() is None for ref in held))
    finally:
        gc.enable()


def test_draining_refuses_new_jobs_and_waits_for_the_old(scheduler: Scheduler) -> None:
    gate, running = blocked(scheduler)
    [queued] = scheduler.submit([Job(1, lambda _: "last")])
    assert not scheduler.drain(0.05)
    with pytest.raises(Unavailable):
        scheduler.submit([Job(1, lambda _: None)])
    gate.go.set()
    assert scheduler.drain(10)
    assert queued.result(0.5) == "last"
    assert running.done()


def test_closing_cancels_the_queue() -> None:
    scheduler = Scheduler(workers=1, budget=Budget(1000))
    gate, running = blocked(scheduler)
    [queued] = scheduler.submit([Job(1, lambda _: None)])
    threading.Timer(0.05, gate.go.set).start()
    scheduler.close()
    assert running.done()
    with pytest.raises(CancelledError):
        queued.result(0)
    assert_all_accounted(scheduler.counters())
    assert not scheduler.healthy()


@given(st.data())
def test_counts_add_up_after_a_storm(data: st.DataObject) -> None:
    fates = data.draw(st.lists(st.sampled_from(["finish", "fail", "cancel", "expire"]), max_size=60))
    scheduler = Scheduler(workers=3, budget=Budget(40))
    refused = 0
    for fate in fates:

        def work(turn: Turn, fate: str = fate) -> None:
            if fate == "fail":
                raise ValueError

        deadline = time.monotonic() - 1 if fate == "expire" else None
        try:
            [future] = scheduler.submit([Job(7, work)], deadline)
        except Overloaded:
            refused += 1
        else:
            if fate == "cancel":
                future.cancel()
    assert scheduler.drain(10)
    counters = scheduler.counters()
    assert_all_accounted(counters)
    assert counters.created + refused == len(fates)
    assert counters.refused == refused
    scheduler.close()


def steps(
    log: list[str], name: str, count: int, result: object = None
) -> Callable[[Turn], Generator[None, Turn, object]]:
    """Work in `count` steps that says in `log` when each has its turn, and when it is let go."""

    def work(turn: Turn) -> Steps:
        try:
            for number in range(count):
                log.append(f"{name}{number}")
                if number < count - 1:
                    yield
            return result
        finally:
            log.append(f"{name} ends")

    return work


def test_a_job_in_steps_goes_behind_the_others_after_each(scheduler: Scheduler) -> None:
    gate, _ = blocked(scheduler)
    log: list[str] = []
    jobs = [Job(1, steps(log, "a", 3, "A"), in_steps=True), Job(1, steps(log, "b", 2, "B"), in_steps=True)]
    jobs.append(Job(1, lambda _: log.append("c")))
    futures = scheduler.submit(jobs)
    gate.go.set()
    assert [future.result(10) for future in futures] == ["A", "B", None]
    assert log == ["a0", "b0", "c", "a1", "b1", "b ends", "a2", "a ends"]


def test_a_job_in_steps_can_be_cancelled_and_expires_between_them(scheduler: Scheduler) -> None:
    log: list[str] = []
    inside, go = threading.Event(), threading.Event()

    def endless(turn: Turn) -> Generator[None, Turn, None]:
        try:
            while True:
                inside.set()
                assert go.wait(10)
                yield
        finally:
            log.append("let go")

    [future] = scheduler.submit([Job(1, endless, in_steps=True)])
    assert inside.wait(10)
    assert future.cancel()
    go.set()
    with pytest.raises(CancelledError):
        future.result(10)
    [late] = scheduler.submit([Job(1, endless, in_steps=True)], deadline=time.monotonic() + 0.1)
    with pytest.raises(DeadlinePassed, match="while the image was worked on"):
        late.result(10)
    gate, _ = blocked(scheduler)
    gate.go.set()
    scheduler.drain(10)
    assert log == ["let go", "let go"]
    assert (scheduler.counters().cancelled, scheduler.counters().expired) == (1, 1)


def test_closing_ends_a_job_in_steps_at_its_next_pause() -> None:
    log: list[str] = []
    scheduler = Scheduler(workers=1, budget=Budget(10))
    [future] = scheduler.submit([Job(1, steps(log, "a", 10**9), in_steps=True)])
    while not log:
        time.sleep(0.001)
    scheduler.close()
    assert future.cancelled() and log[-1] == "a ends"
    assert_all_accounted(scheduler.counters())


def test_a_failing_step_fails_its_job_alone(scheduler: Scheduler) -> None:
    def fails(turn: Turn) -> Generator[None, Turn, None]:
        yield
        raise ValueError("in the second step")

    bad, good = scheduler.submit([Job(1, fails, in_steps=True), Job(1, lambda _: "well")])
    with pytest.raises(ValueError, match="second step"):
        bad.result(10)
    assert good.result(10) == "well"


# -- wide jobs and memory


def test_one_wide_job_runs_at_a_time_and_the_others_pass() -> None:
    scheduler = Scheduler(workers=2, budget=Budget(1000))
    gate, other = Gate(), Gate()
    wide = [Job(1, each.job.work, wide=True) for each in (gate, other)]
    [first, second] = scheduler.submit(wide)
    assert gate.running.wait(10)
    for _ in range(3):
        assert scheduler.submit([Job(1, lambda _: "narrow")])[0].result(10) == "narrow"
    assert not other.running.is_set()
    gate.go.set()
    assert first.result(10)
    assert other.running.wait(10)
    other.go.set()
    assert second.result(10).alone
    scheduler.close()


def test_two_jobs_in_steps_never_run_together_and_leave_a_worker_free() -> None:
    scheduler = Scheduler(workers=2, budget=Budget(1000))
    inside, most, lock = 0, 0, threading.Lock()

    def work(turn: Turn) -> Generator[None, Turn, None]:
        nonlocal inside, most
        for _ in range(30):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.002)
            with lock:
                inside -= 1
            yield

    futures = scheduler.submit([Job(1, work, in_steps=True) for _ in range(3)])
    while not all(future.done() for future in futures):
        assert scheduler.submit([Job(1, lambda _: "small")])[0].result(10) == "small"
    assert most == 1
    scheduler.close()


def test_closing_ends_a_worker_that_waits_for_a_wide_jobs_turn() -> None:
    scheduler = Scheduler(workers=2, budget=Budget(1000))
    gate, other = Gate(), Gate()
    running, waiting = scheduler.submit([Job(1, each.job.work, wide=True) for each in (gate, other)])
    assert gate.running.wait(10)
    threading.Timer(0.05, gate.go.set).start()
    scheduler.close()
    assert running.done() and waiting.cancelled()
    assert_all_accounted(scheduler.counters())


def sized(memory: int, wide: bool = False) -> Job:
    return Job(1, lambda turn: None, memory=memory, wide=wide)


def test_memory_counts_what_may_be_held_at_once() -> None:
    """With two workers the two largest, of those that use all cores one, and of those in steps each."""
    scheduler = Scheduler(workers=2, budget=Budget(1000, memory=100))
    gates = [Gate(), Gate()]
    blocking = scheduler.submit([Job(1, gate.job.work) for gate in gates])
    assert all(gate.running.wait(10) for gate in gates)
    queued = scheduler.submit([sized(memory) for memory in (10, 30, 20, 30)])
    assert scheduler.counters().memory_in_flight == 60
    queued += scheduler.submit([sized(40, wide=True), sized(35, wide=True)])
    assert scheduler.counters().memory_in_flight == 70
    queued += scheduler.submit([Job(1, steps([], "a", 2), in_steps=True, memory=25)])
    assert scheduler.counters().memory_in_flight == 95
    with pytest.raises(Overloaded, match=r"9\.5e-05 MB of memory of 0\.0001 MB of memory") as refused:
        scheduler.submit([sized(46, wide=True)])
    assert refused.value.retry_after > 0
    assert scheduler.counters().memory_in_flight == 95
    queued += scheduler.submit([sized(45, wide=True), sized(1)])
    for gate in gates:
        gate.go.set()
    for future in [*blocking, *queued]:
        future.result(10)
    scheduler.close()
    assert scheduler.counters().memory_in_flight == 0
    assert_all_accounted(scheduler.counters())


def test_memory_that_could_never_be_had_is_invalid() -> None:
    scheduler = Scheduler(workers=2, budget=Budget(1000, memory=10**8))
    with pytest.raises(InvalidInput, match=r"takes 200 MB of memory; at most 100 MB of memory .* send a smaller image"):
        scheduler.submit([sized(2 * 10**8)])
    with pytest.raises(InvalidInput, match=r"takes 32,400 MB of memory; at most 100 MB of memory"):
        scheduler.submit([sized(32_400_000_001)])
    with pytest.raises(InvalidInput, match="several requests"):
        scheduler.submit([sized(6 * 10**7)] * 2)
    scheduler.close()
