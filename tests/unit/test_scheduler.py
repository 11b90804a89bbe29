"""The queue: order, fairness, bounds, deadlines, removal, and that nothing is lost or done twice under fire."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from trivium.runtime.errors import DeadlineExceeded, EngineError, InvalidPicture, QueueFull, ShuttingDown
from trivium.runtime.scheduler import NORMAL, URGENT, Job, Scheduler


class Gate:
    """A job's work that waits until it is let through, and notes what ran."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.started = threading.Semaphore(0)
        self.ran: list[Any] = []

    def job(self, name: str, size: int = 1, **options: Any) -> Job[Any]:
        def run(index: int) -> Any:
            self.ran.append((name, index))
            self.started.release()
            self.open.wait(10)
            return name, index

        return finished_job(size, run, **options)


def finished_job(size: int, run: Callable[[int], Any], **options: Any) -> Job[Any]:
    return Job(size, lambda _, index: run(index), lambda job: done[job].append(job), **options)


done: defaultdict[Job[Any], list[Job[Any]]] = defaultdict(list)
"""How often each job of the running test was done."""


@pytest.fixture(autouse=True)
def _forget() -> None:
    done.clear()


@pytest.fixture
def make() -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def build(*arguments: int) -> Scheduler:
        made.append(Scheduler(*arguments))
        return made[-1]

    yield build
    for scheduler in made:
        scheduler.close(10)


def wait(job: Job[Any]) -> Job[Any]:
    end = time.monotonic() + 10
    while not done[job]:
        assert time.monotonic() < end, "the job was never done"
        time.sleep(0.001)
    assert len(done[job]) == 1
    return job


def blocked(make: Callable[..., Scheduler], *arguments: int) -> tuple[Scheduler, Gate]:
    """A scheduler of one worker, busy until the gate opens."""
    scheduler, gate = make(1, *(arguments or (100,))), Gate()
    scheduler.submit(gate.job("first"))
    assert gate.started.acquire(timeout=10)
    return scheduler, gate


def test_results_keep_their_order(make: Callable[..., Scheduler]) -> None:
    scheduler = make(3, 100)
    job = finished_job(50, lambda index: index * index)
    scheduler.submit(job)
    assert wait(job).results == [i * i for i in range(50)]
    assert job.error is None
    assert (scheduler.depth, scheduler.running, scheduler.executed) == (0, 0, 50)


def test_requests_and_models_take_turns(make: Callable[..., Scheduler]) -> None:
    scheduler, gate = blocked(make)
    jobs = [gate.job("a", 3, lane="x"), gate.job("b", 2, lane="x"), gate.job("c", 2, lane="y")]
    for job in jobs:
        scheduler.submit(job)
    gate.open.set()
    for job in jobs:
        wait(job)
    # lanes x and y alternate; within x, a and b do
    assert gate.ran[1:] == [("a", 0), ("c", 0), ("b", 0), ("c", 1), ("a", 1), ("b", 1), ("a", 2)]


def test_urgent_goes_first(make: Callable[..., Scheduler]) -> None:
    scheduler, gate = blocked(make)
    jobs = [gate.job("normal", 2, priority=NORMAL), gate.job("urgent", 2, priority=URGENT)]
    for job in jobs:
        scheduler.submit(job)
    gate.open.set()
    for job in jobs:
        wait(job)
    assert [name for name, _ in gate.ran[1:]] == ["urgent", "urgent", "normal", "normal"]


def test_no_worker_takes_more_than_one(make: Callable[..., Scheduler]) -> None:
    scheduler, gate = make(3, 100), Gate()
    scheduler.submit(gate.job("many", 9))
    for _ in range(3):
        assert gate.started.acquire(timeout=10)
    assert not gate.started.acquire(timeout=0.05)
    assert (scheduler.running, scheduler.depth) == (3, 6)
    gate.open.set()


def test_bounds(make: Callable[..., Scheduler]) -> None:
    scheduler, gate = blocked(make, 4, 1000)
    scheduler.submit(gate.job("three", 3, nbytes=600))
    with pytest.raises(QueueFull, match="3 pictures wait, 4 may, the request has 2"):
        scheduler.submit(gate.job("two", 2))
    with pytest.raises(QueueFull, match="600 bytes, 1000 may be held"):
        scheduler.submit(gate.job("large", 1, nbytes=500))
    last = gate.job("one", 1, nbytes=400)
    scheduler.submit(last)
    gate.open.set()
    wait(last)
    end = time.monotonic() + 10
    while scheduler.nbytes or scheduler.depth or scheduler.running:
        assert time.monotonic() < end
        time.sleep(0.001)
    scheduler.submit(gate.job("again", 4, nbytes=1000))


