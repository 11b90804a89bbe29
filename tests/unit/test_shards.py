"""WebDataset shards and Hugging Face datasets give the pictures, splits and errors that folders give."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from webdataset import TarWriter

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError, InvalidPicture
from trivium.train.checkpoint import load_student
from trivium.train.data.pictures import DataSpec, load_described, load_pictures, open_splits, parse_spec
from trivium.train.data.sources import SPLITS, Split
from trivium.train.pipeline import train
from trivium.train.recipe import Recipe

SIZE = Preprocessing(height=16, width=16, resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 pictures to train in two shards, 6 to test; three classes by number; a json beside each picture."""
    root = tmp_path / "shards"
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for name, first, count in (("train-000", 0, 12), ("train-001", 12, 12), ("test-000", 24, 6)):
        with TarWriter(str(root / f"{name}.tar")) as writer:
            for number in range(first, first + count):
                sample = {"png": png(number), "cls": number % 3, "json": {"number": number}}
                writer.write({"__key__": f"part/{number:04d}", **sample})
    return root


def folder(root: Path) -> Path:
    """The same pictures as class folders."""
    for number in range(30):
        place = root / ("test" if number >= 24 else "train") / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:04d}.png").write_bytes(png(number))
    return root


def dataset(split: Split, keep: str = "label") -> datasets.Dataset:
    numbers = range(24, 30) if split == "test" else range(24)
    features = datasets.Features({"image": datasets.Image(), keep: datasets.ClassLabel(names=CLASSES)})
    columns = {"image": [{"bytes": png(n), "path": None} for n in numbers], keep: [n % 3 for n in numbers]}
    return datasets.Dataset.from_dict(columns, features=features)


def contents(spec: DataSpec) -> dict[str, set[tuple[bytes, str]]]:
    """Every split as a set of (pixels, class)."""
    found: dict[str, set[tuple[bytes, str]]] = {}
    for split in SPLITS:
        pictures = load_pictures(spec, split, SIZE)
        batch = pictures.batch(np.arange(len(pictures)))
        found[split] = {
            (bytes(pixels.numpy()), pictures.classes[label])
            for pixels, label in zip(batch, pictures.labels, strict=True)
        }
    return found


