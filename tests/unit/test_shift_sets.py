"""Shift sets: each reader on a small tree in its set's own shape, classes matched every way, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError
from trivium.train.data.shift_sets import open_shift, reader_of

imagenet_info = pytest.importorskip("timm.data.imagenet_info")
INFO = imagenet_info.ImageNetInfo("imagenet-1k")
WNIDS = [INFO.index_to_label_name(i) for i in range(1000)]
IMAGENET = [INFO.index_to_description(i) for i in range(1000)]
ANIMALS = ["cat", "dog", "goldfish"]
SIZE = Preprocessing(height=8, width=8, resize=10, mean=(0, 0, 0), std=(1, 1, 1))


def put(path: Path, value: int = 100, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)


def folders(root: Path, names: list[str], suffix: str = "png") -> Path:
    for i, name in enumerate(names):
        for k in range(2):
            put(root / name / f"{k}.{suffix}", 10 * i + k)
    return root


def test_class_folders_by_name(tmp_path: Path) -> None:
    root = folders(tmp_path / "drawn", ["Dog", "cat"])
    found = open_shift(f"drawings={root}", ANIMALS, SIZE)
    assert (found.name, found.reader, found.classes) == ("drawings", "class folders", 2)
    assert found.pictures.labels.tolist() == [1, 1, 0, 0]
    assert found.note == "2 of the model's 3 classes occur"
    # any class may be answered, and every class is an answer of its own
    given, shares = found.read(np.array([[0.2, 0.3, 0.5]], np.float32))
    assert given.tolist() == [2]
    assert shares == pytest.approx(np.array([[0.2, 0.3, 0.5]]))


def test_of_a_divided_tree_the_test_part_is_read(tmp_path: Path) -> None:
    folders(tmp_path / "train", ANIMALS)
    folders(tmp_path / "val", ["cat"])
    assert len(open_shift(f"x={tmp_path}", ANIMALS, SIZE).pictures) == 2
    folders(tmp_path / "test", ["dog", "cat"])
    assert len(open_shift(f"x={tmp_path}", ANIMALS, SIZE).pictures) == 4


def test_a_manifest(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("path,label\na.png,goldfish\n")
    found = open_shift(f"x={tmp_path / 'list.csv'}", ANIMALS, SIZE)
    assert found.reader == "manifest"
    assert found.pictures.labels.tolist() == [2]


def test_unreadable_files_are_left_out_and_told(tmp_path: Path) -> None:
    root = folders(tmp_path, ["cat"])
    (root / "cat" / "bad.png").write_bytes(b"no picture")
    found = open_shift(f"x={root}", ANIMALS, SIZE)
    assert len(found.pictures) == 2
    assert "1 files are no usable pictures" in found.note


@pytest.mark.parametrize("classes", [IMAGENET, WNIDS], ids=["descriptions", "wnids"])
def test_imagenet_r_restricts_the_answers_to_its_classes(tmp_path: Path, classes: list[str]) -> None:
    chosen = [1, 134, 517]  # 134 and 517 are both called crane
    root = folders(tmp_path, [WNIDS[i] for i in chosen], "jpg")
    (root / "README.txt").write_text("ImageNet-R")
    found = open_shift(f"imagenet-r={root}", classes, SIZE)
    assert found.reader == "imagenet-r"
    assert "restricted to the set's 3 classes" in found.note
    p = np.zeros((2, 1000), np.float32)
    p[:, 0] = 0.5  # a class that is not in the set
    p[0, 134], p[0, 517] = 0.3, 0.2
    p[1, 1], p[1, 517] = 0.1, 0.4
    given, shares = found.read(p)
    assert given.tolist() == [1, 2]
    assert shares == pytest.approx(np.array([[0, 0.6, 0.4], [0.2, 0, 0.8]]))
    # labels number the restricted answers in the folders' order
    assert np.unique(found.pictures.labels).tolist() == [0, 1, 2]
    assert [int(found.answers[i]) for i in chosen] == [0, 1, 2]


def test_imagenet_a_and_sketch(tmp_path: Path) -> None:
    root = folders(tmp_path, [WNIDS[5], WNIDS[7]])
    assert (open_shift(f"imagenet-a={root}", IMAGENET, SIZE).answers >= 0).sum() == 2
    sketch = open_shift(f"imagenet-sketch={root}", IMAGENET, SIZE)
    assert (sketch.answers >= 0).all()
    assert sketch.pictures.labels.tolist() == [5, 5, 7, 7]


def test_folders_of_wordnet_ids_find_a_model_of_some_of_the_classes(tmp_path: Path) -> None:
    root = folders(tmp_path, [WNIDS[1]])
    found = open_shift(f"x={root}", ANIMALS, SIZE)
    assert found.pictures.labels.tolist() == [2, 2]


def test_imagenet_v2_counts_its_folders_as_numbers(tmp_path: Path) -> None:
    root = folders(tmp_path, ["0", "10", "2", "999"], "jpeg")
    found = open_shift(f"imagenetv2-matched-frequency={root}", IMAGENET, SIZE)
    assert found.reader == "imagenet-v2"
    assert found.pictures.labels.tolist() == [0, 0, 10, 10, 2, 2, 999, 999]


def corrupted_tree(root: Path, kinds: dict[str, str], severities: range = range(1, 6)) -> Path:
    for kind, group in kinds.items():
        for severity in severities:
            for wnid in (WNIDS[0], WNIDS[1]):
                for k in range(3):
                    put(root / group / kind / str(severity) / wnid / f"{k}.JPEG", 20 * severity)
    return root


def test_imagenet_c(tmp_path: Path) -> None:
    root = corrupted_tree(tmp_path, {"fog": "", "gaussian_noise": "noise"})
    assert reader_of("anything", root) == "imagenet-c"
    found = open_shift(f"imagenet-c={root}", IMAGENET, SIZE)
    assert found.corruptions == ("fog", "gaussian_noise")
    assert found.cells is not None
    assert len(found.pictures) == 2 * 5 * 6
    assert np.unique(found.cells[:, 1]).tolist() == [1, 2, 3, 4, 5]
    assert np.bincount(found.cells[:, 2]).tolist() == [10] * 6
    # as it is, not enlarged to 10 and cropped: all of a picture of 8 pixels is there
    assert found.pictures.preprocessing.resize is None
    for i in range(0, len(found.pictures), 7):
        value = found.pictures.batch([i]).float().mean().item()
        assert value == pytest.approx(20 * found.cells[i, 1], abs=2)


def test_imagenet_c_takes_the_same_pictures_of_each_cell(tmp_path: Path) -> None:
    root = corrupted_tree(tmp_path, {"fog": "", "snow": ""})
    found = open_shift(f"imagenet-c={root}", IMAGENET, SIZE, count=4, seed=1)
    assert found.cells is not None
    assert np.bincount(found.cells[:, 2]).tolist() == [10] * 4
    assert "4 pictures of each" in found.note


def test_an_incomplete_imagenet_c_is_refused(tmp_path: Path) -> None:
    root = corrupted_tree(tmp_path, {"fog": ""})
    corrupted_tree(tmp_path, {"snow": ""}, range(1, 5))
    with pytest.raises(ConfigError, match="snow lacks severity 5"):
        open_shift(f"imagenet-c={root}", IMAGENET, SIZE)


def objectnet(root: Path, mapping: dict[str, object]) -> Path:
    """ObjectNet as distributed: images of 12 pixels with a red border of two, and its mappings."""
    for i, name in enumerate(("alarm_clock", "banana", "still_life")):
        picture = np.zeros((12, 12, 3), np.uint8)
        picture[..., 0] = 255
        picture[2:-2, 2:-2] = 50 * (i + 1)
        (root / "images" / name).mkdir(parents=True)
        Image.fromarray(picture).save(root / "images" / name / "0.png")
    labels = {"alarm_clock": "Alarm clock", "banana": "Banana", "still_life": "Still Life"}
    (root / "mappings").mkdir()
    (root / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    (root / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(mapping))
    return root


def test_objectnet_by_its_own_mapping(tmp_path: Path) -> None:
    root = objectnet(tmp_path, {"Alarm clock": "analog clock; digital clock", "Banana": "banana"})
    found = open_shift(f"objectnet={root}", IMAGENET, SIZE)
    assert "2 of its 3 classes" in found.note
    assert len(found.pictures) == 2
    batch = found.pictures.batch([0, 1])
    assert batch[0].unique().tolist() == [50]
    assert batch[1].unique().tolist() == [100]
    analog, digital, banana = 409, 530, 954
    p = np.zeros((3, 1000), np.float32)
    p[0, analog], p[0, digital], p[0, banana] = 0.3, 0.3, 0.4
    p[1, digital], p[1, analog] = 0.7, 0.3
    p[2, 0], p[2, banana] = 0.6, 0.4
    given, shares = found.read(p)
    # the most probable class decides; both clocks are the same right answer; others may be answered too
    assert given.tolist()[:2] == [1, 0]
    assert given[2] not in found.pictures.labels
    assert shares[0, :2] == pytest.approx([0.6, 0.4])
    assert shares.sum(1) == pytest.approx(1)


def test_objectnet_by_a_mapping_of_the_users(tmp_path: Path) -> None:
    root = objectnet(tmp_path / "objectnet", {})
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"banana": [954], "still_life": WNIDS[3]}))
    found = open_shift(f"objectnet={root}", IMAGENET, SIZE, mapping=mapping)
    assert [int(found.answers[i]) for i in (954, 3)] == found.pictures.labels.tolist()
    mapping.write_text(json.dumps({"banana": 954, "still_life": "banana"}))
    with pytest.raises(ConfigError, match="two of its classes stand for 'banana', the second is 'still_life'"):
        open_shift(f"objectnet={root}", IMAGENET, SIZE, mapping=mapping)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    root = folders(tmp_path / "set", ["cat", "horse"])
    empty = tmp_path / "empty"
    (empty / "cat").mkdir(parents=True)
    bare = objectnet(tmp_path / "bare", {"Banana": "no such fruit"})
    for text, message in (
        (f"x={root}", "1 of 2 classes are none of the model's 3, by name, WordNet id or index, say 'horse'"),
        ("x", "NAME=PATH"),
        (f"={root}", "NAME=PATH"),
        (f"x={tmp_path / 'nowhere'}", "no such file or directory"),
        (f"imagenet-c={root}", "no tree of CORRUPTION/SEVERITY/CLASS"),
        (f"x={empty}", "no usable picture"),
        (f"objectnet={root}", "name a mapping with --mapping"),
        (f"objectnet={bare}", "none of its 3 classes stands for one of the model's"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_shift(text, ANIMALS, SIZE)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="several of its classes"):
        open_shift(f"x={folders(tmp_path / 'two', ['dog', 'Dog'])}", ANIMALS, SIZE)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("imagenet-c", "imagenet-c"),
        ("ImageNet-R-rendition", "imagenet-r"),
        ("imagenet_a", "imagenet-a"),
        ("imagenet-sketch", "imagenet-sketch"),
        ("imagenet-camera", "class folders"),
        ("cartoons", "class folders"),
    ],
)
def test_names_pick_readers(name: str, reader: str, tmp_path: Path) -> None:
    folders(tmp_path, ["cat"])
    assert reader_of(name, tmp_path) == reader
