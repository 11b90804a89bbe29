"""The bundle: a directory that holds a compiled model and manifest.json, which says all that is needed to serve it.

BUNDLE.md is the format's specification. Nothing in a bundle is ever executed or unpickled, every file is listed with
its size and SHA-256, and every reason to refuse one is an error class of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from .errors import ConfigError, DigestMismatch, ExtraFile, ManifestError, MissingFile, UnknownSchema, UnsafePath
from .guarantees import Guarantees, ShiftDetector
from .values import Finite, Label, Name, Positive, Share, Strict
from .weights import external_files

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 4 << 20
"""Bytes; a longer manifest is refused before it is parsed. The names of 20,000 classes take a tenth of it."""
NAME_LIMIT = 255
"""Bytes of a file's name, on every usual file system."""

THREE_HEADS = ("clean", "robust", "combined")
GateStatistic = Literal["predictive_entropy", "mutual_information", "divergence", "energy", "max_probability"]
RULES = ("mean", "min_entropy", "paper", "blend", "gate", "guard")
"""Routers that are no head's name."""


class Preprocessing(Strict):
    """From a decoded picture to the model's uint8 input; mean and std are applied inside the graph."""

    height: Annotated[int, Field(ge=1, le=4096)]
    width: Annotated[int, Field(ge=1, le=4096)]
    resize: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Pixels of the shorter side before the centre crop; None: straight to height x width."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: tuple[Finite, Finite, Finite]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[Positive, Positive, Positive]
    color_order: Literal["RGB"] = "RGB"
    dtype: Literal["uint8"] = "uint8"
    layout: Literal["NHWC"] = "NHWC"

    @model_validator(mode="after")
    def _crop_fits(self) -> Preprocessing:
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise ValueError(f"resize {self.resize} is smaller than the crop {self.height} x {self.width}")
        return self


class Dropout(Strict):
    """The Monte-Carlo-dropout passes; the masks themselves lie in the graph."""

    rate: Annotated[float, Field(ge=0, lt=1)]
    passes: Annotated[int, Field(ge=1, le=1024)]
    seed: Annotated[int, Field(ge=0, lt=2**64)]


class PaperRule(Strict):
    """The selection of "Efficiently Robustify" (ICCV 2023), reconstructed: heads that agree answer together, else the
    relatively surest one answers."""

    divergence_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """delta in nats: a percentile of the symmetrised KL between clean and robust on clean calibration pictures."""
    entropy_scale: dict[str, Positive]
    """Mean uncertainty in nats of each head on its own calibration domain, or 1; divides the head's uncertainty."""
    uncertainty: Literal["predictive_entropy", "mutual_information"] = "predictive_entropy"
    among: Annotated[list[Literal["clean", "robust", "combined"]], Field(min_length=2)] = Field(
        default=["clean", "robust"]
    )
    """Heads of which the surest answers where they disagree, the first of equals."""

    @model_validator(mode="after")
    def _has_all(self) -> PaperRule:
        if missing := set(self.among) - set(self.entropy_scale):
            raise ValueError(f"entropy_scale lacks {', '.join(sorted(missing))}")
        return self


class BlendRule(ShiftDetector):
    """Shifted -> combined head, else mean of clean and combined."""

    threshold: Share
    """A picture counts as shifted where its probability of being shifted exceeds this."""


class GuardRule(ShiftDetector):
    """Not shifted -> the clean head, which answers as the original does; else another router.

    The threshold is the least of a sequence whose harm was certified by Learn-then-Test: on pictures like the
    calibration pictures, with probability 1 - delta, clean accuracy falls by at most `accuracy_loss`, and at most
    `negative_flips` of all pictures are ones that the clean head gets right and this router wrong.
    """

    base: Name
    """The router that answers shifted pictures: a head's name or a rule's."""
    threshold: Share
    """A picture counts as shifted where its probability of being shifted exceeds this."""
    accuracy_loss: Share
    negative_flips: Share
    delta: Annotated[float, Field(gt=0, lt=1)]