def test_the_same_pictures_as_from_folders(shards: Path, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": dataset("train"), "test": dataset("test")}).save_to_disk(tmp_path / "hf")
    as_folder = contents(DataSpec(kind="imagefolder", root=folder(tmp_path / "folder"), calibration=6))
    as_shards = contents(DataSpec(kind="webdataset", root=shards / "{train,test}-*.tar", calibration=6))
    as_table = contents(DataSpec(kind="huggingface", root=tmp_path / "hf", calibration=6))
    for found in (as_shards, as_table):
        assert {split: len(rows) for split, rows in found.items()} == {"train": 18, "calibration": 6, "test": 6}
        assert found["test"] == as_folder["test"]
        whole, wanted = (each["train"] | each["calibration"] for each in (found, as_folder))
        assert whole == wanted


def test_what_is_described_is_opened_again_and_a_change_is_noticed(shards: Path) -> None:
    spec = DataSpec(kind="webdataset", root=shards / "train-{000..001}.tar", calibration=4, test=4)
    pictures = load_pictures(spec, "train", SIZE)
    description = json.loads(json.dumps(pictures.describe()))
    again = load_described(description, "train", SIZE)
    assert torch.equal(again.batch([0, 5, 3]), pictures.batch([0, 5, 3]))
    with TarWriter(str(shards / "train-001.tar")) as writer:
        writer.write({"__key__": "other", "png": png(99), "cls": 0})
    with pytest.raises(ConfigError, match="digests differ"):
        load_described(description, "train", SIZE)


def test_class_names_as_labels_and_a_directory_of_shards(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        with TarWriter(str(tmp_path / split / "000.tar")) as writer:
            for number in range(12):
                sample = {"jpeg": np.zeros((16, 16, 3), np.uint8), "cls": CLASSES[number % 3].encode()}
                writer.write({"__key__": f"{number}", **sample})
    _, parts = open_splits(DataSpec(kind="webdataset", root=tmp_path, test=3))
    assert {split: len(part.labels) for split, part in parts.items()} == {"train": 9, "calibration": 12, "test": 3}
    assert parse_spec(str(tmp_path / "{train,val}" / "*.tar")).kind == "webdataset"


def test_numbers_without_names_are_the_names(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(30):
            writer.write({"__key__": f"{number}", "png": png(number), "cls": (2, 10, 7)[number % 3]})
    source, _ = open_splits(DataSpec(kind="webdataset", root=tmp_path / "a.tar"))
    assert source.classes == ["2", "7", "10"]


def add(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content) if kind == tarfile.REGTYPE else 0, kind
    info.linkname = "/etc/hostname" if kind == tarfile.SYMTYPE else ""
    tar.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)


def test_what_is_no_sample_is_skipped_and_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.mkdir, (str(tmp_path / "sprung"),)

    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number in range(20):
            add(tar, f"{number}.png", png(number))
            add(tar, f"{number}.cls", b"%d" % (number % 2))
            add(tar, f"{number}.pyd", pickle.dumps(Trap()))
        add(tar, "broken.png", b"no picture")
        add(tar, "broken.cls", b"1")
        add(tar, "unlabelled.png", png(7))
        add(tar, "linked.png", b"", tarfile.SYMTYPE)
        add(tar, "linked.cls", b"1")
    spec = DataSpec(kind="webdataset", root=tmp_path / "train.tar")
    pictures = load_pictures(spec, "train", SIZE)
    assert sum(pictures.describe()["counts"].values()) == 20
    assert {Path(place).name for place, _ in pictures.skipped} == {"broken.png", "unlabelled", "linked"}
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ConfigError, match="strict refuses"):
        load_pictures(spec.model_copy(update={"strict": True}), "train", SIZE)
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(InvalidPicture, match=r"train\.tar"):
        pictures.batch([0])


def test_shards_that_cannot_be_used(shards: Path, tmp_path: Path) -> None:
    def fails(root: Path, text: str) -> None:
        with pytest.raises(ConfigError, match=text) as caught:
            open_splits(DataSpec(kind="webdataset", root=root))
        assert "\n" not in str(caught.value)

    fails(tmp_path / "none-{0..3}.tar", "none-0.tar: No such file")
    fails(tmp_path / "none*.tar", "no such shard")
    fails(shards / "test-*.tar", "none to train on")
    (shards / "train-002.tar.gz").write_bytes(gzip.compress((shards / "train-000.tar").read_bytes()))
    fails(shards / "train-002.tar.gz", "no uncompressed tar file")
    whole = (shards / "train-000.tar").read_bytes()
    (shards / "train-000.tar").write_bytes(whole[: len(whole) // 2 + 100])
    fails(shards / "train-*.tar", "no uncompressed tar file, or a damaged one")
    (shards / "train-000.tar").write_bytes(whole)
    (shards / "classes.txt").write_text("ant\nbee")
    fails(shards / "{train,test}-*.tar", "class '2' of the train split: 2 names are given")


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    def fails(table: datasets.Dataset | datasets.DatasetDict, name: str, text: str) -> None:
        table.save_to_disk(tmp_path / name)
        with pytest.raises(ConfigError, match=text) as caught:
            open_splits(DataSpec(kind="huggingface", root=tmp_path / name))
        assert "\n" not in str(caught.value)

    fails(datasets.DatasetDict({"test": dataset("test")}), "no-train", "none to train on")
    fails(datasets.DatasetDict({"train": dataset("train"), "dev": dataset("test")}), "dev", "split 'dev'")
    fails(dataset("train").remove_columns("image"), "no-image", "0 columns of kind Image")
    two = dataset("train", keep="fine").add_column("coarse", [0] * 24)
    fails(two.cast_column("coarse", datasets.ClassLabel(names=["a"])), "two", "2 columns of kind ClassLabel")
    with pytest.raises(ConfigError, match="no Hugging Face dataset"):
        open_splits(DataSpec(kind="huggingface", root=tmp_path / "nothing"))


def test_a_single_table_and_a_withheld_test(tmp_path: Path) -> None:
    withheld = dataset("test").map(lambda row: {"label": -1})
    datasets.DatasetDict({"train": dataset("train"), "test": withheld}).save_to_disk(tmp_path / "withheld")
    _, parts = open_splits(DataSpec(kind="huggingface", root=tmp_path / "withheld", calibration=4, test=5))
    assert [len(parts[split].labels) for split in SPLITS] == [15, 4, 5]
    dataset("train").select(range(23, -1, -1)).save_to_disk(tmp_path / "single")
    spec = parse_spec(str(tmp_path / "single"), calibration=4, test=5)
    assert spec.kind == "huggingface"
    assert contents(spec)["train"]


def test_a_run_on_shards(shards: Path, tmp_path: Path) -> None:
    schedule = {"epochs": 1, "batch": 8}
    recipe = {
        "name": "shards", "threads": torch.get_num_threads(),
        "data": {"kind": "webdataset", "root": str(shards / "*.tar"), "calibration": 6},
        "input": {"height": 16, "width": 16, "resize": 16}, "shifts": {"mixing_set": 4}, "views": {"crop": "resized"},
        "original": {"model": "trivium_resnet10_tiny", "schedule": schedule}, "student": {"schedule": schedule},
    }  # fmt: skip
    train(Recipe.model_validate(recipe), tmp_path / "run", Console(file=io.StringIO()))
    _, meta = load_student(tmp_path / "run")
    assert meta.classes == CLASSES
    assert meta.data["counts"] == {"train": 18, "calibration": 6, "test": 6}
