"""Bundles from strangers: whatever is wrong with one, it is refused by the error that names the reason."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.runtime import bundle as bundle_module
from trivium.runtime.bundle import MANIFEST, RULES, Manifest, digest, json_schema, open_bundle, read_manifest, seal
from trivium.runtime.errors import (
    BundleError,
    DigestMismatch,
    ExtraFile,
    ManifestError,
    MissingFile,
    UnknownSchema,
    UnsafePath,
)

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture(scope="module")
def document(tiny_bundle: Path) -> dict[str, Any]:
    content = json.loads((tiny_bundle / MANIFEST).read_text())
    assert isinstance(content, dict)
    return content


def edit(root: Path, change: Edit) -> None:
    content = json.loads((root / MANIFEST).read_text())
    change(content)
    (root / MANIFEST).write_text(json.dumps(content))


def test_a_whole_bundle_opens(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest.heads == ["clean", "robust", "combined"]
    assert bundle.model_path.read_bytes()
    assert [file.sha256 for file in bundle.manifest.files] == [
        digest(bundle.golden_path or Path()),
        digest(bundle.model_path),
    ]


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_flipped_bit(copy: Path, name: str, position: int) -> None:
    data = bytearray((copy / name).read_bytes())
    data[position] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(DigestMismatch, match=rf"^{name}: SHA-256"):
        open_bundle(copy)


def test_a_longer_file(copy: Path) -> None:
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DigestMismatch, match=r"^model\.onnx: \d+ bytes, the manifest says \d+$"):
        open_bundle(copy)


def test_a_missing_file(copy: Path) -> None:
    (copy / "golden.npz").unlink()
    with pytest.raises(MissingFile, match=r"^golden\.npz: missing$"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "sub/model.onnx"])
def test_an_extra_file(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"")
    with pytest.raises(ExtraFile, match=rf"^{name}: not listed"):
        open_bundle(copy)


def test_an_extra_symbolic_link_to_a_directory(copy: Path, tmp_path: Path) -> None:
    (copy / "link").symlink_to(tmp_path)
    with pytest.raises(ExtraFile, match=r"^link: "):
        open_bundle(copy)


def test_a_model_that_is_a_symbolic_link(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "model.onnx", tmp_path / "elsewhere.onnx")
    (copy / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(UnsafePath, match=r"^model\.onnx: not a regular file$"):
        open_bundle(copy)


def test_a_file_below_a_symbolic_link(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(copy / "model.onnx", outside / "weights.bin")
    (copy / "sub").symlink_to(outside)
    edit(copy, lambda d: d["files"].append(d["files"][1] | {"path": "sub/weights.bin"}))
    with pytest.raises(UnsafePath, match=r"^sub/weights\.bin: sub is a symbolic link$"):
        open_bundle(copy)


def test_a_pipe_does_not_hang(copy: Path) -> None:
    (copy / "golden.npz").unlink()
    os.mkfifo(copy / "golden.npz")
    with pytest.raises(UnsafePath, match=r"^golden\.npz: not a regular file$"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "path",
    [
        *("../model.onnx", "/etc/passwd", "a/../../model.onnx", "./model.onnx", "a//b", "a\\b", "", "a\0b", ".", ".."),
        *(MANIFEST, "a\nb", "\x1b[2J", "\u202e", "a" * 256, "ä" * 128, "a" * 256 + "/b"),
    ],
)
def test_a_path_that_is_not_plain(copy: Path, path: str) -> None:
    edit(copy, lambda d: d["files"].append(d["files"][0] | {"path": path}))
    with pytest.raises(UnsafePath) as caught:
        open_bundle(copy)
    assert str(caught.value).isprintable()


def test_a_manifest_that_is_wrong_a_hundred_thousand_times_is_refused_for_the_first(copy: Path) -> None:
    edit(copy, lambda d: d.update(classes=[0] * 100_000))
    with pytest.raises(ManifestError, match=r"^manifest\.json: classes\.0: "):
        open_bundle(copy)
    keys = ",".join(f'"k{i}": 0' for i in range(100_000))
    (copy / MANIFEST).write_text("{" + keys + ', "k99999": 1}')
    # a search for the key that is quadratic in their number would take minutes
    with pytest.raises(ManifestError, match="'k99999' stands twice"):
        open_bundle(copy)


def test_a_model_outside(copy: Path) -> None:
    def escape(d: dict[str, Any]) -> None:
        d["model"] = d["files"][1]["path"] = "../model.onnx"

    edit(copy, escape)
    with pytest.raises(UnsafePath, match=r"'\.\./model\.onnx': not a plain path inside the bundle"):
        open_bundle(copy)


@pytest.mark.parametrize("version", [0, 2, 999, "1", None, 1.5, True, [1], "\x1b[31m"])
def test_an_unknown_schema_version(copy: Path, version: Any) -> None:
    edit(copy, lambda d: d.update(schema_version=version))
    with pytest.raises(UnknownSchema, match="this release reads 1") as caught:
        open_bundle(copy)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"format": "trivium-bundle", "schema_version": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b"\xff\xfe{\x00}\x00", "no valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"format": "trivium-bundle", "x": NaN}', "NaN is no JSON number"),
        (b"[]", "not a trivium bundle's manifest"),
        (b"{}", "not a trivium bundle's manifest"),
        (b'{"format": "\x7fELF"}', "not a trivium bundle's manifest"),
    ],
)
def test_a_manifest_that_is_none(copy: Path, content: bytes, reason: str) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestError, match=reason):
        open_bundle(copy)


def test_a_huge_manifest_is_refused_unread(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (copy / MANIFEST).open("r+b") as file:
        file.truncate(bundle_module.MANIFEST_LIMIT + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("the manifest was read"))
    with pytest.raises(ManifestError, match="more than 4194304"):
        open_bundle(copy)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no manifest\.json in it"):
        open_bundle(tmp_path)
    with pytest.raises(ManifestError, match="no such directory"):
        open_bundle(tmp_path / "absent")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ManifestError, match="no such directory"):
        open_bundle(tmp_path / "file")


def gate(heads: Sequence[str] = ("clean", "robust"), score: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A gate by one score; what is in `score` replaces its numbers."""
    weights = dict.fromkeys(heads, 0.5)
    plain = {"statistic": "predictive_entropy", "heads": ["clean"], "center": 0.0, "scale": 1.0, "weights": weights}
    return {"intercept": dict.fromkeys(heads, 0.0), "features": [plain | dict(score or {})]}


