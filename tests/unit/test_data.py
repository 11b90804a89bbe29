"""Data sets: sources, splits, unreadable files, what a checkpoint records."""

import gzip
import hashlib
import json
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError, InvalidPicture
from trivium.runtime.preprocess import read_picture
from trivium.train import data_cli
from trivium.train.data import fashion_mnist
from trivium.train.data.pictures import DataSpec, Limits, crop_box, load_described, load_pictures, parse_spec
from trivium.train.data.sources import SPLITS, split_parts, stratified_order

SMALL = Preprocessing(height=28, width=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
REAL = fashion_mnist.locate()
PHOTO = Preprocessing(height=32, width=32, resize=36, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("TRIVIUM_CACHE", str(directory))
    return directory


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """Files in Fashion-MNIST's format: 200 and 50 random pictures; half of the files compressed."""
    draw = np.random.default_rng(0)
    root = tmp_path / "idx"
    root.mkdir()
    for part, count, suffix in (("train", 200, ".gz"), ("t10k", 50, "")):
        pictures = draw.integers(0, 256, (count, 28, 28), np.uint8)
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", pictures)
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))
    return root


def picture(draw: np.random.Generator, size: tuple[int, int] = (50, 40)) -> Image.Image:
    coarse = draw.integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def folder(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Pictures root/KEY/0000.jpg and so on, of three formats."""
    draw = np.random.default_rng(seed)
    for key, count in counts.items():
        (root / key).mkdir(parents=True)
        for i in range(count):
            picture(draw).save(root / key / f"{i:04}.{('jpg', 'png', 'webp')[i % 3]}")
    return root


def test_idx_files_become_three_channels_and_disjoint_stratified_splits(idx: Path) -> None:
    spec = DataSpec(kind="fashion-mnist", root=idx)
    splits = {split: load_pictures(spec, split, SMALL) for split in SPLITS}
    assert {split: len(pictures) for split, pictures in splits.items()} == {
        "train": 180,
        "calibration": 20,
        "test": 50,
    }
    assert np.bincount(splits["calibration"].labels).tolist() == [2] * 10
    assert splits["train"].classes[9] == "Ankle boot"
    original = fashion_mnist.read(idx)
    batches = {split: pictures.batch(range(len(pictures))) for split, pictures in splits.items()}
    assert batches["test"].dtype == torch.uint8
    assert batches["test"].shape == (50, 3, 28, 28)
    assert (batches["test"].numpy() == original.test_pictures[:, None]).all()
    kept = {p.numpy().tobytes() for split in ("train", "calibration") for p in batches[split][:, 0]}
    assert kept == {p.tobytes() for p in original.train_pictures}
    assert splits["test"].batch(torch.tensor([3, 1])).equal(batches["test"][[3, 1]])


def test_the_seed_fixes_the_splits(idx: Path) -> None:
    def held_out(seed: int) -> torch.Tensor:
        return load_pictures(DataSpec(kind="fashion-mnist", root=idx, seed=seed), "calibration", SMALL).batch(range(20))

    assert held_out(1).equal(held_out(1))
    assert not held_out(1).equal(held_out(2))


def test_limits_draw_every_class_alike(idx: Path) -> None:
    spec = DataSpec(kind="fashion-mnist", root=idx, limit=Limits(train=30, test=20), calibration=40)
    counts = {split: np.bincount(load_pictures(spec, split, SMALL).labels).tolist() for split in SPLITS}
    assert counts == {"train": [3] * 10, "calibration": [4] * 10, "test": [2] * 10}
    same = DataSpec(kind="fashion-mnist", root=idx, limit=10)
    assert [len(load_pictures(same, split, SMALL)) for split in SPLITS] == [10, 10, 10]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(0, 1000))
def test_every_prefix_of_a_stratified_order_is_fair(labels: list[int], seed: int) -> None:
    array = np.array(labels, np.int64)
    order = stratified_order(array, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for length in (len(labels) // 3, len(labels) // 2):
        for label in set(labels):
            expected = length * labels.count(label) / len(labels)
            assert abs((array[order[:length]] == label).sum() - expected) <= len(set(labels)) + 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-1], "its header promises"),
        (lambda content: b"\0\0\x0d" + content[3:], "not an IDX file"),
        (lambda content: b"", "not an IDX file"),
        (lambda content: content[:7] + bytes([49]) + content[8:-1], "disagree"),
        (lambda content: content[:8] + bytes([10]) + content[9:], "label 10"),
    ],
)
def test_damaged_idx_files_are_named(idx: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path = idx / "t10k-labels-idx1-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=reason):
        load_pictures(DataSpec(kind="fashion-mnist", root=idx), "test", SMALL)


def test_a_truncated_gzip_is_named(idx: Path) -> None:
    path = idx / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        load_pictures(DataSpec(kind="fashion-mnist", root=idx), "train", SMALL)


def test_absent_fashion_mnist_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run: trivium data fashion-mnist --out"):
        load_pictures(DataSpec(kind="fashion-mnist", root=tmp_path / "none"), "train", SMALL)


def test_obtain_refuses_other_content_under_the_published_names(idx: Path) -> None:
    with pytest.raises(ConfigError, match="not the published Fashion-MNIST"):
        fashion_mnist.obtain(idx)


def test_obtain_says_in_one_line_what_each_way_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import FashionMNIST

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"file://{tmp_path}/nothing/"])
    with pytest.raises(ConfigError, match=r"no apt-get and dpkg-deb here; torchvision: ") as caught:
        fashion_mnist.obtain(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_debian_package_is_unpacked_and_its_content_checked(
    idx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt-get itself is a stand-in that hands over a package made here: the network is not for tests."""
    tree = tmp_path / "tree"
    shutil.copytree(idx, tree / fashion_mnist.DEBIAN_DIRECTORY.relative_to("/"))
    (tree / "DEBIAN").mkdir()
    control = "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
    (tree / "DEBIAN" / "control").write_text(control)
    package = tmp_path / "dataset-fashion-mnist_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(package)], check=True, capture_output=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\ncase "$*" in *download*) cp {package} .;; esac\n')
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    with pytest.raises(ConfigError, match="not the published"):
        fashion_mnist.obtain(tmp_path / "refused")
    digests = {}
    for name in fashion_mnist.SHA256:
        file = next(idx.glob(f"{name}*"))
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        digests[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)
    said: list[str] = []
    assert fashion_mnist.obtain(tmp_path / "new" / "out", said.append) == tmp_path / "new" / "out"
    assert "Debian package dataset-fashion-mnist_1_all" in said[-1]
    assert len(fashion_mnist.read(tmp_path / "new" / "out", check_digests=True).train_labels) == 200


@pytest.mark.skipif(REAL is None, reason="Fashion-MNIST is not here; run: trivium data fashion-mnist")
def test_the_real_fashion_mnist_is_whole() -> None:
    assert REAL is not None
    parts = fashion_mnist.read(REAL, check_digests=True)
    assert parts.train_pictures.shape == (60000, 28, 28)
    assert np.bincount(parts.test_labels).tolist() == [1000] * 10


def test_a_folder_with_three_splits_is_read_as_serving_reads_it(tmp_path: Path) -> None:
    counts = {"train/b": 4, "train/a": 5, "val/a": 2, "val/b": 1, "test/a": 3, "test/b": 2}
    root = folder(tmp_path / "data", counts)
    spec = DataSpec(kind="imagefolder", root=root)
    train = load_pictures(spec, "train", PHOTO)
    assert train.classes == ["a", "b"]
    assert train.labels.tolist() == [0] * 5 + [1] * 4
    assert [len(load_pictures(spec, split, PHOTO)) for split in SPLITS] == [9, 3, 5]
    served = np.stack([read_picture(path, PHOTO) for path in sorted((root / "train" / "b").iterdir())])
    for _ in range(2):  # the second time from memory
        assert (train.batch([5, 6, 7, 8]).permute(0, 2, 3, 1).numpy() == served).all()


def test_missing_splits_are_held_out_of_train(tmp_path: Path) -> None:
    root = folder(tmp_path / "flat", {"cat": 40, "dog": 20})
    spec = DataSpec(kind="imagefolder", root=root, calibration=0.25, test=12)
    parts = {split: load_pictures(spec, split, PHOTO) for split in SPLITS}
    assert {split: np.bincount(part.labels).tolist() for split, part in parts.items()} == {
        "train": [22, 11],
        "calibration": [10, 5],
        "test": [8, 4],
    }
    seen = [part.batch(range(len(part))).numpy() for part in parts.values()]
    assert len({p.tobytes() for stack in seen for p in stack}) == 60


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"train/a": 2, "test/zebra": 1}, "class 'zebra' is not among"),
        ({"val/a": 1, "test/a": 1}, "no train directory"),
        ({"train/a": 1, "val/a": 1, "valid/a": 1, "test/a": 1}, "both val and valid"),
        ({"train/a": 1, "val/a": 0, "test/a": 1}, "no usable picture in the calibration split"),
        ({".hidden/a": 3}, "no class directories"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path: Path, counts: dict[str, int], reason: str) -> None:
    root = folder(tmp_path / "data", counts)
    with pytest.raises(ConfigError, match=reason):
        load_pictures(DataSpec(kind="imagefolder", root=root), "train", PHOTO)


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A folder with 30 good pictures and one file of each kind that is none."""
    root = folder(tmp_path / "spoilt", {"a": 15, "b": 15})
    whole = (root / "a" / "0000.jpg").read_bytes()
    (root / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "b" / "text.jpg").write_text("not a picture")
    (root / "b" / "notes.txt").write_text("a note")
    (root / "b" / ".DS_Store").write_bytes(b"x")
    (root / "b" / "folder.jpg").mkdir()
    (root / "b" / "dangling.png").symlink_to(tmp_path / "gone.png")
    return root


def test_unreadable_files_are_named_counted_and_skipped(spoilt: Path, cache: Path) -> None:
    pictures = load_pictures(DataSpec(kind="imagefolder", root=spoilt), "train", PHOTO)
    reasons = {Path(path).name: reason for path, reason in pictures.skipped}
    assert set(reasons) == {"cut.jpg", "empty.png", "text.jpg", "notes.txt", "dangling.png"}
    assert "cannot be decoded" in reasons["cut.jpg"]
    assert "empty" in reasons["empty.png"]
    assert reasons["dangling.png"] == "no such file"
    assert pictures.describe()["counts"] == {"train": 21, "calibration": 3, "test": 6}
    verdicts = list((cache / "verified").iterdir())
    assert len(verdicts) == 1
    assert len(json.loads(verdicts[0].read_text())) == 4
    again = load_pictures(DataSpec(kind="imagefolder", root=spoilt), "train", PHOTO)
    assert again.skipped == pictures.skipped
    (spoilt / "a" / "empty.png").write_bytes((spoilt / "a" / "0001.png").read_bytes())
    mended = load_pictures(DataSpec(kind="imagefolder", root=spoilt), "train", PHOTO)
    assert len(mended.skipped) == 4


def test_strict_refuses_them_by_name(spoilt: Path) -> None:
    with pytest.raises(ConfigError, match=r"notes\.txt: .*and 4 more.*strict"):
        load_pictures(DataSpec(kind="imagefolder", root=spoilt, strict=True), "train", PHOTO)


def test_a_read_only_cache_is_no_obstacle(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVIUM_CACHE", "/proc/nowhere")
    assert len(load_pictures(DataSpec(kind="imagefolder", root=spoilt), "train", PHOTO).skipped) == 5


def test_a_file_that_vanishes_later_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 9})
    pictures = load_pictures(DataSpec(kind="imagefolder", root=root), "train", PHOTO)
    for path in (root / "a").iterdir():
        path.unlink()
    with pytest.raises(InvalidPicture, match=r"data/a/0\d+\.\w+: No such file"):
        pictures.batch([0])


def test_a_csv_manifest(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"x": 12})
    names = sorted(path.name for path in (root / "x").iterdir())
    lines = [f"x/{name},{('dog', 'cat')[i % 2]},{('train', 'train', 'val', 'test')[i % 4]}"
             for i, name in enumerate(names)]  # fmt: skip
    manifest = root / "list.csv"
    manifest.write_text("path,label,split\n" + "\n".join([*lines, "x/absent.png,cat,train"]) + "\n")
    spec = DataSpec(kind="csv", root=manifest)
    train = load_pictures(spec, "train", PHOTO)
    assert train.classes == ["cat", "dog"]
    assert [len(load_pictures(spec, split, PHOTO)) for split in SPLITS] == [6, 3, 3]
    assert [(Path(path).name, reason) for path, reason in train.skipped] == [("absent.png", "no such file")]
    assert (train.batch([0]).permute(0, 2, 3, 1).numpy()[0] == read_picture(root / "x" / names[0], PHOTO)).all()
    manifest.write_text("path,label\n" + "".join(f"x/{name},cat\n" for name in names))
    assert [len(load_pictures(spec, split, PHOTO)) for split in SPLITS] == [9, 1, 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\nx.png,cat\n", "must name the columns path, label"),
        ("", "must name the columns path, label"),
        ("path,label\nx.png,\n", "line 2: path or label is empty"),
        ("path,label\nx.png\n", "line 2: path or label is empty"),
        ("path,label,split\nx.png,cat,dev\n", "line 2: unknown split 'dev'"),
        ("path,label,split\nx.png,cat,test\n", "no row of the train split"),
        ("path,label,split\nx.png,cat,train\ny.png,cow,test\n", "label 'cow' of the test split"),
    ],
)
def test_csv_manifests_that_cannot_be_used_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_pictures(DataSpec(kind="csv", root=manifest), "train", PHOTO)


def test_a_csv_that_is_no_text_is_refused(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_bytes(b"path,label\n\xff\xfe\0")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_pictures(DataSpec(kind="csv", root=manifest), "train", PHOTO)


def test_the_digits_are_resized_to_the_model() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    spec = DataSpec(kind="digits")
    parts = {split: load_pictures(spec, split, SMALL) for split in SPLITS}
    assert sum(len(part) for part in parts.values()) == 1797
    batch = parts["test"].batch([0, 1])
    assert batch.shape == (2, 3, 28, 28)
    assert batch.max() > 200


def test_a_checkpoint_description_opens_the_same_splits_again(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 20, "b": 20})
    spec = DataSpec(kind="imagefolder", root=root, seed=5, limit=10)
    pictures = load_pictures(spec, "calibration", PHOTO)
    description = json.loads(json.dumps(pictures.describe()))
    assert description == load_pictures(spec, "train", PHOTO).describe()
    again = load_described(description, "calibration", PHOTO)
    assert again.batch(range(len(again))).equal(pictures.batch(range(len(pictures))))
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no such directory"):
        load_described(description, "calibration", PHOTO)
    moved = load_described(description, "calibration", PHOTO, root=tmp_path / "elsewhere")
    assert moved.labels.tolist() == pictures.labels.tolist()
    picture(np.random.default_rng(9)).save(tmp_path / "elsewhere" / "a" / "new.png")
    with pytest.raises(ConfigError, match="digests differ"):
        load_described(description, "calibration", PHOTO, root=tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="description of its data"):
        load_described({"spec": {"kind": "magic"}}, "calibration", PHOTO)


def test_random_crops_come_from_the_generator_alone(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 20})
    spec = DataSpec(kind="imagefolder", root=root)
    pictures = load_pictures(spec, "train", PHOTO, train_transform=True)
    first = pictures.batch([0, 1, 2, 0], torch.Generator().manual_seed(1))
    again = load_pictures(spec, "train", PHOTO, train_transform=True).batch(
        [0, 1, 2, 0], torch.Generator().manual_seed(1)
    )
    assert first.shape == (4, 3, 32, 32)
    assert first.equal(again)
    assert not first[0].equal(first[3])
    assert not first.equal(pictures.batch([0, 1, 2, 0], torch.Generator().manual_seed(2)))
    with pytest.raises(ValueError, match="generator"):
        pictures.batch([0])


def test_a_crop_of_everything_is_the_resized_picture(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", {"a": 9})
    spec = DataSpec(kind="imagefolder", root=root, crop_scale=(1, 1), flip=False)
    whole = PHOTO.model_copy(update={"resize": None})
    crops = load_pictures(spec, "train", whole, train_transform=True)
    plain = load_pictures(spec, "train", whole)
    generator = torch.Generator().manual_seed(0)
    # The aspect ratio still varies, within the picture: a side of at least sqrt(3/4) of it stays.
    difference = (crops.batch([0], generator).float() - plain.batch([0]).float()).abs().mean()
    assert difference < 25


@given(
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 4), st.floats(0.05, 1), st.integers(1, 500), st.integers(1, 500)
)
def test_crops_stay_inside_the_picture(draw: tuple[float, ...], least: float, width: int, height: int) -> None:
    left, upper, right, lower = crop_box(width, height, (least, 1.0), draw)
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= upper < lower <= height + 1e-9
    assert (right - left) * (lower - upper) >= 0.75 * least * width * height - 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "imagenet"},
        {"kind": "imagefolder"},
        {"kind": "digits", "root": "/x"},
        {"kind": "digits", "colour": True},
        {"kind": "digits", "calibration": 0},
        {"kind": "digits", "calibration": 1.5},
        {"kind": "digits", "limit": 0},
        {"kind": "digits", "crop_scale": (0.9, 0.5)},
    ],
)
def test_specs_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataSpec.model_validate(settings)


def test_a_held_out_part_may_not_swallow_the_training_part(idx: Path) -> None:
    with pytest.raises(ConfigError, match="no usable picture in the train split"):
        load_pictures(DataSpec(kind="fashion-mnist", root=idx, calibration=200), "train", SMALL)
    source = load_pictures(DataSpec(kind="fashion-mnist", root=idx), "train", SMALL)._source
    assert list(split_parts(source.parts, 0, 1, 1, None)) == list(SPLITS)


def test_specs_from_what_a_user_types(tmp_path: Path) -> None:
    assert parse_spec("digits").kind == "digits"
    assert parse_spec(str(tmp_path), seed=3) == DataSpec(kind="imagefolder", root=tmp_path, seed=3)
    assert parse_spec("list.csv").kind == "csv"
    with pytest.raises(ConfigError, match="neither fashion-mnist, renditions, digits"):
        parse_spec(str(tmp_path / "none"))


def test_the_command_counts_classes_and_names_skipped_files(
    spoilt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["trivium data", "check", str(spoilt)])
    data_cli.main()
    text = capsys.readouterr().out
    assert "5 unreadable files" in text
    assert f"skipped {spoilt / 'a' / 'empty.png'}" in text
    rows = {line.split()[1]: line.split()[3::2] for line in text.splitlines() if line.startswith("│")}
    assert {name: [int(cell) for cell in cells] for name, cells in rows.items()} == {
        "a": [11, 1, 3],
        "b": [10, 2, 3],
        "all": [21, 3, 6],
    }
    monkeypatch.setattr("sys.argv", ["trivium data", "check", str(spoilt), "--strict"])
    with pytest.raises(ConfigError, match="5 unreadable files, strict accepts none"):
        data_cli.main()


def test_some_classes_in_the_order_asked_for() -> None:
    whole = load_pictures(DataSpec(kind="digits"), "test", SMALL)
    some = load_pictures(DataSpec(kind="digits", classes=["7", "2"]), "test", SMALL)
    assert some.classes == ["7", "2"]
    assert set(some.labels.tolist()) == {0, 1}
    every = load_pictures(DataSpec(kind="digits", classes=["7", "2"], test=1, calibration=1), "train", SMALL)
    named = np.concatenate([load_pictures(DataSpec(kind="digits"), split, SMALL).labels for split in SPLITS])
    assert len(every) == int(np.isin(named, [7, 2]).sum()) - 2
    sevens = {whole.batch([i]).numpy().tobytes() for i in np.flatnonzero(whole.labels == 7).tolist()}
    twos = {whole.batch([i]).numpy().tobytes() for i in np.flatnonzero(whole.labels == 2).tolist()}
    seen = {every.batch([i]).numpy().tobytes(): int(label) for i, label in enumerate(every.labels)}
    assert {seen[each] for each in sevens & seen.keys()} == {0}
    assert {seen[each] for each in twos & seen.keys()} == {1}
    with pytest.raises(ConfigError, match="no class 'seven'; nearest: "):
        load_pictures(DataSpec(kind="digits", classes=["seven", "2"]), "test", SMALL)
    with pytest.raises(ConfigError, match="must differ"):
        load_pictures(DataSpec(kind="digits", classes=["2", "2"]), "test", SMALL)