def test_a_deadline_that_passes_in_the_queue_never_runs(make: Callable[..., Scheduler]) -> None:
    scheduler, gate = blocked(make)
    late = gate.job("late", 2, nbytes=10, deadline=time.monotonic() + 0.02)
    scheduler.submit(late)
    time.sleep(0.03)
    gate.open.set()
    assert isinstance(wait(late).error, DeadlineExceeded)
    assert gate.ran == [("first", 0)]
    assert (scheduler.depth, scheduler.nbytes) == (0, 0)
    with pytest.raises(DeadlineExceeded):
        scheduler.submit(gate.job("later", deadline=time.monotonic() - 1))


def test_removal_is_at_once_and_happens_once(make: Callable[..., Scheduler]) -> None:
    scheduler, gate = blocked(make)
    job = gate.job("job", 3, nbytes=7)
    scheduler.submit(job)
    assert scheduler.remove(job, DeadlineExceeded("late"))
    assert not scheduler.remove(job, DeadlineExceeded("later"))
    assert str(wait(job).error) == "late"
    assert (scheduler.depth, scheduler.nbytes) == (0, 0)
    gate.open.set()
    time.sleep(0.02)
    assert gate.ran == [("first", 0)]


def test_removal_of_a_running_job_drops_its_answer_and_keeps_its_bytes_until_then(
    make: Callable[..., Scheduler],
) -> None:
    scheduler, gate = make(1, 10), Gate()
    job = gate.job("job", 3, nbytes=7)
    scheduler.submit(job)
    assert gate.started.acquire(timeout=10)
    assert scheduler.remove(job, DeadlineExceeded("late"))
    assert (scheduler.depth, scheduler.nbytes) == (0, 7)
    gate.open.set()
    after = gate.job("after")
    scheduler.submit(after)
    wait(after)
    wait(job)
    assert gate.ran == [("job", 0), ("after", 0)]
    assert scheduler.nbytes == 0


def test_one_bad_picture_fails_its_request_alone(make: Callable[..., Scheduler]) -> None:
    scheduler = make(1, 100)
    ran: list[int] = []

    def run(index: int) -> int:
        ran.append(index)
        if index == 1:
            raise InvalidPicture("picture 1 is bad")
        return index

    bad, good = finished_job(10, run), finished_job(1, lambda index: index)
    scheduler.submit(bad)
    scheduler.submit(good)
    assert isinstance(wait(bad).error, InvalidPicture)
    assert wait(good).results == [0]
    assert ran == [0, 1]