def guard(base: str = "combined") -> dict[str, Any]:
    """A guard by its intercept alone."""
    detector = {"weights": {}, "center": {}, "scale": {}, "intercept": 0.0}
    harm = {"accuracy_loss": 0.01, "negative_flips": 0.01, "delta": 0.05}
    return detector | {"base": base, "threshold": 0.5} | harm


EDITS: dict[str, tuple[Edit, str]] = {
    "unknown key": (lambda d: d.update(surprise=1), "surprise: Extra inputs"),
    "unprintable unknown key": (lambda d: d.update({"\x1b[2J": 1}), r"\\x1b\[2J: Extra inputs"),
    "no classes": (lambda d: d.update(classes=[]), "classes: "),
    "class with an escape sequence": (lambda d: d["classes"].append("\x1b[31mred"), r"classes\.10: "),
    "class with half a surrogate pair": (lambda d: d["classes"].append("\ud800"), r"classes\.10: "),
    "no heads": (lambda d: d.update(heads=[]), "heads: "),
    "equal heads": (lambda d: d.update(heads=["clean", "clean"]), "head names must differ"),
    "head called as a rule": (lambda d: d.update(heads=["mean"]), "cannot be called mean"),
    "head with a slash": (lambda d: d.update(heads=["a/b"]), r"heads\.0: "),
    "name with a path": (lambda d: d.update(name="../x"), "name: "),
    "version zero": (lambda d: d.update(version="0"), "version: "),
    "unknown default router": (lambda d: d["router"].update(default="best"), "'best' is none of: clean, robust"),
    "blend without numbers": (lambda d: d["router"].update(blend=None), "'blend' is none of"),
    "blend with unequal scores": (lambda d: d["router"]["blend"]["scale"].pop("energy"), "must name the same scores"),
    "paper without robust": (lambda d: d["router"]["paper"]["entropy_scale"].pop("robust"), "lacks robust"),
    "gate without numbers": (lambda d: d["router"].update(default="gate", gate=None), "'gate' is none of"),
    "gate of one head": (lambda d: d["router"].update(gate=gate(["clean"])), r"router\.gate\.intercept: .* at least 2"),
    "gate of no scores": (lambda d: d["router"].update(gate=gate() | {"features": []}), r"router\.gate\.features: "),
    "gate with an unknown head": (
        lambda d: d["router"].update(gate=gate(["clean", "x"])),
        "router.gate names x,",
    ),
    "gate with the score of an unknown head": (
        lambda d: d["router"].update(gate=gate(score={"heads": ["x"]})),
        "router.gate names x, which is no head",
    ),
    "gate with the weight of one head missing": (
        lambda d: d["router"].update(gate=gate(score={"weights": {"clean": 1.0}})),
        "the weights of feature 0 are not",
    ),
    "gate with a divergence of one head": (
        lambda d: d["router"].update(gate=gate(score={"statistic": "divergence"})),
        "divergence is of two different",
    ),
    "gate with an entropy of two heads": (
        lambda d: d["router"].update(gate=gate(score={"heads": ["clean", "robust"]})),
        "predictive_entropy is of one",
    ),
    "gate with an unknown score": (
        lambda d: d["router"].update(gate=gate(score={"statistic": "entropy"})),
        r"router\.gate\.features\.0\.statistic",
    ),
    "gate without a center": (
        lambda d: d["router"].update(gate=gate(score={"center": None})),
        r"router\.gate\.features\.0\.center",
    ),
    "gate with an infinite weight": (
        lambda d: d["router"].update(gate=gate(score={"weights": {"clean": 1e999, "robust": 0}})),
        "no JSON number",
    ),
    "gate with a scale of zero": (lambda d: d["router"].update(gate=gate(score={"scale": 0})), "greater than 0"),
    "paper among one": (lambda d: d["router"]["paper"].update(among=["clean"]), r"router\.paper\.among: "),
    "paper among three without a scale": (
        lambda d: d["router"]["paper"].update(among=["clean", "robust", "combined"]),
        "entropy_scale lacks combined",
    ),
    "zero scale": (lambda d: d["router"]["paper"]["entropy_scale"].update(clean=0), "greater than 0"),
    "std of zero": (lambda d: d["preprocessing"].update(std=[1, 0, 1]), r"preprocessing\.std\.1: "),
    "picture of no height": (lambda d: d["preprocessing"].update(height=0), r"preprocessing\.height: "),
    "crop larger than resize": (lambda d: d["preprocessing"].update(resize=31), "smaller than the crop"),
    "dropout of one": (lambda d: d["dropout"].update(rate=1), r"dropout\.rate: "),
    "file listed twice": (lambda d: d["files"].append(d["files"][0]), "listed twice"),
    "model not listed": (lambda d: d.update(model="other.onnx"), r"other\.onnx is not among"),
    "negative size": (lambda d: d["files"][0].update(size=-1), r"files\.0\.size: "),
    "short digest": (lambda d: d["files"][0].update(sha256="ab"), r"files\.0\.sha256: "),
}


