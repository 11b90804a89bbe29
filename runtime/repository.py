"""The models that a server answers for, by name and version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from .batch import Batch
from .bundle import Manifest
from .errors import ConfigError, InvalidRequest, UnknownModel
from .metrics import Metrics
from .predictor import Predictor


class Served:
    """A predictor that takes requests, or finishes those it took."""

    __slots__ = ("counted", "in_flight", "last_ms", "predictor", "together")

    def __init__(self, predictor: Predictor, metrics: Metrics) -> None:
        self.predictor = predictor
        self.together = Batch(predictor)
        """Answers pictures of several requests at once."""
        self.counted = metrics.model(predictor)
        self.in_flight = 0
        """Requests not yet answered."""
        self.last_ms = 0
        """When it last answered, in milliseconds since 1970."""

    @property
    def manifest(self) -> Manifest:
        return self.predictor.manifest


class Repository:
    """What is served by name, and under each name by version; of the event loop that owns it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._models: dict[str, dict[int, Served]] = {}

    def replace(self, old: Served | None, predictor: Predictor) -> Served:
        """Serve a predictor, in place of an old one if there is one: no request finds neither.

        Raises: ConfigError where another than `old` has its name and version.
        """
        manifest = predictor.manifest
        version = int(manifest.version)
        taken = self._models.get(manifest.name, {}).get(version)
        if taken is not None and taken is not old:
            raise ConfigError(f"two bundles are named {manifest.name!r}, version {manifest.version}")
        served = Served(predictor, self._metrics)
        self._models.setdefault(manifest.name, {})[version] = served
        if old is not None and taken is None:
            self.remove(old)
        return served

    def remove(self, served: Served) -> None:
        """Give no new request to it."""
        versions = self._models[served.manifest.name]
        del versions[int(served.manifest.version)]
        if not versions:
            del self._models[served.manifest.name]

    async def drained(self, served: Served) -> None:
        """Wait until one that was replaced or removed has answered all its requests, and forget its metrics."""
        while served.in_flight:
            await asyncio.sleep(0.01)
        # one of the same name and version goes on with the same cells
        if all(served.counted is not other.counted for other in self):
            self._metrics.forget(served.counted)

    def get(self, name: str, version: str = "") -> Served:
        """What serves a name and version; an empty version is the highest.

        Raises: UnknownModel, InvalidRequest for a version that is no number.
        """
        versions = self._models.get(name)
        if versions is None:
            raise UnknownModel(f"Request for unknown model: {name[:200]!r} is not found; served: {self._served()}")
        if not version:
            return versions[max(versions)]
        if not (version.isascii() and version.isdigit()):
            raise InvalidRequest(f"failed to get model version from specified version string {version[:40]!r}")
        # a very long number is an unknown version, not a reason to compute with it
        served = versions.get(int(version)) if len(version) < 20 else None
        if served is None:
            raise UnknownModel(
                f"Request for unknown model: {name!r} version {version[:40]} is not found; "
                f"versions served: {', '.join(self.versions(name))}"
            )
        return served

    def versions(self, name: str) -> list[str]:
        """The versions served of a name, ascending."""
        return [str(version) for version in sorted(self._models[name])]

    def names(self) -> list[str]:
        return list(self._models)

    def __iter__(self) -> Iterator[Served]:
        for versions in self._models.values():
            yield from versions.values()

    def _served(self) -> str:
        return ", ".join(self._models) or "none"