class GateFeature(Strict):
    """A score of one head, or of a pair of them, and what it says for each head that may answer."""

    statistic: GateStatistic
    """The first three, in nats, enter as their square roots; divergence is the symmetrised KL of a pair."""
    heads: Annotated[list[Name], Field(min_length=1, max_length=2)]
    """Whose score it is: two heads of a divergence, else one."""
    center: Finite
    scale: Positive
    weights: dict[Name, Finite]
    """Head that may answer -> weight of (score - center) / scale."""

    @model_validator(mode="after")
    def _pair(self) -> GateFeature:
        if len(set(self.heads)) != (2 if self.statistic == "divergence" else 1):
            wanted = "two different heads" if self.statistic == "divergence" else "one head"
            raise ValueError(f"{self.statistic} is of {wanted}")
        return self


class GateRule(Strict):
    """A learned gate: for each head a linear score, fitted as the log-odds that it is right; the highest answers."""

    intercept: Annotated[dict[Name, Finite], Field(min_length=2)]
    """Heads that may answer; at least two."""
    features: Annotated[list[GateFeature], Field(min_length=1, max_length=256)]
    """In the order in which their terms are added to the intercept."""

    @model_validator(mode="after")
    def _same_heads(self) -> GateRule:
        for number, feature in enumerate(self.features):
            if feature.weights.keys() != self.intercept.keys():
                raise ValueError(f"the weights of feature {number} are not of the heads that have an intercept")
        return self


class RouterSettings(Strict):
    """Which rule answers when a request names none, and the numbers its rules need."""

    default: str
    paper: PaperRule | None = None
    blend: BlendRule | None = None
    gate: GateRule | None = None
    guard: GuardRule | None = None


class Calibration(Strict):
    """Where the router's numbers and the temperatures come from."""

    temperature: dict[str, Positive]
    """Per head; already part of the graph, here for the record."""
    mixture: dict[str, Finite]
    """Share of each kind of calibration picture, say {"clean": 0.5, "gaussian_blur": 0.125, ...}."""
    pictures: Annotated[int, Field(ge=0)]
    data: str
    """Where the calibration pictures came from, in words."""
    seed: int
    routers: list[dict[str, Any]]
    """One row a candidate: router, accuracy, difference to the best single head with its interval, negative flips."""
    chosen_because: str


class Plan(Strict):
    """A TensorRT engine in the bundle; it runs on the card and with the TensorRT that it was built by, and no other."""

    path: str
    tensorrt: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9A-Za-z]+){1,5}$")]
    """Version of the library, in full."""
    card: Label
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]
    driver: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]
    """Newest CUDA version that the driver ran, for the record."""
    precision: Literal["fp32", "fp16", "int8"]
    """Of the backbone; the heads are float32."""
    max_batch: Annotated[int, Field(ge=1, le=4096)]


class Quantization(Strict):
    """How the backbone came to int8, and what that changed."""

    weights: Literal["int8"] = "int8"
    """Per output channel."""
    activations: Literal["uint8", "int8"]
    method: Literal["entropy"]
    """By which the ranges of the activations were chosen."""
    pictures: Annotated[int, Field(ge=1)]
    """Real ones that the ranges were measured on."""
    data: str
    """Where those came from, in words."""
    float_layers: list[str]
    """Weighted layers that stayed float32."""


class FoldedRouter(Strict):
    """The default router inside the graph: its outputs `routed_probabilities`, `class_id` and `head`."""

    router: str
    heads: Annotated[list[str], Field(min_length=1, max_length=17)]
    """What each value of the output `head` stands for: the heads, and last the mixture where the rule mixes them."""
    coverage: Share | None = None
    """Of the output `prediction_set`; None where the graph has none."""
    max_risk: Share | None = None
    """Of the output `abstain`; None where the graph has none."""


