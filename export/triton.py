"""A Triton model repository around a bundle: config.pbtxt, version folders, and a model.py that calls our predictor."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from trivium.runtime.bundle import MANIFEST, Manifest, open_bundle
from trivium.runtime.cpus import usable_cpus
from trivium.runtime.errors import ConfigError
from trivium.runtime.staging import staging
from trivium.runtime.triton import BUNDLE, ENCODED, IMAGE
from trivium.runtime.wire import config_parameters, outputs_of

CONFIG, REQUIREMENTS, MODEL = "config.pbtxt", "requirements.txt", "model.py"
MODEL_PY = '''\
"""Triton's way into trivium: the bundle beside this file, answered by the predictor of `trivium serve`."""

import triton_python_backend_utils

from trivium.runtime.triton import Model


class TritonPythonModel(Model):
    backend = triton_python_backend_utils
'''
TYPES = {"UINT8": pb.TYPE_UINT8, "BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL}
TYPES |= {"FP32": pb.TYPE_FP32, "INT64": pb.TYPE_INT64}
MAX_QUEUE = 256
MAX_WAIT_US = 600_000_000
"""Triton lets a request shorten its time in the queue, but only where there is one to be shortened."""
GPU_DELAY_US = 1000
"""How long a GPU's batch waits for company."""


def write_repository(
    bundle: Path,
    repository: Path,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    instances: int | None = None,
    max_batch: int = 64,
) -> list[Path]:
    """Put a bundle into a model repository, which is made where there is none, as one more version of its model.

    A config.pbtxt that is there already stays as it is, with whatever its owner changed in it.

    Args:
        device: where the model is to run; it decides how Triton batches.
        instances: processes that answer; default: the CPUs that this process may use, one on a GPU.
        max_batch: most pictures in a request, and on a GPU in a batch.

    Returns: the files written.
    Raises: BundleError; ConfigError where the repository has this version already, where its other versions do not go
        with it, or where it cannot be written; StorageError. Nothing is left of a failure.
    """
    manifest = open_bundle(bundle).manifest
    if instances is None:
        instances = usable_cpus() if device == "cpu" else 1
    text = config(manifest, device, instances, max_batch)
    model = repository / manifest.name
    if os.path.lexists(model / manifest.version):
        raise ConfigError(f"{model}: version {manifest.version} is in the repository already")
    if (model / CONFIG).exists():
        _see_that_versions_agree(model / CONFIG, text)
        with staging(model / manifest.version) as folder:
            _fill(folder, bundle, manifest)
        return sorted(path for path in (model / manifest.version).rglob("*") if path.is_file())
    with staging(model) as folder:
        _fill(folder / manifest.version, bundle, manifest)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        (folder / REQUIREMENTS).write_text(requirements(device), encoding="utf-8")
    return sorted(path for path in model.rglob("*") if path.is_file())


def _fill(folder: Path, bundle: Path, manifest: Manifest) -> None:
    """A version's folder: model.py and the bundle."""
    for name in (MANIFEST, *(file.path for file in manifest.files)):
        target = folder / BUNDLE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, target)
    (folder / MODEL).write_text(MODEL_PY, encoding="utf-8")


def requirements(device: Literal["cpu", "cuda"] = "cpu") -> str:
    """What the Python environment of the model needs, for pip; there is no torch in it."""
    extra = "cpu" if device == "cpu" else "gpu"
    return (
        "# The environment of model.py: the first python3 on tritonserver's PATH, or EXECUTION_ENV_PATH.\n"
        f"trivium[{extra}]=={version('trivium')}\n"
        "# Python back ends built before NumPy 2 answer with empty tensors under it; model.py refuses to start then.\n"
        "numpy<2\n"
    )


def config(manifest: Manifest, device: Literal["cpu", "cuda"], instances: int, max_batch: int) -> str:
    """config.pbtxt.

    On a CPU a batch is no faster than its pictures, and an instance that takes one away from another only adds to the
    latency: requests go one by one to whichever instance is idle, and shapes are those of `trivium serve`. On a GPU
    Triton forms batches; its batching knows no tensor without a shape behind the batch's axis, so that encoded_image,
    class_id, label and head are [N, 1] there.
    """
    batching = device == "cuda"
    height, width = manifest.preprocessing.height, manifest.preprocessing.width
    model = pb.ModelConfig(name=manifest.name, backend="python", max_batch_size=max_batch if batching else 0)
    model.version_policy.latest.num_versions = 1

    def add(tensors: Any, name: str, datatype: str, tail: tuple[int, ...], **fields: Any) -> None:
        tensor = tensors.add(name=name, data_type=TYPES[datatype], dims=tail if batching else (-1, *tail), **fields)
        if not tensor.dims:
            tensor.dims.append(1)
            tensor.reshape.SetInParent()

    add(model.input, IMAGE, "UINT8", (height, width, 3), optional=True)
    add(model.input, ENCODED, "BYTES", (), optional=True)
    for name, output in outputs_of(manifest).items():
        add(model.output, name, output.datatype, output.dims(len(manifest.heads), len(manifest.classes)))
    kind = pb.ModelInstanceGroup.KIND_GPU if batching else pb.ModelInstanceGroup.KIND_CPU
    model.instance_group.add(name=manifest.name, count=instances, kind=kind)

    queue = model.dynamic_batching
    queue.priority_levels, queue.default_priority_level = 2, 2
    queue.default_queue_policy.timeout_action = pb.ModelQueuePolicy.REJECT
    queue.default_queue_policy.allow_timeout_override = True
    queue.default_queue_policy.max_queue_size = MAX_QUEUE
    queue.default_queue_policy.default_timeout_microseconds = MAX_WAIT_US
    if batching:
        queue.preferred_batch_size.extend(size for size in (8, 16, 32, 64) if size <= max_batch)
        queue.max_queue_delay_microseconds = GPU_DELAY_US

    warmup = model.model_warmup.add(name="black picture", batch_size=1)
    picture = warmup.inputs[IMAGE]
    picture.data_type = TYPES["UINT8"]
    picture.dims.extend((height, width, 3) if batching else (1, height, width, 3))
    picture.zero_data = True
    for name, value in (config_parameters(manifest) | {"device": device, "max_batch": str(max_batch)}).items():
        model.parameters[name].string_value = value
    return str(text_format.MessageToString(model))


def _see_that_versions_agree(path: Path, text: str) -> None:
    """All versions of a model share one config.pbtxt."""
    try:
        old = text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    new = text_format.Parse(text, pb.ModelConfig())
    differing = [field for field in ("input", "output", "max_batch_size") if getattr(old, field) != getattr(new, field)]
    differing += [name for name in sorted(new.parameters) if old.parameters[name] != new.parameters[name]]
    if differing:
        raise ConfigError(
            f"{path}: the model's versions share it, and this one needs another {', '.join(differing)}; "
            "use another name or repository"
        )
