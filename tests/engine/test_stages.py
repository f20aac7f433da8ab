"""Where jobs wait and which is next, without threads: whatever comes in whatever order, within bounds and to an end."""

import time
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fullframe.engine.jobs import Job
from fullframe.engine.stages import Entry, Stages, Task

READY = 25
BATCHES = 2


class Alike:
    """Jobs of one height go together, three at most."""

    def choose(self, first: Job, others: Sequence[Job]) -> list[int]:
        return [number for number, job in enumerate(others) if job.shape == first.shape][:2]

    def work(self, prepared: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError


ALIKE, OTHER = Alike(), Alike()


def entry(together: Alike | None = ALIKE, height: int = 1, held: int = 0, **more: Any) -> Entry:
    job = Job(1, lambda turn: None, together=together, shape=(height, 1), held=held, **more)
    return Entry(job, float("inf"))


def begin(stages: Stages, stage: str, *entries: Entry) -> Task:
    """Take what is next, which is this."""
    task = stages.take()
    assert task is not None
    assert (task.stage, task.entries) == (stage, list(entries))
    return task


def test_a_lone_one_is_prepared_and_worked_on_at_once() -> None:
    stages, lone = Stages(BATCHES, READY), entry()
    stages.add([lone])
    stages.ended(begin(stages, "prepare", lone), ready=True)
    begin(stages, "batch", lone)
    assert not stages.any_next() and stages.waiting() == []


def test_company_is_waited_for_and_whoever_came_later_is_not() -> None:
    stages = Stages(BATCHES, READY)
    first, other, friend, late = entry(), entry(height=2), entry(), entry()
    stages.add([first, other, friend])
    one, two = begin(stages, "prepare", first), begin(stages, "prepare", friend)
    stages.add([late])
    stages.ended(one, ready=True)
    begin(stages, "prepare", other)
    begin(stages, "prepare", late)
    assert stages.take() is None, "first waits for friend"
    stages.ended(two, ready=True)
    begin(stages, "batch", first, friend)


def test_what_is_ready_by_then_goes_too() -> None:
    stages, entries = Stages(1, READY), [entry() for _ in range(4)]
    for each in entries:
        stages.add([each])
        stages.ended(begin(stages, "prepare", each), ready=True)
        if each is entries[0]:
            busy = begin(stages, "batch", each)
    assert stages.take() is None
    stages.ended(busy, ready=True)
    begin(stages, "batch", *entries[1:])


def test_company_is_not_broken_up_for_others_that_are_ready() -> None:
    class Latest(Alike):
        def choose(self, first: Job, others: Sequence[Job]) -> list[int]:
            return [*range(len(others))][-2:]

    for group, others, wanted in ((2, 2, 2), (1, 2, 3), (2, 1, 3)):
        stages, latest = Stages(1, READY), Latest()
        entries = [entry(latest) for _ in range(1 + group + others)]
        for some in [entries[:1], entries[1 : 1 + group], *([each] for each in entries[1 + group :])]:
            stages.add(some)
            for each in some:
                stages.ended(begin(stages, "prepare", each), ready=True)
            if some == entries[:1]:
                busy = begin(stages, "batch", *some)
        stages.ended(busy, ready=True)
        begin(stages, "batch", *entries[1 : 1 + wanted])


def test_company_that_fails_or_is_cancelled_is_not_waited_for() -> None:
    for cancelled in (False, True):
        stages, first, friend = Stages(BATCHES, READY), entry(), entry()
        stages.add([first, friend])
        one = begin(stages, "prepare", first)
        if cancelled:
            assert stages.remove(friend) == "queued"
        else:
            stages.ended(begin(stages, "prepare", friend), ready=False)
        stages.ended(one, ready=True)
        begin(stages, "batch", first)


def test_preparing_pauses_while_there_is_no_room_and_what_is_ready_goes_without() -> None:
    stages, entries = Stages(1, READY), [entry(held=10, height=height) for height in (1, 2, 2, 2)]
    stages.add(entries)
    stages.ended(begin(stages, "prepare", entries[0]), ready=True)
    busy = begin(stages, "batch", entries[0])
    for each in entries[1:3]:
        stages.ended(begin(stages, "prepare", each), ready=True)
    assert stages.take() is None, "20 of 25 are held"
    stages.ended(busy, ready=False)
    begin(stages, "batch", *entries[1:3])
    begin(stages, "prepare", entries[3])


def test_those_whose_deadline_has_passed_only_leave() -> None:
    stages, late, first = Stages(1, READY), entry(held=10), entry(held=10)
    late.deadline = time.monotonic()
    stages.add([late, first])
    stages.ended(begin(stages, "prepare", late), ready=True)
    stages.ended(begin(stages, "prepare", first), ready=True)
    begin(stages, "batch", first, late)
    assert stages.waiting() == []


def test_company_comes_in_the_place_of_the_first_and_before_others() -> None:
    stages = Stages(BATCHES, READY)
    first, whole, friend, other = entry(), entry(None), entry(), entry(OTHER)
    stages.add([first, whole, friend, other])
    for each in (first, friend):
        stages.ended(begin(stages, "prepare", each), ready=True)
    begin(stages, "batch", first, friend)
    begin(stages, "whole", whole)
    begin(stages, "prepare", other)


class Machine(RuleBasedStateMachine):
    """Workers without number that take, end and fail what they find, and callers that give up."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages(BATCHES, READY)
        self.tasks: list[Task] = []
        self.added: list[Entry] = []
        self.ended: list[Entry] = []

    @rule(
        together=st.sampled_from([None, ALIKE, OTHER]),
        height=st.integers(1, 2),
        held=st.integers(0, READY + 5),
        wide=st.booleans(),
        count=st.integers(1, 4),
    )
    def add(self, together: Alike | None, height: int, held: int, wide: bool, count: int) -> None:
        entries = [entry(together, height, held, wide=wide and together is None) for _ in range(count)]
        self.stages.add(entries)
        self.added += entries

    @precondition(lambda self: self.stages.any_next())
    @rule()
    def take(self) -> None:
        task = self.stages.take()
        assert task is not None
        self.tasks.append(task)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), ready=st.booleans())
    def end(self, data: st.DataObject, ready: bool) -> None:
        task = self.tasks.pop(data.draw(st.integers(0, len(self.tasks) - 1)))
        self.stages.ended(task, ready)
        if task.stage != "prepare" or not ready:
            self.ended += task.entries

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.added))
        waits = chosen in self.stages.waiting()
        how = self.stages.remove(chosen)
        assert (how is not None) == waits
        if how is not None:
            self.ended.append(chosen)

    @invariant()
    def each_is_in_one_place(self) -> None:
        on_workers = [each for task in self.tasks for each in task.entries]
        everywhere = [*self.stages.waiting(), *on_workers, *self.ended]
        assert sorted(map(id, everywhere)) == sorted(map(id, self.added))

    @invariant()
    def bounds_hold(self) -> None:
        assert sum(task.stage == "batch" for task in self.tasks) <= BATCHES
        assert sum(each.wide for task in self.tasks for each in task.entries) <= 1
        preparing = [task.entries[0] for task in self.tasks if task.stage == "prepare"]
        ready = [each for each in self.stages.waiting() if each.group and each.place is each.group.ready]
        held = [each.job.held for each in preparing + ready]
        assert sum(held) <= READY or sum(each > 0 for each in held) == 1

    @invariant()
    def something_goes_on(self) -> None:
        assert self.tasks or not self.stages.waiting() or self.stages.any_next()

    def teardown(self) -> None:
        while self.tasks or self.stages.any_next():
            while (task := self.stages.take()) is not None:
                self.tasks.append(task)
            self.stages.ended(task := self.tasks.pop(0), ready=True)
            if task.stage != "prepare":
                self.ended += task.entries
        self.each_is_in_one_place()
        assert len(self.ended) == len(self.added)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.lists(st.tuples(st.sampled_from([None, ALIKE, OTHER]), st.integers(1, 3)), max_size=40))
def test_none_is_overtaken_but_by_the_company_of_one_before(wanted: list[tuple[Alike | None, int]]) -> None:
    stages, entries = Stages(1, 2**62), [entry(together, height) for together, height in wanted]
    stages.add(entries)
    begun: list[Entry] = []
    while (task := stages.take()) is not None:
        stages.ended(task, ready=True)
        begun += task.entries if task.stage != "batch" else []
    places = [each.number for each in begun]
    assert len(begun) == len(entries) and places == sorted(places)
    for number, each in enumerate(entries):
        first = entries[each.number]
        assert each.number <= number and (each is first or each.job.together is first.job.together is not None)