class File(Strict):
    """One file of the bundle."""

    path: Annotated[str, Field(max_length=1000)]
    size: Annotated[int, Field(ge=0, lt=2**63)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Strict):
    """manifest.json, schema version 1."""

    format: Literal["trivium-bundle"] = "trivium-bundle"
    schema_version: Literal[1] = 1
    name: Name
    version: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")] = "1"
    classes: Annotated[list[Label], Field(min_length=1, fail_fast=True)]
    heads: Annotated[list[Name], Field(min_length=1, max_length=16)]
    preprocessing: Preprocessing
    dropout: Dropout
    router: RouterSettings
    model: str = "model.onnx"
    golden: str | None = None
    """An .npz with `image` (the graph's input) and the graph's outputs, which a server repeats before it is ready."""
    plans: Annotated[list[Plan], Field(max_length=64)] = Field(default=[])
    """Engines compiled beforehand; a server runs one only where it is told to."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Of the backbone in the graph; the heads are float32."""
    quantization: Quantization | None = None
    drift: dict[str, Finite] = Field(default={})
    """What a lower precision changed in the answers to pictures that its calibration never saw, by name."""
    folded_router: FoldedRouter | None = None
    """For servers that run the graph without this package, which never asks for those outputs."""
    tolerances: dict[str, Finite] = Field(default={})
    """Largest difference measured at export between implementations, by name."""
    calibration: Calibration | None = None
    guarantees: Guarantees | None = None
    provenance: dict[str, Any] = Field(default={})
    training: dict[str, Any] = Field(default={})
    files: Annotated[list[File], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if len(set(self.heads)) != len(self.heads):
            raise ValueError("head names must differ")
        listed = [file.path for file in self.files]
        if len(set(listed)) != len(listed):
            raise ValueError("a file is listed twice")
        for path in (self.model, self.golden, *(plan.path for plan in self.plans)):
            if path is not None and path not in listed:
                raise ValueError(f"{path} is not among the listed files")
        if taken := set(self.heads) & set(RULES):
            raise ValueError(f"a head cannot be called {min(taken)}, which is a router's name")
        if gate := self.router.gate:
            named = gate.intercept.keys() | {head for feature in gate.features for head in feature.heads}
            if unknown := sorted(named - set(self.heads)):
                raise ValueError(f"router.gate names {unknown[0]}, which is no head of this model")
        if (guard := self.router.guard) and (guard.base == "guard" or guard.base not in self.routers()):
            raise ValueError(f"router.guard.base {guard.base!r} is no other router of this model")
        if self.guarantees is not None:
            if unknown := sorted(self.guarantees.routers.keys() - set(self.routers())):
                raise ValueError(f"guarantees name the router {unknown[0]!r}, which this model has not")
            if missing := [name for name in self.routers() if name not in self.guarantees.routers]:
                raise ValueError(f"guarantees lack the router {missing[0]!r}")
            drift = self.guarantees.drift
            if drift.head not in self.heads:
                raise ValueError(f"guarantees.drift names {drift.head}, which is no head of this model")
            if len(drift.counts.get("class_id", self.classes)) != len(self.classes):
                raise ValueError("guarantees.drift counts another number of classes")
        if self.router.default not in self.routers():
            raise ValueError(f"router.default {self.router.default!r} is none of: {', '.join(self.routers())}")
        return self

    def routers(self) -> list[str]:
        """Names a request may route by: every head, then the rules that have the heads and the numbers they need."""
        names = list(self.heads)
        if len(self.heads) > 1:
            names += ["mean", "min_entropy"]
        if set(THREE_HEADS) <= set(self.heads):
            names += [name for name in ("paper", "blend") if getattr(self.router, name) is not None]
        names += ["gate"] if self.router.gate is not None else []
        return names + (["guard"] if self.router.guard is not None and "clean" in self.heads else [])


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and found whole."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        return self.path / self.manifest.model

    @property
    def golden_path(self) -> Path | None:
        return self.path / self.manifest.golden if self.manifest.golden else None


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read and verify a bundle, every byte of it.

    Raises: a subclass of BundleError that names the file and the reason.
    """
    root = Path(path)
    manifest = read_manifest(root)
    for file in manifest.files:
        for parent in PurePosixPath(file.path).parents[:-1]:
            if os.path.islink(root / parent):
                raise UnsafePath(f"{file.path}: {parent} is a symbolic link")
        target = root / file.path
        size = _regular_size(target, file.path)
        if size != file.size:
            raise DigestMismatch(f"{file.path}: {size} bytes, the manifest says {file.size}")
        try:
            found = digest(target)
        except OSError as error:
            raise MissingFile(f"{file.path}: cannot be read: {error.strerror}") from None
        if found != file.sha256:
            raise DigestMismatch(f"{file.path}: SHA-256 differs from the manifest's")
    listed = {file.path for file in manifest.files}
    for directory, folders, names in os.walk(root):
        for name in names + [folder for folder in folders if (Path(directory) / folder).is_symlink()]:
            relative = (Path(directory) / name).relative_to(root).as_posix()
            if relative != MANIFEST and relative not in listed:
                raise ExtraFile(f"{printable(relative)}: not listed in the manifest")
    try:
        weights = external_files(root / manifest.model)
    except (ValueError, OSError) as error:
        raise UnsafePath(f"{manifest.model}: where its weights lie cannot be read: {error}") from None
    folder = manifest.model.rpartition("/")
    for location in sorted(weights):
        if folder[0] + folder[1] + location not in listed:
            raise UnsafePath(
                f"{manifest.model}: its weights lie in {location[:200]!r}, which the manifest does not list"
            )
    return Bundle(root, manifest)


def read_manifest(root: Path) -> Manifest:
    """Read manifest.json alone.

    Raises: ManifestError, UnknownSchema, UnsafePath.
    """
    target = root / MANIFEST
    if not os.path.isdir(root):
        raise ManifestError(f"{root}: no such directory")
    try:
        size = _regular_size(target, MANIFEST)
    except MissingFile:
        raise ManifestError(f"{root}: no {MANIFEST} in it, so this is no bundle") from None
    if size > MANIFEST_LIMIT:
        raise ManifestError(f"{MANIFEST}: {size} bytes, more than {MANIFEST_LIMIT}")
    try:
        text = target.read_bytes().decode("utf-8")
        document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except OSError as error:
        raise ManifestError(f"{MANIFEST}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST}: no valid JSON ({printable(str(error)[:300])})") from None
    if not isinstance(document, dict) or document.get("format") != "trivium-bundle":
        raise ManifestError(f"{MANIFEST}: not a trivium bundle's manifest")
    version = document.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UnknownSchema(
            f"{MANIFEST}: schema version {printable(str(version)[:40])}, this release reads {SCHEMA_VERSION}"
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestError(f"{MANIFEST}: {printable(where[:300])}: {printable(first['msg'][:300])}") from None
    for file in manifest.files:
        _safe(file.path)
    return manifest


def seal(root: Path, manifest: Manifest) -> Bundle:
    """List every file under root in the manifest with size and digest, write manifest.json last, and verify.

    `manifest.files` is replaced by what lies in root.
    """
    paths = sorted(p for p in root.rglob("*") if p.is_file() and p.relative_to(root).as_posix() != MANIFEST)
    files = [File(path=p.relative_to(root).as_posix(), size=p.stat().st_size, sha256=digest(p)) for p in paths]
    document = manifest.model_dump(mode="json") | {"files": [file.model_dump() for file in files]}
    (root / MANIFEST).write_bytes(_encoded(Manifest.model_validate(document)))
    return open_bundle(root)


def rewrite_manifest(root: Path, manifest: Manifest) -> Bundle:
    """Put another manifest into a bundle whose files stay as they are, and verify.

    A kill at any moment leaves the old manifest or the new one, whole. The new one comes to be beside the bundle's
    directory, since a further file in it would make it no bundle.

    Raises: ConfigError where it cannot be written; BundleError where the bundle does not fit it.
    """
    place = root.resolve()
    draft = None
    try:
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{place.name}.manifest-", delete=False) as file:
            draft = Path(file.name)
            file.write(_encoded(manifest))
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(stat.S_IMODE((place / MANIFEST).stat().st_mode))
        os.replace(draft, place / MANIFEST)
    except OSError as error:
        raise ConfigError(f"{root}: its {MANIFEST} cannot be rewritten ({error.strerror})") from None
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)
    return open_bundle(root)


def _encoded(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    hasher, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb") as file:
        while count := file.readinto(block):
            hasher.update(block[:count])
    return hasher.hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema of the manifest, made from the code."""
    return Manifest.model_json_schema()


def printable(text: str) -> str:
    """Text from a bundle or a file name, fit for a terminal: control characters become escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _safe(path: str) -> None:
    pure = PurePosixPath(path)
    plain = path.isprintable() and "\\" not in path and str(pure) == path and not pure.is_absolute()
    if not plain or not pure.parts or any(part == ".." or len(part.encode()) > NAME_LIMIT for part in pure.parts):
        raise UnsafePath(f"{path[:200]!r}: not a plain path inside the bundle")
    if path == MANIFEST:
        raise UnsafePath(f"{path!r}: the manifest cannot list itself")


def _regular_size(target: Path, name: str) -> int:
    try:
        status = target.lstat()
    except FileNotFoundError:
        raise MissingFile(f"{name}: missing") from None
    except OSError as error:
        raise UnsafePath(f"{name[:200]!r}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnsafePath(f"{name}: not a regular file")
    return status.st_size
