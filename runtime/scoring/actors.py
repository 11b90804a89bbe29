"""Engines of one thread as actors of Ray, on one machine or a cluster: for scoring by Ray Data, and for evaluation."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trivium.kernels import HeadStatistics

from ..bundle import MANIFEST, digest, open_bundle
from ..cpus import usable_cpus
from ..engine import Engine
from ..errors import DigestMismatch, MissingExtra, ServerError, TriviumError
from .pool import DEATHS
from .scorer import Scorer
from .work import Chunk, Scored, Task


def load() -> Any:
    """The module ray, with ray.data.

    Raises: MissingExtra.
    """
    # before it is loaded; it would warn of what its own library does
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        missing = (error.name or "ray").split(".")[0]
        raise MissingExtra(f"the package {missing!r} is not installed; run: pip install 'trivium[ray]'") from None
    return ray


def connect(ray: Any) -> int:
    """Join the cluster that RAY_ADDRESS names, or else make one of this machine's cores; how many there are.

    Raises: ServerError where there is no cluster.
    """
    # a cluster has counted its cores; Ray itself would count those of the machine instead of the cgroup's
    own: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        own = {"address": "local", "num_cpus": usable_cpus(), "include_dashboard": False}
    try:
        ray.init(ignore_reinit_error=True, logging_level="error", log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise ServerError(f"no Ray cluster: {_line(error)}") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def scored(chunks: Iterator[Chunk], task: Task, workers: int | None) -> Iterator[Scored]:
    """Answers in the order in which they come; Ray gives the chunks of an actor that died to another.

    Args:
        workers: actors; None takes one for each core of the cluster.

    Raises: what Scorer raises; MissingExtra; ServerError where Ray gives up.
    """
    ray = load()
    cores = connect(ray)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # a block each, so that every answer is had as soon as it is there
    rows = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    with warnings.catch_warnings():
        # Ray 2.64 is to have another way to say how often a task is repeated
        warnings.simplefilter("ignore", DeprecationWarning)
        answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Actor,
            fn_constructor_args=(task,),
            compute=ray.data.ActorPoolStrategy(size=min(len(rows), workers or cores)),
            num_cpus=1,
            max_task_retries=DEATHS - 1,
        )
    try:
        for row in answers.iter_rows():
            yield pickle.loads(row["scored"])
    except ray.exceptions.RayError as error:
        raise _ours(error) from None


class Actor:
    """A Scorer as Ray Data calls it: rows of pickled chunks in, rows of pickled answers out."""

    def __init__(self, task: Task) -> None:
        self._scorer = Scorer(task)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"scored": pickle.dumps(self._scorer.score(pickle.loads(row["chunk"])))}


class ActorEngine:
    """A bundle's engines of one thread in as many actors as the cluster has cores; Ray restarts one that dies.

    Raises: MissingExtra; ServerError where there is no cluster.
    """

    def __init__(self, bundle: str) -> None:
        self._ray = load()
        cores = connect(self._ray)
        remote = self._ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=DEATHS - 1)(_EngineActor)
        path, wanted = Path(bundle).absolute(), digest(Path(bundle) / MANIFEST)
        self._actors = [remote.remote(path, wanted) for _ in range(cores)]

    def run_batch(self, images: NDArray[np.uint8], batch: int = 64) -> HeadStatistics:
        """As Engine.run_batch, in batches that keep all actors busy.

        Raises: EngineError; ServerError where Ray gives up.
        """
        batch = min(batch, -(-len(images) // len(self._actors)))
        answers = [
            self._actors[number % len(self._actors)].run_batch.remote(images[start : start + batch])
            for number, start in enumerate(range(0, len(images), batch))
        ]
        try:
            rows = self._ray.get(answers)
        except self._ray.exceptions.RayError as error:
            raise _ours(error) from None
        return HeadStatistics(*(np.concatenate(column) for column in zip(*rows, strict=True)))


class _EngineActor:
    def __init__(self, path: Path, wanted: str) -> None:
        self._engine = Engine(open_bundle(path))
        if digest(path / MANIFEST) != wanted:
            raise DigestMismatch(f"{path}: on this node it is another bundle")

    def run_batch(self, images: NDArray[np.uint8]) -> HeadStatistics:
        return self._engine.run_batch(images, len(images))


def _ours(error: Exception) -> TriviumError:
    """What was raised in an actor, or that Ray gave up."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, TriviumError) else ServerError(f"Ray gave up: {_line(error)}")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__)[:300]
