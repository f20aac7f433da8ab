"""Where jobs wait, stage by stage, and what a free worker does next.

A job that is worked on by itself is one piece from its decoding to its answer: handing an image to another worker would
wake a thread, which takes longer than a small image does. One that is worked on together with others is prepared by any
worker, while others compute, and is then ready:

- the first in line is prepared, and in its place those in line that its `together` chooses for its company;
- once all of these are ready, or fail, they are worked on, with what else is ready by then and goes with them: a lone
  job waits for nobody, and none for one that came later;
- while `batches` are worked on, others get ready, until they hold `ready` bytes: then preparing pauses.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any, Final, Literal, NamedTuple

from fullframe.engine.jobs import Job, Turn

_CANDIDATES: Final = 256
"""Jobs looked at for company: enough for a good choice, and soon done."""


@dataclass(slots=True, eq=False)
class Group:
    """Jobs chosen to be prepared in one place in line."""

    left: int  # not prepared yet
    ready: "deque[Entry]" = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class Entry:
    """A job on its way.

    Attributes:
        deadline: the time.monotonic() instant after which no answer is wanted.
        entered: that at which it began to wait.
        waited, worked: seconds, so far.
        number: its place in line.
        place: what it waits in; None on a worker.
    """

    job: Job
    deadline: float
    future: Future[Any] = field(default_factory=Future)
    entered: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    worked: float = 0.0
    steps: Generator[None, Turn, Any] | None = None
    prepared: Any = None
    number: int = 0
    place: "deque[Entry] | None" = None
    group: Group | None = None

    @property
    def wide(self) -> bool:
        """As Job's."""
        return self.job.wide or self.job.in_steps

    def close(self) -> None:
        """Let go of the image: the future, which others may keep, holds this by its callback."""
        if self.steps is not None:
            self.steps.close()
        self.prepared = None
        del self.job, self.steps


class Task(NamedTuple):
    """What a worker does at once: one job as a whole or the preparation of one, or several that are ready."""

    stage: Literal["whole", "prepare", "batch"]
    entries: list[Entry]


class Stages:
    """Jobs that wait; no more than one thread at a time.

    Args:
        batches: of jobs worked on together, at once.
        ready: bytes that jobs may hold that are being prepared or wait to be worked on together; one that needs more
            has them to itself.
    """

    def __init__(self, batches: int, ready: int) -> None:
        self._most_batches, self._most_held = batches, ready
        self._batches = self._held = 0
        self._wide_runs = False
        self._numbers = count()
        self._whole: deque[Entry] = deque()
        self._unprepared: deque[Entry] = deque()
        self._chosen: deque[Entry] = deque()  # of the newest group, to be prepared
        self._groups: list[Group] = []

    def add(self, entries: Iterable[Entry]) -> None:
        """Queue them behind all others."""
        for entry in entries:
            entry.number = next(self._numbers)
            entry.place = self._whole if entry.job.together is None else self._unprepared
            entry.place.append(entry)

    def waiting(self) -> list[Entry]:
        """All that are on no worker."""
        return list(chain(self._whole, self._unprepared, self._chosen, *(group.ready for group in self._groups)))

    def any_next(self) -> bool:
        """Whether there is something for a free worker to do."""
        return self._next() is not None

    def take(self) -> Task | None:
        """What a free worker is to do now, if anything; to be followed by `ended`."""
        found = self._next()
        if found is None:
            return None
        if isinstance(found, Group):
            return self._begin_batch(found)
        if found.job.together is not None:
            return self._begin_preparing(found)
        self._leave(found)
        if found.wide:
            self._wide_runs = True
        return Task("whole", [found])

    def ended(self, task: Task, ready: bool) -> None:
        """A worker has done with a task; `ready`: what it prepared now waits for its batch."""
        first = task.entries[0]
        if task.stage == "batch":
            self._batches -= 1
        elif task.stage == "whole":
            self._wide_runs &= not first.wide
        elif (group := first.group) is not None:
            group.left -= 1
            if ready:
                first.place = group.ready
                first.place.append(first)
            else:
                self._held -= first.job.held
                self._forget_if_done(group)

    def remove(self, entry: Entry) -> Literal["queued", "ready"] | None:
        """Take one out that is not wanted any more; returns how it waited, None if it is on a worker."""
        if entry.place is None:
            return None
        ready = self._leave(entry)
        if entry.group is not None:
            if not ready:
                entry.group.left -= 1
            self._forget_if_done(entry.group)
        return "ready" if ready else "queued"

    def _next(self) -> Entry | Group | None:
        """A job to be worked on or prepared, or a group to be worked on."""
        if self._groups and (group := self._runnable()) is not None:
            return group
        whole = next((entry for entry in self._whole if not (self._wide_runs and entry.wide)), None)
        if self._chosen or self._unprepared:
            first = (self._chosen or self._unprepared)[0]
            if self._has_room(first) and (whole is None or first.number < whole.number):
                return first
        return whole

    def _runnable(self) -> Group | None:
        """The first whose company is complete, or, if nothing more can be prepared before, has begun to be."""
        if self._batches >= self._most_batches:
            return None
        stuck = bool(self._chosen) and not self._has_room(self._chosen[0])
        return next((group for group in self._groups if group.ready and (stuck or not group.left)), None)

    def _has_room(self, entry: Entry) -> bool:
        return not self._held or self._held + entry.job.held <= self._most_held

    def _begin_preparing(self, entry: Entry) -> Task:
        if entry.group is None:
            self._choose_company(entry)
        self._leave(entry)
        self._held += entry.job.held
        return Task("prepare", [entry])

    def _choose_company(self, first: Entry) -> None:
        """Of the first in line, in its own place."""
        alike = (each for each in islice(self._unprepared, 1, None) if each.job.together is first.job.together)
        members = _with_company(first, list(islice(alike, _CANDIDATES)))
        group = Group(len(members))
        self._groups.append(group)
        for each in members:
            self._leave(each)
            each.number, each.group, each.place = first.number, group, self._chosen
            self._chosen.append(each)

    def _begin_batch(self, group: Group) -> Task:
        """The group's, and others that are ready if they displace none; what is too late only leaves with them."""
        together = group.ready[0].job.together
        ready = chain(group.ready, *(each.ready for each in self._groups if each is not group))
        alike = list(islice((each for each in ready if each.job.together is together), _CANDIDATES))
        now = time.monotonic()
        late = [each for each in alike if now >= each.deadline]
        wanted = [each for each in alike if now < each.deadline]
        own = [each for each in wanted if each.group is group]
        joined = _with_company(wanted[0], wanted[1:]) if wanted else []
        entries = (joined if set(own) <= set(joined) else own) + late
        for each in entries:
            self._leave(each)
            assert each.group is not None
            self._forget_if_done(each.group)
        self._batches += 1
        return Task("batch", entries)

    def _leave(self, entry: Entry) -> bool:
        """Take it out of what it waits in; returns whether it was ready."""
        place, entry.place = entry.place, None
        assert place is not None
        place.remove(entry)
        ready = entry.group is not None and place is entry.group.ready
        if ready:
            self._held -= entry.job.held
        return ready

    def _forget_if_done(self, group: Group) -> None:
        if not group.left and not group.ready:
            self._groups.remove(group)


def _with_company(first: Entry, others: list[Entry]) -> list[Entry]:
    together = first.job.together
    assert together is not None
    chosen = together.choose(first.job, [each.job for each in others]) if others else []
    return [first, *(others[number] for number in chosen)]
