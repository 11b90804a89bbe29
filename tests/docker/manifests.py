"""What may stand in a manifest: Kubernetes' own schemas, those of custom kinds in schemas/, and words of the house."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from trivium.runtime.config import PREFIX, Settings

from .kustomize import Document, load

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.34"
"""The oldest release that the manifests are for: the first where all that they use is stable (preStop's sleep)."""
CUSTOM = {
    ("serving.kserve.io/v1alpha1", "ServingRuntime"): "servingruntime",
    ("serving.kserve.io/v1beta1", "InferenceService"): "inferenceservice",
    ("ray.io/v1", "RayJob"): "rayjob",
    ("kubeflow.org/v1", "PyTorchJob"): "pytorchjob",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "servicemonitor",
    ("kustomize.config.k8s.io/v1beta1", "Kustomization"): "kustomization",
    ("kustomize.config.k8s.io/v1alpha1", "Component"): "kustomization",
}
LABELS = {"app.kubernetes.io/name", "trivium-client", "kubernetes.io/metadata.name"}
QUANTITIES = {"cpu", "memory", "storage", "nvidia.com/gpu"}
WORDS = {
    "labels": LABELS,
    "matchLabels": LABELS,
    "selector": LABELS | {"matchLabels"},
    "annotations": {"prometheus.kserve.io/port", "prometheus.kserve.io/path", "serving.kserve.io/deploymentMode"},
    "nodeSelector": {"nvidia.com/gpu.present"},
    "requests": QUANTITIES,
    "limits": QUANTITIES,
}
"""Keys of maps whose keys no schema lists."""
VARIABLES = {PREFIX + name.upper() for name in Settings.model_fields} | {
    "OMP_NUM_THREADS",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
}


def faults(document: Document) -> Iterator[str]:
    """What is wrong with one object."""
    try:
        validator = _validator(document["apiVersion"], document["kind"])
    except KeyError as error:
        yield f"no schema for {error}"
        return
    yield from (f"{each.json_path}: {each.message[:300]}" for each in validator.iter_errors(document))
    yield from _strange(document)


def values_faults(document: Document) -> Iterator[str]:
    """What is wrong with the values of prometheus-adapter's chart."""
    yield from (error.message for error in _own("prometheus-adapter").iter_errors(document))


def walk(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in a document, with the keys and positions that lead to it."""
    yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from walk(value, (*path, key))


def _strange(document: Document) -> Iterator[str]:
    for path, value in walk(document):
        if len(path) > 1 and path[-2] in WORDS and path[-1] not in WORDS[path[-2]]:
            yield f"{path}: not a key that is in use"
        if len(path) > 2 and path[-3] == "env" and path[-1] == "name" and value not in VARIABLES:
            yield f"{path}: {value}: no such setting"


@cache
def _definitions(version: str) -> tuple[str, Registry[Any]]:
    """The folder of Kubernetes' strict schemas, and what all of them refer to."""
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing: pip install 'trivium[dev]'")
    root = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    name = next(each.name for each in root.iterdir() if each.name.startswith(f"v{version}.") and "strict" in each.name)
    folder = str(root / name)
    shared = json.loads((Path(folder) / "_definitions.json").read_text(encoding="utf-8"))
    registry: Registry[Any] = Registry()
    return folder, Resource.from_contents(shared) @ registry


@cache
def _validator(version: str, kind: str) -> Draft202012Validator:
    """Raises: KeyError for a kind that nobody knows."""
    if (version, kind) in CUSTOM:
        return _own(CUSTOM[version, kind])
    folder, registry = _definitions(KUBERNETES)
    group, _, number = version.rpartition("/")
    path = Path(folder) / f"{kind.lower()}-{group.split('.')[0] + '-' if group else ''}{number}.json"
    if not path.is_file():
        raise KeyError(f"{version} {kind}")
    schema = json.loads(path.read_text(encoding="utf-8"))
    return Draft202012Validator({"required": ["apiVersion", "kind", "metadata"], **schema}, registry=registry)


@cache
def _own(name: str) -> Draft202012Validator:
    (schema,) = load(SCHEMAS / f"{name}.yaml")
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(
        {"$id": f"https://kubernetes.io/own/{name}", **schema}, registry=_definitions(KUBERNETES)[1]
    )


def text(document: Document) -> str:
    """A document as YAML."""
    return str(yaml.safe_dump(document, sort_keys=False))
