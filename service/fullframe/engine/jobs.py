"""What the scheduler deals with: a job and its turn, what jobs take of a budget, and what became of them."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Batching = Literal["auto", "one", "ragged"]
"""How images that wait are worked on: one by one, together in batches of different sizes, or as suits the device. A CPU
gains nothing from batches."""


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
        wide: it is computed on all cores, so that two at once would gain nothing: one runs at a time, and leaves the
            other workers to the rest. A job in steps is.
        memory: bytes that it takes while it runs; in steps, from its first to its last.
        together: it is worked on together with others that have this same object and that it chooses. `work` then only
            prepares: what it returns is the job's part of what they are worked on together. While it is prepared and
            waits for that it can be cancelled, and its deadline can pass.
        shape: height and width, for that choice.
        held: bytes that it takes from the beginning of its preparation until it is worked on; `memory` from then on.
    """

    pixels: int
    work: Callable[[Turn], Any]
    in_steps: bool = False
    wide: bool = False
    memory: int = 0
    together: "Together | None" = None
    shape: tuple[int, int] = (0, 0)
    held: int = 0


class Together(Protocol):
    """How jobs are worked on together."""

    def choose(self, first: Job, others: Sequence[Job]) -> Sequence[int]:
        """The numbers of those among the others, some waiting or all prepared, that are to go with the first."""

    def work(self, prepared: Sequence[Any]) -> Sequence[Any]:
        """For each of what jobs prepared its result, or the exception that is its own failure."""


class Budget(NamedTuple):
    """What jobs take, or may take, together: pixels queued and running, and bytes of memory held at once."""

    pixels: int
    memory: int = 2**62


@dataclass(slots=True)
class Counters:
    """What became of the jobs: created = queued + running + ready + finished + failed + cancelled + expired, always.

    `ready` jobs have been prepared and wait to be worked on together. A job that is cancelled at its deadline, or
    later, has expired. `refused` requests never became jobs, and images that are `opening` have not yet.
    `pixels_in_flight` counts queued, running and ready jobs, `memory_in_flight` the bytes that they could hold at once.
    """

    created: int = 0
    queued: int = 0
    running: int = 0
    ready: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0
    opening: int = 0
    pixels_in_flight: int = 0
    memory_in_flight: int = 0


class Taken:
    """What jobs in flight take, on so many workers; `batches` and `ready` as stages.Stages has them."""

    def __init__(self, workers: int, batches: int, ready: int, jobs: Sequence[Job] = ()) -> None:
        self._workers, self._batches, self._ready = workers, batches, ready
        self._pixels = self._stepping = self._held = 0
        self._wide: list[int] = []  # bytes, in order
        self._narrow: list[int] = []
        self._batched: list[int] = []
        self._prepared: list[int] = []  # bytes held, in order
        for job in jobs:
            self.add(job)

    def add(self, job: Job) -> None:
        """Count one more."""
        self._pixels += job.pixels
        if job.in_steps:
            self._stepping += job.memory
        elif job.together is None:
            insort(self._wide if job.wide else self._narrow, job.memory)
        else:
            insort(self._batched, job.memory)
            insort(self._prepared, job.held)
            self._held += job.held

    def remove(self, job: Job) -> None:
        """Count one that was added no more."""
        self._pixels -= job.pixels
        if job.in_steps:
            self._stepping -= job.memory
        elif job.together is None:
            _discard(self._wide if job.wide else self._narrow, job.memory)
        else:
            _discard(self._batched, job.memory)
            _discard(self._prepared, job.held)
            self._held -= job.held

    def total(self) -> Budget:
        """At the worst: the largest run at once, all that go in steps have begun, and as many are ready as may be."""
        largest = self._narrow[-self._workers :]
        ready = 0
        if self._batched:
            largest = sorted(largest + self._batched[-self._batches :])[-self._workers :]
            ready = min(self._held, max(self._ready, self._prepared[-1]))
        crowd = sum(largest)
        if self._wide:
            crowd = max(crowd, self._wide[-1] + sum(largest[1:] if len(largest) == self._workers else largest))
        return Budget(self._pixels, self._stepping + crowd + ready)


def _discard(ordered: list[int], value: int) -> None:
    del ordered[bisect_left(ordered, value)]
