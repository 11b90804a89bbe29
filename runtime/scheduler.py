"""The queue and its worker threads: knows neither transport nor engine, only requests that consist of pictures.

Each worker takes one picture at a time from the one queue, so that no worker drains it while another idles, and a
request of many pictures is spread over all of them. Workers go round the models that wait, and within a model round
its requests: a large request shares the workers with small ones instead of holding them up. Where the engine answers
pictures cheaper together, as a GPU does, a worker takes a batch, of a model's requests in the same turns, and never
more than its share of what waits while others idle.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter_ns
from typing import Any, Generic, TypeVar

from .errors import DeadlineExceeded, EngineError, QueueFull, ShuttingDown, TriviumError
from .logs import about

T = TypeVar("T")
URGENT, NORMAL = 0, 1
_log = logging.getLogger(__name__)


class Job(Generic[T]):
    """One request in the queue.

    Args:
        size: number of pictures, at least 1.
        run: answers the picture of an index of a job; called in a worker thread, one call a picture, several at once.
        done: called exactly once, in any thread, when `results` are complete or `error` is set.
        nbytes: memory that the request holds, in bytes.
        lane: what it shares fairly with others, the model's name.
        priority: URGENT goes before NORMAL, always.
        deadline: of time.monotonic(); past it no further picture of the job runs.
        together: answers several pictures at once, an answer or an error for each; those of jobs with an equal one may
            share a call. None where they may not.
        payload: for `run` and `together`, what its pictures are.
    """

    __slots__ = (
        "deadline", "done", "entered_ns", "error", "lane", "nbytes", "next", "payload", "priority", "queue_ns",
        "results", "run", "running", "settled", "size", "together",
    )  # fmt: skip

    def __init__(
        self,
        size: int,
        run: Callable[[Job[T], int], T],
        done: Callable[[Job[T]], None],
        *,
        nbytes: int = 0,
        lane: str = "",
        priority: int = NORMAL,
        deadline: float | None = None,
        together: Together[T] | None = None,
        payload: Any = None,
    ) -> None:
        self.size = size
        self.run = run
        self.done = done
        self.nbytes = nbytes
        self.lane = lane
        self.priority = priority
        self.deadline = deadline
        self.together = together
        self.payload = payload
        self.results: list[T | None] = [None] * size
        self.error: TriviumError | None = None
        self.entered_ns = 0
        self.queue_ns = 0
        """Nanoseconds until the first picture was taken up."""
        self.next = 0
        self.running = 0
        self.settled = False

    @property
    def waiting(self) -> int:
        """Pictures not yet taken up."""
        return self.size - self.next


Pictures = list[tuple[Job[T], int]]
"""A batch: jobs, and which of each one's pictures."""
Together = Callable[[Pictures[T]], Sequence[T | TriviumError]]
Level = OrderedDict[str, "OrderedDict[Job, None]"]  # type: ignore[type-arg]


