"""Reloads under fire: a model whose versions take turns, and which of them may answer when."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc


class Timeline:
    """When a model's versions came to serve.

    A turn happens at a moment unknown between `begun` and `done`, in seconds of time.monotonic().
    """

    def __init__(self, version: str) -> None:
        self._turns: list[list[Any]] = [[version, 0.0, 0.0]]
        self._changing = threading.Lock()

    def begin(self, version: str) -> None:
        with self._changing:
            self._turns.append([version, time.monotonic(), float("inf")])

    def done(self) -> None:
        with self._changing:
            self._turns[-1][2] = time.monotonic()

    def during(self, start: float, end: float) -> set[str]:
        """The versions that may have served at a moment between start and end."""
        with self._changing:
            turns = [(version, begun, done) for version, begun, done in self._turns]
        until = [done for _, _, done in turns[1:]] + [float("inf")]
        return {
            version for (version, begun, _), last in zip(turns, until, strict=True) if begun <= end and last >= start
        }


class Reloader(threading.Thread):
    """Turns a link from bundle to bundle and asks for a load each time.

    Args:
        link: the served directory, at present a link to the first bundle.
        bundles: version -> directory, good ones; the first one serves.
        bad: one that must be refused, tried after every third turn.
        every: seconds between turns.
    """

    def __init__(self, url: str, model: str, link: Path, bundles: dict[str, Path], bad: Path, every: float) -> None:
        super().__init__(daemon=True)
        self._channel = grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._model, self._link, self._bundles, self._bad, self._every = model, link, bundles, bad, every
        self._end = threading.Event()
        self.timeline = Timeline(next(iter(bundles)))
        self.turns = self.refusals = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        versions = itertools.cycle(self._bundles)
        next(versions)
        while not self._end.wait(self._every):
            version = next(versions)
            self.timeline.begin(version)
            if (said := self._load(self._bundles[version])) != "OK":
                self.wrong.append(f"version {version} was not loaded: {said}")
            self.timeline.done()
            self.turns += 1
            if self.turns % 3 == 0:
                if (said := self._load(self._bad)) != "FAILED_PRECONDITION":
                    self.wrong.append(f"a bad bundle: {said}")
                self.refusals += 1
        self._channel.close()

    def stop(self) -> None:
        self._end.set()
        self.join(60)

    def _load(self, bundle: Path) -> str:
        following = self._link.with_name(f"{self._link.name}.next")
        following.symlink_to(bundle)
        following.replace(self._link)
        try:
            request = service_pb2.RepositoryModelLoadRequest(model_name=self._model)
            self._stub.RepositoryModelLoad(request, timeout=120)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"