@pytest.mark.parametrize(("change", "reason"), EDITS.values(), ids=EDITS.keys())
def test_a_manifest_against_the_schema(copy: Path, change: Edit, reason: str) -> None:
    edit(copy, change)
    with pytest.raises(ManifestError, match=rf"^manifest\.json: .*{reason}") as caught:
        open_bundle(copy)
    assert str(caught.value).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_manifest_with_any_value_anywhere_is_read_or_refused(
    data: st.DataObject, document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = json.loads(json.dumps(document))
    where: Any = content
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(where[key], dict | list) or not where[key] or data.draw(st.booleans()):
            break
        where = where[key]
    where[key] = data.draw(json_values)
    root = tmp_path_factory.mktemp("fuzz")
    (root / MANIFEST).write_text(json.dumps(content))
    outcome: Manifest | BundleError
    try:
        outcome = read_manifest(root)
    except BundleError as error:
        outcome = error
    if isinstance(outcome, Manifest):
        assert Manifest.model_validate_json(outcome.model_dump_json()) == outcome
    else:
        assert str(outcome).isprintable()


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_a_manifest_of_any_bytes_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestError):
        read_manifest(root)


def test_sealing_again_changes_nothing(copy: Path) -> None:
    before = (copy / MANIFEST).read_bytes()
    seal(copy, read_manifest(copy))
    assert (copy / MANIFEST).read_bytes() == before


def test_routers_follow_the_heads_and_the_numbers(tiny_bundle: Path, single_head_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert manifest.routers() == ["clean", "robust", "combined", "mean", "min_entropy", "paper", "blend"]
    document = manifest.model_dump()
    document["router"] |= {"gate": gate(), "guard": guard()}
    assert Manifest.model_validate(document).routers() == ["clean", "robust", "combined", *RULES]
    del document["router"]["gate"], document["router"]["guard"]
    assert Manifest.model_validate(document) == manifest
    assert read_manifest(single_head_bundle).routers() == ["original"]


def test_the_json_schema_names_every_key(document: dict[str, Any]) -> None:
    schema = json_schema()
    assert set(document) == set(schema["properties"])
    assert schema["additionalProperties"] is False
