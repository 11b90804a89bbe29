"""The same scoring on Ray: a pool of Ray Data actors, one engine of one thread each, on one machine or a cluster."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

from ..cpus import usable_cpus
from ..errors import MissingExtra, ServerError, TriviumError
from .pool import DEATHS
from .scorer import Chunk, Scored, Scorer, Task


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
    own = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": usable_cpus(), "include_dashboard": False}
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
        cause = getattr(error, "cause", None)
        if isinstance(cause, TriviumError):
            raise cause from None
        raise ServerError(f"Ray gave up: {_line(error)}") from None


class Actor:
    """A Scorer as Ray Data calls it: rows of pickled chunks in, rows of pickled answers out."""

    def __init__(self, task: Task) -> None:
        self._scorer = Scorer(task)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"scored": pickle.dumps(self._scorer.score(pickle.loads(row["chunk"])))}


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[-1] if lines else type(error).__name__)[:300]
