"""The models that a server answers for, by name and version."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import ConfigError, InvalidRequest, UnknownModel
from .predictor import Predictor


class Repository:
    """Predictors by name, and under each name by version."""

    def __init__(self) -> None:
        self._models: dict[str, dict[int, Predictor]] = {}

    def add(self, predictor: Predictor) -> None:
        """Serve a bundle.

        Raises: ConfigError where its name and version are served already.
        """
        manifest = predictor.manifest
        versions = self._models.setdefault(manifest.name, {})
        if int(manifest.version) in versions:
            raise ConfigError(f"two bundles are named {manifest.name!r}, version {manifest.version}")
        versions[int(manifest.version)] = predictor

    def get(self, name: str, version: str = "") -> Predictor:
        """The predictor of a name and version; an empty version is the highest.

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
        predictor = versions.get(int(version)) if len(version) < 20 else None
        if predictor is None:
            raise UnknownModel(
                f"Request for unknown model: {name!r} version {version[:40]} is not found; served: {self._served()}"
            )
        return predictor

    def versions(self, name: str) -> list[str]:
        """The versions served of a name, ascending."""
        return [str(version) for version in sorted(self._models[name])]

    def names(self) -> list[str]:
        return list(self._models)

    def __iter__(self) -> Iterator[Predictor]:
        for versions in self._models.values():
            yield from versions.values()

    def _served(self) -> str:
        return ", ".join(self._models)
