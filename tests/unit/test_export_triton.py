"""The model repository that export writes: layout, configuration, versions, refusals."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from trivium.export.triton import write_repository
from trivium.runtime.bundle import open_bundle
from trivium.runtime.errors import BundleError, ConfigError
from trivium.runtime.wire import OUTPUTS

Build = Callable[..., Path]


def config_of(model: Path) -> pb.ModelConfig:
    return text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())


def test_layout(tiny_bundle: Path, tmp_path: Path) -> None:
    written = write_repository(tiny_bundle, tmp_path / "deep/models")
    model = tmp_path / "deep/models/tiny"
    assert written == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert open_bundle(model / "1/bundle").manifest == open_bundle(tiny_bundle).manifest
    ast.parse((model / "1/model.py").read_text())
    assert len((model / "1/model.py").read_text().splitlines()) < 12
    packages = [line for line in (model / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert packages[0].startswith("trivium[cpu]==")
    assert packages[1:] == ["numpy<2"]


def test_configuration_for_a_cpu(tiny_bundle: Path, tmp_path: Path) -> None:
    write_repository(tiny_bundle, tmp_path, instances=3, max_batch=16)
    config = config_of(tmp_path / "tiny")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "python", 0)
    assert [(one.kind, one.count) for one in config.instance_group] == [(pb.ModelInstanceGroup.KIND_CPU, 3)]
    assert {one.name: (list(one.dims), one.optional) for one in config.input} == {
        "image": ([-1, 32, 32, 3], True),
        "encoded_image": ([-1], True),
    }
    assert [one.name for one in config.output] == list(OUTPUTS)
    assert not config.dynamic_batching.preferred_batch_size
    assert config.parameters["heads"].string_value == "clean,robust,combined"
    assert config.parameters["max_batch"].string_value == "16"


def test_configuration_for_a_gpu(tiny_bundle: Path, tmp_path: Path) -> None:
    write_repository(tiny_bundle, tmp_path, device="cuda", max_batch=16)
    config = config_of(tmp_path / "tiny")
    assert config.max_batch_size == 16
    assert [(one.kind, one.count) for one in config.instance_group] == [(pb.ModelInstanceGroup.KIND_GPU, 1)]
    dims = {one.name: list(one.dims) for one in (*config.input, *config.output)}
    assert dims["image"] == [32, 32, 3]
    assert dims["encoded_image"] == dims["class_id"] == [1]
    assert dims["divergence"] == [3, 3]
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    assert "trivium[gpu]==" in (tmp_path / "tiny/requirements.txt").read_text()


def test_a_second_version_leaves_the_configuration_alone(
    tiny_bundle: Path, build_bundle: Build, tmp_path: Path
) -> None:
    write_repository(tiny_bundle, tmp_path / "models", instances=2)
    config = tmp_path / "models/tiny/config.pbtxt"
    config.write_text(config.read_text().replace("count: 2", "count: 7"))
    edited = config.read_bytes()
    third = build_bundle(tmp_path / "third", version="3")
    written = write_repository(third, tmp_path / "models", instances=2)
    assert {path.relative_to(tmp_path / "models").as_posix() for path in written} == {
        "tiny/3/model.py", "tiny/3/bundle/manifest.json", "tiny/3/bundle/model.onnx", "tiny/3/bundle/golden.npz",
    }  # fmt: skip
    assert config.read_bytes() == edited
    with pytest.raises(ConfigError, match="version 3 is in the repository already"):
        write_repository(third, tmp_path / "models")


@pytest.mark.parametrize(
    ("bundle", "options", "words"),
    [
        ({"classes": 11}, {}, "another output"),
        ({"heads": ("a", "b", "c")}, {}, "another heads"),
        ({}, {"device": "cuda"}, "another input, output, max_batch_size, device"),
        ({}, {"max_batch": 8}, "another max_batch"),
    ],
)
def test_versions_that_do_not_go_together_are_refused(
    tiny_bundle: Path, build_bundle: Build, tmp_path: Path, bundle: dict, options: dict, words: str
) -> None:
    write_repository(tiny_bundle, tmp_path / "models")
    before = sorted((tmp_path / "models").rglob("*"))
    other = build_bundle(tmp_path / "other", version="2", **bundle)
    with pytest.raises(ConfigError, match=words):
        write_repository(other, tmp_path / "models", **options)
    assert sorted((tmp_path / "models").rglob("*")) == before


def test_a_broken_configuration_is_refused(tiny_bundle: Path, build_bundle: Build, tmp_path: Path) -> None:
    write_repository(tiny_bundle, tmp_path / "models")
    (tmp_path / "models/tiny/config.pbtxt").write_text("name: {")
    with pytest.raises(ConfigError, match=r"config\.pbtxt: cannot be read"):
        write_repository(build_bundle(tmp_path / "other", version="2"), tmp_path / "models")


def test_nothing_is_left_of_a_failure(tiny_bundle: Path, build_bundle: Build, tmp_path: Path) -> None:
    broken = build_bundle(tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError):
        write_repository(broken, tmp_path / "models")
    assert not (tmp_path / "models").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_repository(tiny_bundle, tmp_path / "file/models")
