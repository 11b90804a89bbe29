"""A pool of scoring processes, one engine of one thread each; one that dies is replaced, and its chunk repeated.

The pool of the standard library gives up all work when one process dies.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess

from ..errors import ServerError, TriviumError
from .work import Chunk, Scored, Task

AHEAD = 2
"""Chunks given to a process at a time, so that it need not wait for the next."""
SECONDS = 5.0
"""For a process to end when its connection has."""
DEATHS = 3
"""Of the processes that had the same chunk, before the run gives up."""


def prepare() -> None:
    """Start the process that all others are forked from, which loads once what they need; without waiting for it."""
    multiprocessing.set_forkserver_preload([f"{__package__}.scorer", "onnxruntime", "PIL.JpegImagePlugin"])
    multiprocessing.forkserver.ensure_running()


def scored(chunks: Iterator[Chunk], task: Task, workers: int, say: Callable[[str], None]) -> Iterator[Scored]:
    """Answers in the order in which they come.

    Args:
        say: told a line when a process has died and another takes its place.

    Raises: what Scorer raises; ServerError where a chunk has killed DEATHS processes.
    """
    prepare()
    context = multiprocessing.get_context("forkserver")
    again: deque[Chunk] = deque()
    deaths: Counter[int] = Counter()
    pool: list[_Process] = []

    def take() -> Chunk | None:
        return again.popleft() if again else next(chunks, None)

    def feed(process: _Process) -> None:
        while len(process.chunks) < AHEAD and (chunk := take()):
            process.give(chunk)

    def grow() -> None:
        while len(pool) < workers and (chunk := take()):
            process = _Process(context, task)
            pool.append(process)
            process.give(chunk)
            feed(process)

    try:
        grow()
        while pool:
            by_connection = {process.connection: process for process in pool}
            for connection in wait(list(by_connection)):
                process = by_connection[connection]  # type: ignore[index]
                try:
                    answer = process.connection.recv()
                except (EOFError, OSError):
                    pool.remove(process)
                    ended = process.ended()
                    first = process.chunks[0]
                    deaths[first.start] += 1
                    if deaths[first.start] == DEATHS:
                        raise ServerError(_given_up(first, ended)) from None
                    say(f"a scoring process {ended}; another takes its place")
                    again.extend(process.chunks)
                    grow()
                    continue
                if isinstance(answer, TriviumError):
                    raise answer
                process.chunks.popleft()
                feed(process)
                if not process.chunks:
                    pool.remove(process)
                    process.stop()
                yield answer
    finally:
        for process in pool:
            process.kill()


class _Process:
    def __init__(self, context: multiprocessing.context.ForkServerContext, task: Task) -> None:
        self.connection, theirs = context.Pipe()
        self.chunks: deque[Chunk] = deque()
        self._process: ForkServerProcess = context.Process(target=_work, args=(theirs, task), daemon=True)
        self._process.start()
        # so that the end of the process is the end of the connection
        theirs.close()

    def give(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        try:
            self.connection.send(chunk)
        except OSError:  # it is dead, which its connection says too
            return

    def stop(self) -> None:
        """Have a process that has nothing to do end."""
        self.connection.close()
        self._process.join()

    def kill(self) -> None:
        self._process.kill()
        self.stop()

    def ended(self) -> str:
        """How a dead process ended, in words."""
        self._process.join(SECONDS)
        self.kill()
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            return "was killed (signal 9, as for want of memory)"
        return f"died of signal {-code}" if code < 0 else f"ended with status {code}"


def _work(connection: Connection, task: Task) -> None:
    # Ctrl-C is for the parent, whose end is the end of the connection
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # loaded in the process that this one was forked from
    from .scorer import Scorer

    try:
        scorer = Scorer(task)
        while True:
            connection.send(scorer.score(connection.recv()))
    except TriviumError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _given_up(chunk: Chunk, ended: str) -> str:
    first, last = chunk.pictures[0].path, chunk.pictures[-1].path
    what = f"{first!r}" if len(chunk.pictures) == 1 else f"the {len(chunk.pictures)} pictures {first!r} to {last!r}"
    return f"{DEATHS} processes that should score {what} did not live to do it; the last {ended}"
