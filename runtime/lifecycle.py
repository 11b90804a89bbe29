"""The models' life: loaded and tested beside those that serve, switched, drained, watched.

A bundle that is refused, for whatever reason, changes nothing but what the log, the metrics and the index say of it.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import thread_time

from . import memory
from .config import Settings
from .errors import ConfigError, DigestMismatch, EngineError, ManifestError, TriviumError, UnknownModel
from .health import NOT_SERVING, SERVING, Health
from .logs import about
from .metrics import Loads
from .predictor import Predictor
from .preprocess import Limits
from .repository import Repository, Served
from .sources import Group, Source, look, scan

WATCH_SECONDS = 1.0
"""Between looks; a directory is loaded when two looks agree, so that one still being copied is left alone."""
WARM_UP_SECONDS = 0.01
"""CPU time that an engine is measured for; one call at least."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A line of the repository's index."""

    name: str
    version: str
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE."""
    reason: str


class Lifecycle:
    """Loads, switches and drains; of the event loop that owns it.

    Args:
        settings: which bundles, and how to run them.
        repository: where predictors are served from.
        loads: where outcomes are counted.
        health: where models are said to serve.
    """

    def __init__(self, settings: Settings, repository: Repository, loads: Loads, health: Health) -> None:
        self._settings = settings
        self._repository = repository
        self._loads = loads
        self._health = health
        self._limits = Limits(settings.max_picture_bytes, settings.max_picture_pixels)
        self._named = [Group(1, [Source(path)]) for path in settings.bundles]
        self._models: dict[str, Group] = {}
        self._one_at_a_time = asyncio.Lock()
        self._started = False
        self._draining: dict[Served, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Load everything.

        Raises: BundleError, EngineError, ConfigError where a named bundle, or every version of a model in the
            repository, is refused.
        """
        if self._settings.repository is not None:
            self._find(scan(self._settings.repository))
            if not self._models and not self._named:
                raise ConfigError(f"{self._settings.repository}: no bundle; they are looked for as MODEL/VERSION in it")
        for group in self._groups():
            refused = await self._settle(group)
            if refused is not None and not any(source.served for source in group.sources):
                raise refused
            for source in group.sources:
                if source.refusal:
                    _log.error("%s: refused: %s", source.path, source.refusal)
        self._started = True

    async def load(self, name: str) -> None:
        """Look for a model's bundles now, and serve what is new.

        Raises: UnknownModel; the TriviumError for which the newest version is refused. What served before still does.
        """
        await asyncio.shield(asyncio.ensure_future(self._load(name)))

    async def unload(self, name: str) -> None:
        """Stop serving a model; what was accepted is answered.

        Raises: UnknownModel.
        """
        async with self._one_at_a_time:
            for group in self._of(name):
                group.unloaded = True
                for source in group.sources:
                    self._release(source)
                    source.tried, source.refusal = (), "unloaded"

    async def watch(self) -> None:
        """Follow changes on the disk until cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                async with self._one_at_a_time:
                    await self._look_around()
            except TriviumError as error:
                _log.error("watching: %s", error)
            except Exception:  # the watch must outlive whatever a directory does to it
                _log.exception("watching failed")

    def index(self, ready: bool) -> Iterator[Entry]:
        """What is served, and why the rest is not."""
        listed = set()
        for group in self._groups():
            for source in group.newest_first():
                served = source.served
                version = served.manifest.version if served is not None else source.version
                reason = source.refusal
                if served is not None:
                    state = "READY" if ready else "UNAVAILABLE"
                elif source.tried or reason:
                    state, reason = "UNAVAILABLE", reason or "newer versions are served"
                else:
                    state = "LOADING"
                listed.add((source.name, version))
                yield Entry(source.name, version, state, reason)
        for served in self._draining:
            key = served.manifest.name, served.manifest.version
            if key not in listed:
                listed.add(key)
                yield Entry(*key, "UNLOADING", "finishing what it was asked")

    async def _load(self, name: str) -> None:
        async with self._one_at_a_time:
            if self._settings.repository is not None:
                self._find(await asyncio.to_thread(scan, self._settings.repository))
            refusals = []
            for group in self._of(name):
                group.unloaded = False
                for source in group.sources:
                    if source.refusal:
                        source.tried, source.refusal = (), ""
                refusals.append(await self._settle(group))
        for refused in refusals:
            if refused is not None:
                raise refused

    async def _look_around(self) -> None:
        if self._settings.repository is not None:
            self._find(await asyncio.to_thread(scan, self._settings.repository))
        for group in self._groups():
            if group.unloaded:
                continue
            before = [source.seen for source in group.sources]
            await self._look(group)
            steady = before == [source.seen for source in group.sources]
            due = any(source.gone or source.seen not in ((), source.tried) for source in group.sources)
            if steady and due:
                await self._settle(group)

    async def _look(self, group: Group) -> None:
        for source in group.sources:
            source.seen = await asyncio.to_thread(look, source.path)

    def _groups(self) -> list[Group]:
        return [*self._named, *self._models.values()]

    def _of(self, name: str) -> list[Group]:
        if not (found := [group for group in self._groups() if group.name == name]):
            raise UnknownModel(f"no bundle of a model {name[:200]!r} is known to this server")
        return found

    def _find(self, found: dict[str, dict[str, Path]]) -> None:
        """Take in which folders a repository has."""
        for name, versions in found.items():
            group = self._models.setdefault(name, Group(self._settings.keep_versions))
            known = {source.version for source in group.sources}
            group.sources += [Source(path, name, version) for version, path in versions.items() if version not in known]
        for name, group in self._models.items():
            for source in group.sources:
                source.gone = source.version not in found.get(name, {})

    async def _settle(self, group: Group) -> TriviumError | None:
        """Serve the newest versions that load, then let go of the others; why the newest was refused, if it was.

        Where none loads, those that served go on, even if their directories are gone.
        """
        await self._look(group)
        serving: list[Source] = []
        refused: TriviumError | None = None
        for position, source in enumerate(group.newest_first()):
            if source.gone:
                continue
            if len(serving) == group.keep:
                source.tried = source.seen
                continue
            if source.seen != source.tried or (source.served is None and not source.refusal):
                error = await self._try(source)
                refused = error if position == 0 else refused
            if source.served is not None:
                serving.append(source)
        for source in group.sources if serving else []:
            if source not in serving:
                self._release(source)
        group.sources = [source for source in group.sources if source.served or not source.gone] or group.sources
        return refused

    async def _try(self, source: Source) -> TriviumError | None:
        try:
            predictor = await asyncio.to_thread(self._open, source)
            self._switch(source, predictor)
        except TriviumError as error:
            refused = error
        except Exception:  # a bundle comes from outside, and must not end what serves
            _log.exception("%s: loading failed", source.path)
            refused = EngineError("the bundle could not be loaded; the server's log says why")
        else:
            source.tried, source.refusal = source.seen, ""
            return None
        source.tried, source.refusal = source.seen, str(refused)
        self._loads.count(source.name, "refused", type(refused).__name__)
        # at the start the caller decides whether one refusal is the end
        if self._started:
            serving = self._repository.versions(source.name) if source.name in self._repository.names() else []
            kept = f"; version {', '.join(serving)} serves on" if serving else ""
            told = about(model=source.name, version=source.version)
            _log.error("%s: refused: %s: %s%s", source.path, type(refused).__name__, refused, kept, extra=told)
        return refused

    def _open(self, source: Source) -> Predictor:
        """In a thread: open, verify, start, self-test and warm up.

        Raises: BundleError, EngineError, MissingExtra.
        """
        # a link is followed once, so that it may be set to another bundle meanwhile
        path = source.path.resolve()
        before = look(path)
        predictor = Predictor.load(
            path,
            kernels=self._settings.kernels,
            device=self._settings.device,
            limits=self._limits,
            engine=self._settings.engine,
            cache=self._settings.engine_cache,
        )
        if look(path) != before:
            # what runs may not be what was verified
            raise DigestMismatch("the bundle changed while it was loaded; put bundles there by renaming them")
        manifest = predictor.manifest
        if source.name and manifest.name != source.name:
            raise ManifestError(f"the manifest names the model {manifest.name!r}, expected {source.name!r}")
        if source.version and manifest.version != source.version:
            raise ManifestError(f"the manifest says version {manifest.version}, its folder {source.version}")
        warm_up(predictor)
        memory.use_huge_pages()
        return predictor

    def _switch(self, source: Source, predictor: Predictor) -> None:
        """From here on new requests go to the new one.

        Raises: ConfigError where another bundle has its name and version.
        """
        old, manifest, engine = source.served, predictor.manifest, predictor.engine
        source.served = self._repository.replace(old, predictor)
        source.name = manifest.name
        self._tell(manifest.name)
        self._loads.count(manifest.name, "loaded")
        if predictor.fallback:
            self._loads.fall_back(manifest.name, predictor.fallback)
        _log.info(
            "loaded: heads %s, %s kernels (%s), self-test passed",
            ", ".join(manifest.heads),
            engine.kernels,
            engine.kernels_reason,
            extra=about(model=manifest.name, version=manifest.version),
        )
        if old is not None:
            self._drain(old)

    def _release(self, source: Source) -> None:
        old, source.served = source.served, None
        if old is not None:
            self._repository.remove(old)
            self._tell(old.manifest.name)
            self._drain(old)

    def _tell(self, name: str) -> None:
        """Keep a model's health, once the server as a whole is ready."""
        if self._health.ready:
            self._health.set({name: SERVING if name in self._repository.names() else NOT_SERVING})

    def _drain(self, old: Served) -> None:
        async def finish() -> None:
            await self._repository.drained(old)
            del self._draining[old]
            self._loads.count(old.manifest.name, "unloaded")
            _log.info("drained and unloaded", extra=about(model=old.manifest.name, version=old.manifest.version))

        self._draining[old] = asyncio.ensure_future(finish())


def warm_up(predictor: Predictor) -> None:
    """Answer a JPEG, so that the first client's picture does not pay for imports and first allocations.

    What a picture takes the engine is the least of some calls, for any of them may be interrupted.
    """
    from PIL import Image

    encoded = io.BytesIO()
    Image.new("RGB", (64, 64)).save(encoded, "JPEG")
    image = predictor.decode(encoded.getvalue())
    # CPU time, so that an interruption leaves more calls
    end = thread_time() + WARM_UP_SECONDS
    while True:
        predictor.seconds = min(predictor.seconds, 1e-9 * predictor.infer(image).timings.compute)
        if thread_time() > end:
            return