class Scheduler:
    """A bounded queue served by `instances` threads.

    Args:
        instances: worker threads.
        capacity: most pictures waiting.
        max_bytes: most bytes of pictures waiting or running.
        batch: most pictures that a worker answers together.
        max_delay: seconds that a picture may wait for others to share its batch.
        preferred: sizes that batches have rather than others, such as those an engine is compiled for.
        shed_late: refuse at once what the queue's wait would make miss its deadline.
    """

    def __init__(
        self,
        instances: int,
        capacity: int,
        max_bytes: int = 1 << 62,
        *,
        batch: int = 1,
        max_delay: float = 0.0,
        preferred: Sequence[int] = (),
        shed_late: bool = False,
    ) -> None:
        self.instances = instances
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.batch = batch
        self.max_delay = max_delay
        self._preferred = sorted(size for size in preferred if size <= batch)
        self._shed_late = shed_late
        self._each = 0.0
        """Seconds that a picture takes a worker, of late."""
        self._busy = 0
        """Batches being answered."""
        self.depth = 0
        """Pictures waiting."""
        self.running = 0
        """Pictures being answered."""
        self.executed = 0
        """Pictures taken up since the start."""
        self.nbytes = 0
        """Bytes held by requests waiting or running."""
        self._levels: tuple[Level, Level] = (OrderedDict(), OrderedDict())
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"worker-{i}", daemon=True) for i in range(instances)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job[T]) -> None:
        """Queue a job; returns at once.

        Raises: QueueFull where its pictures or bytes do not fit; DeadlineExceeded where its deadline has passed;
            ShuttingDown after close.
        """
        job.entered_ns = perf_counter_ns()
        with self._changed:
            self._enter(job)
            # one that gathers a batch may be woken in place of one that idles
            self._changed.notify(self.instances if self.max_delay > 0 else min(job.size, self.instances))

    def run_here(self, job: Job[T]) -> bool:
        """Answer a job in the caller's thread, for an engine so fast that handing the job on would cost more.

        It is done when this returns, and `done` is not called. False, and nothing done, where pictures wait: they were
        first. Raises: as submit.
        """
        job.entered_ns = perf_counter_ns()
        taken: Pictures[Any] = []
        with self._changed:
            if self.depth:
                return False
            self._enter(job)
            # no other thread has seen it, so that all its pictures can be taken up at once
            while job.waiting:
                self._start(job, taken, [])
            self._busy += len(taken)
        for picture in taken:
            self._answer([picture])
        return True

    def remove(self, job: Job[T], error: TriviumError) -> bool:
        """Take a job out, for a client that left or a deadline that passed: it is done now, with `error`.

        Its waiting pictures never run; the answers of those that do are dropped. False where it was done already.
        """
        with self._changed:
            settled = self._settle(job, error)
        if settled:
            job.done(job)
        return settled

    def age(self) -> float:
        """Seconds that the request which waits longest has waited; 0 where none does."""
        with self._changed:
            entered = [job.entered_ns for level in self._levels for jobs in level.values() for job in jobs]
        return (perf_counter_ns() - min(entered)) * 1e-9 if entered else 0.0

    def close(self, timeout: float | None = None) -> None:
        """Refuse what waits with ShuttingDown, let what runs finish, and end the workers."""
        with self._changed:
            self._closed = True
            waiting = [job for level in self._levels for jobs in level.values() for job in jobs]
            refused = [job for job in waiting if self._settle(job, ShuttingDown("the server is shutting down"))]
            self._changed.notify_all()
        _tell(refused)
        end = None if timeout is None else monotonic() + timeout
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - monotonic()))

    def _enter(self, job: Job[T]) -> None:
        """Under the lock: let a job wait. Raises: as submit."""
        if job.deadline is not None and job.deadline <= monotonic():
            raise DeadlineExceeded("the request's deadline had passed before it was queued")
        if self._closed:
            raise ShuttingDown("the server is shutting down")
        if self.depth + job.size > self.capacity:
            raise QueueFull(
                f"the queue is full: {self.depth} pictures wait, {self.capacity} may, the request has {job.size}"
            )
        if self.nbytes + job.nbytes > self.max_bytes:
            raise QueueFull(
                f"the server is full: requests hold {self.nbytes} bytes, {self.max_bytes} may be held, "
                f"the request has {job.nbytes}"
            )
        if self._shed_late and job.deadline is not None:
            self._check_wait(job, job.deadline)
        self.depth += job.size
        self.nbytes += job.nbytes
        self._levels[job.priority].setdefault(job.lane, OrderedDict())[job] = None

    def _work(self) -> None:
        while taken := self._take():
            _tell(self._answer(taken))
            # a thread that waits must not keep the last requests alive
            del taken

    def _answer(self, taken: Pictures[Any]) -> list[Job[Any]]:
        """Run pictures that were taken up; the jobs that are done by it."""
        start = monotonic()
        outcomes = self._run(taken)
        finished = []
        with self._changed:
            self._busy -= 1
            self.running -= len(taken)
            each = (monotonic() - start) / len(taken)
            self._each = each if self._each == 0 else 0.9 * self._each + 0.1 * each
            for (job, index), outcome in zip(taken, outcomes, strict=True):
                error = outcome if isinstance(outcome, TriviumError) else None
                if error is None:
                    job.results[index] = outcome
                job.running -= 1
                if (error is not None or self._complete(job)) and self._settle(job, error):
                    finished.append(job)
                if job.running == 0 and job.waiting == 0:
                    self._release(job)
        return finished

    @staticmethod
    def _run(taken: Pictures[Any]) -> Sequence[Any]:
        job, index = taken[0]
        try:
            if len(taken) > 1:
                assert job.together is not None
                return job.together(taken)
            return [job.run(job, index)]
        except TriviumError as known:
            error = known
        except Exception:  # a worker must outlive whatever one picture does to it
            _log.exception("a picture failed", extra=about(model=job.lane))
            error = EngineError("the picture could not be answered; the server's log says why")
        return [error] * len(taken)

    def _take(self) -> Pictures[Any]:
        """The next pictures; none at the end."""
        while True:
            expired: list[Job[Any]] = []
            taken: Pictures[Any] = []
            with self._changed:
                job = self._next()
                while job is None:
                    if self._closed:
                        return []
                    self._changed.wait()
                    job = self._next()
                if self.batch == 1 or job.together is None:
                    self._start(job, taken, expired)
                elif self._gathered(job):
                    self._start_batch(job, taken, expired)
                self._busy += bool(taken)
            _tell(expired)
            if taken:
                return taken

    def _gathered(self, job: Job[Any]) -> bool:
        """Whether a batch that begins with a job may run now; waits a little where it may not, and others may run."""
        if self.max_delay <= 0 or self._closed:
            return True
        left = self.max_delay - (perf_counter_ns() - job.entered_ns) * 1e-9
        wanted = self._preferred[-1] if self._preferred else self.batch
        if left <= 0 or sum(other.waiting for other in self._sharing(job)) >= wanted:
            return True
        self._changed.wait(left)
        return False

    def _start_batch(self, job: Job[Any], taken: Pictures[Any], expired: list[Job[Any]]) -> None:
        waiting = sum(other.waiting for other in self._sharing(job))
        idle = max(1, self.instances - self._busy)
        size = min(self.batch, -(-waiting // idle))
        size = max((fitting for fitting in self._preferred if fitting <= size), default=size)
        while len(taken) < size and (sharing := self._sharing(job)):
            self._start(sharing[0], taken, expired)

    def _sharing(self, job: Job[Any]) -> list[Job[Any]]:
        """Waiting jobs whose pictures may be answered together with a job's, in their order."""
        jobs = self._levels[job.priority].get(job.lane, ())
        return [other for other in jobs if other.together == job.together]

    def _next(self) -> Job | None:  # type: ignore[type-arg]
        for level in self._levels:
            for jobs in level.values():
                return next(iter(jobs))
        return None

    def _start(self, job: Job[T], taken: Pictures[Any], expired: list[Job[Any]]) -> None:
        """Take up a job's next picture, or end the job where it is too late."""
        if job.deadline is not None and job.deadline <= monotonic():
            if self._settle(job, DeadlineExceeded("the request's deadline passed while it waited")):
                expired.append(job)
            return
        index = job.next
        if index == 0:
            job.queue_ns = perf_counter_ns() - job.entered_ns
        job.next += 1
        job.running += 1
        self.depth -= 1
        self.running += 1
        self.executed += 1
        level = self._levels[job.priority]
        if job.waiting:
            level[job.lane].move_to_end(job)
            level.move_to_end(job.lane)
        else:
            self._leave(job)
            if job.lane in level:
                level.move_to_end(job.lane)
        taken.append((job, index))

    def _check_wait(self, job: Job[T], deadline: float) -> None:
        before = sum(
            other.waiting for level in self._levels[: job.priority + 1] for jobs in level.values() for other in jobs
        )
        seconds = (before + job.size) * self._each / self.instances
        if monotonic() + seconds > deadline:
            raise QueueFull(
                f"the answer would come too late: {before} pictures wait before it, and the request's deadline leaves "
                f"{max(0.0, deadline - monotonic()):.3f} s of about {seconds:.3f} s"
            )

    def _leave(self, job: Job[T]) -> None:
        level = self._levels[job.priority]
        jobs = level[job.lane]
        del jobs[job]
        if not jobs:
            del level[job.lane]

    def _settle(self, job: Job[T], error: TriviumError | None) -> bool:
        """Under the lock: end a job, and take what waits of it out of the queue. False where it had ended."""
        if job.settled:
            return False
        job.settled = True
        job.error = error
        if job.waiting:
            self._leave(job)
            self.depth -= job.waiting
            job.next = job.size
            if job.running == 0:
                self._release(job)
        return True

    def _release(self, job: Job[T]) -> None:
        self.nbytes -= job.nbytes
        job.nbytes = 0

    @staticmethod
    def _complete(job: Job[T]) -> bool:
        return job.running == 0 and job.waiting == 0


def _tell(finished: list[Job[Any]]) -> None:
    for job in finished:
        job.done(job)