def test_workers_outlive_bugs(make: Callable[..., Scheduler], caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make(1, 100)
    bug = finished_job(1, lambda index: 1 // index)
    scheduler.submit(bug)
    assert isinstance(wait(bug).error, EngineError)
    assert "ZeroDivisionError" in caplog.text
    assert "division" not in str(bug.error)
    good = finished_job(1, lambda index: index)
    scheduler.submit(good)
    assert wait(good).error is None


def test_close_refuses_what_waits_and_finishes_what_runs(make: Callable[..., Scheduler]) -> None:
    scheduler, gate = blocked(make)
    waiting = gate.job("waiting")
    scheduler.submit(waiting)
    threading.Timer(0.02, gate.open.set).start()
    scheduler.close(10)
    assert isinstance(wait(waiting).error, ShuttingDown)
    assert gate.ran == [("first", 0)]
    with pytest.raises(ShuttingDown):
        scheduler.submit(gate.job("new"))


def test_under_fire_every_job_is_done_exactly_once_with_its_own_answer(make: Callable[..., Scheduler]) -> None:
    scheduler = make(4, 40, 4000)
    accepted: list[tuple[Job[Any], int]] = []
    guard = threading.Lock()

    def answer(token: int, index: int) -> int:
        time.sleep(0.0001)
        return token * 10 + index

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for number in range(150):
            token = seed * 1000 + number
            deadline = time.monotonic() + rng.choice([0.0005, 0.002, 10.0])
            job = finished_job(
                rng.randint(1, 8),
                partial(answer, token),
                nbytes=rng.randint(0, 300),
                lane=rng.choice("xyz"),
                priority=rng.choice([URGENT, NORMAL]),
                deadline=deadline,
            )
            try:
                scheduler.submit(job)
            except (QueueFull, DeadlineExceeded):
                time.sleep(0.001)
                continue
            with guard:
                accepted.append((job, token))
            if rng.random() < 0.2:
                scheduler.remove(job, DeadlineExceeded("left"))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accepted) > 50
    outcomes = set()
    for job, token in accepted:
        wait(job)
        outcomes.add(type(job.error))
        if job.error is None:
            assert job.results == [token * 10 + i for i in range(job.size)]
    assert outcomes == {type(None), DeadlineExceeded}
    scheduler.close(10)
    assert (scheduler.depth, scheduler.running, scheduler.nbytes) == (0, 0, 0)


class Together:
    """Work on batches, which notes what ran together; "bad" pictures are errors of their own."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.started = threading.Semaphore(0)
        self.batches: list[list[tuple[str, int]]] = []

    def __call__(self, pictures: list[tuple[Job[Any], int]]) -> list[Any]:
        self.batches.append([(job.payload, index) for job, index in pictures])
        self.started.release()
        self.open.wait(10)
        return [InvalidPicture("bad") if job.payload == "bad" else (job.payload, i) for job, i in pictures]

    def job(self, name: str, size: int = 1, **options: Any) -> Job[Any]:
        def alone(index: int) -> Any:
            self.batches.append([(name, index)])
            self.started.release()
            self.open.wait(10)
            return name, index

        return finished_job(size, alone, together=self, payload=name, **options)


@pytest.fixture
def batching() -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def build(instances: int = 1, **options: Any) -> Scheduler:
        made.append(Scheduler(instances, 100, **options))
        return made[-1]

    yield build
    for scheduler in made:
        scheduler.close(10)


def test_what_waits_runs_together_and_each_has_its_own_answer(batching: Callable[..., Scheduler]) -> None:
    scheduler, work = batching(batch=4), Together()
    jobs = [work.job("first"), work.job("a", 2), work.job("bad"), work.job("b"), work.job("c")]
    scheduler.submit(jobs[0])
    assert work.started.acquire(timeout=10)
    for job in jobs[1:]:
        scheduler.submit(job)
    work.open.set()
    for job in jobs:
        wait(job)
    assert [len(batch) for batch in work.batches] == [1, 4, 1]
    # in turns: no request has two pictures before each has one
    assert work.batches[1] == [("a", 0), ("bad", 0), ("b", 0), ("c", 0)]
    assert [job.results for job in jobs if job.error is None] == [
        [("first", 0)], [("a", 0), ("a", 1)], [("b", 0)], [("c", 0)],
    ]  # fmt: skip
    assert isinstance(jobs[2].error, InvalidPicture)
    assert (scheduler.depth, scheduler.running, scheduler.nbytes) == (0, 0, 0)


def test_different_work_is_not_mixed(batching: Callable[..., Scheduler]) -> None:
    scheduler, one, two = batching(batch=8), Together(), Together()
    scheduler.submit(one.job("first"))
    assert one.started.acquire(timeout=10)
    jobs = [one.job("a"), two.job("b"), one.job("c"), two.job("d"), one.job("u", priority=URGENT)]
    for job in jobs:
        scheduler.submit(job)
    one.open.set()
    two.open.set()
    for job in jobs:
        wait(job)
    assert one.batches[1:] == [[("u", 0)], [("a", 0), ("c", 0)]]
    assert two.batches == [[("b", 0), ("d", 0)]]


def test_a_picture_waits_for_others_no_longer_than_it_may(batching: Callable[..., Scheduler]) -> None:
    scheduler, work = batching(batch=3, max_delay=30.0), Together()
    work.open.set()
    jobs = [work.job("a"), work.job("b")]
    for job in jobs:
        scheduler.submit(job)
    time.sleep(0.05)
    assert work.batches == []
    jobs.append(work.job("c"))
    scheduler.submit(jobs[-1])
    for job in jobs:
        wait(job)
    assert [len(batch) for batch in work.batches] == [3]
    impatient = batching(batch=3, max_delay=0.01)
    lonely = work.job("d")
    impatient.submit(lonely)
    wait(lonely)
    assert lonely.queue_ns >= 10_000_000


def test_preferred_sizes_come_first(batching: Callable[..., Scheduler]) -> None:
    scheduler, work = batching(batch=8, preferred=(2, 4, 16)), Together()
    scheduler.submit(work.job("first"))
    assert work.started.acquire(timeout=10)
    jobs = [work.job(str(i)) for i in range(7)]
    for job in jobs:
        scheduler.submit(job)
    work.open.set()
    for job in jobs:
        wait(job)
    assert [len(batch) for batch in work.batches] == [1, 4, 2, 1]


def test_a_worker_takes_no_more_than_its_share(batching: Callable[..., Scheduler]) -> None:
    scheduler, work = batching(2, batch=8), Together()
    many = work.job("many", 6)
    scheduler.submit(many)
    for _ in range(2):
        assert work.started.acquire(timeout=10)
    # both workers have some of it, and nothing waits
    assert sorted(map(len, work.batches)) == [3, 3]
    work.open.set()
    wait(many)


def test_what_would_come_too_late_is_refused_at_once(batching: Callable[..., Scheduler]) -> None:
    scheduler = batching(shed_late=True)
    slow = finished_job(4, lambda index: time.sleep(0.05))
    scheduler.submit(slow)
    wait(slow)
    queue = [finished_job(1, lambda index: time.sleep(0.05)) for _ in range(10)]
    for job in queue:
        scheduler.submit(job)
    with pytest.raises(QueueFull, match="too late"):
        scheduler.submit(finished_job(1, lambda index: index, deadline=time.monotonic() + 0.1))
    unhurried = finished_job(1, lambda index: index, deadline=time.monotonic() + 60)
    scheduler.submit(unhurried)
    # what goes before the queue need not wait for it
    urgent = finished_job(1, lambda index: index, priority=URGENT, deadline=time.monotonic() + 0.3)
    scheduler.submit(urgent)
    assert wait(unhurried).error is None
    assert wait(urgent).error is None


def test_a_batch_that_fails_fails_for_all_and_the_worker_lives(batching: Callable[..., Scheduler]) -> None:
    scheduler, gate = batching(batch=4), Gate()
    scheduler.submit(gate.job("first"))
    assert gate.started.acquire(timeout=10)

    def broken(pictures: list[tuple[Job[Any], int]]) -> list[Any]:
        raise ZeroDivisionError

    jobs = [finished_job(1, lambda index: index, together=broken) for _ in range(3)]
    for job in jobs:
        scheduler.submit(job)
    gate.open.set()
    assert {type(wait(job).error) for job in jobs} == {EngineError}
    last = gate.job("last")
    scheduler.submit(last)
    assert wait(last).results == [("last", 0)]


def test_a_job_is_answered_in_the_callers_thread_where_nothing_waits(make: Callable[..., Scheduler]) -> None:
    scheduler = make(1, 10)
    job = finished_job(3, lambda index: (index, threading.current_thread()), nbytes=7)
    assert scheduler.run_here(job)
    assert job.results == [(index, threading.current_thread()) for index in range(3)]
    assert job.error is None
    assert not done[job]
    assert (scheduler.executed, scheduler.depth, scheduler.running, scheduler.nbytes) == (3, 0, 0, 0)


def test_what_waits_goes_before_what_could_run_in_the_callers_thread(make: Callable[..., Scheduler]) -> None:
    scheduler, gate = blocked(make)
    # the worker is busy, but nothing waits
    assert scheduler.run_here(finished_job(1, lambda _: None))
    scheduler.submit(waiting := gate.job("waiting"))
    late = gate.job("late")
    assert not scheduler.run_here(late)
    assert (late.next, scheduler.depth) == (0, 1)
    scheduler.submit(late)
    gate.open.set()
    wait(late)
    wait(waiting)
    assert [name for name, _ in gate.ran] == ["first", "waiting", "late"]


def test_the_callers_thread_keeps_the_queues_rules(make: Callable[..., Scheduler]) -> None:
    scheduler = make(1, 2, 100)
    ran: list[int] = []
    for error, options in (
        (DeadlineExceeded, {"deadline": time.monotonic() - 1}),
        (QueueFull, {"size": 3}),
        (QueueFull, {"nbytes": 101}),
    ):
        with pytest.raises(error):
            scheduler.run_here(finished_job(run=ran.append, **{"size": 1, **options}))  # type: ignore[arg-type]
    scheduler.close(10)
    with pytest.raises(ShuttingDown):
        scheduler.run_here(finished_job(1, ran.append))
    assert ran == []
    assert (scheduler.executed, scheduler.depth, scheduler.nbytes) == (0, 0, 0)


def test_an_error_in_the_callers_thread_ends_the_job(make: Callable[..., Scheduler]) -> None:
    def run(index: int) -> int:
        if index == 1:
            raise InvalidPicture("picture 1: no")
        return index

    scheduler = make(1, 10)
    job = finished_job(3, run, nbytes=7)
    assert scheduler.run_here(job)
    assert isinstance(job.error, InvalidPicture)
    assert (scheduler.running, scheduler.depth, scheduler.nbytes) == (0, 0, 0)
