"""A machine with a fake card, fake tensorrt and fake cuda-bindings, and bundles with a plan for it."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trivium.export.tensorrt import build_engine
from trivium.runtime.bundle import open_bundle, seal
from trivium.runtime.tensorrt import logger

from . import cuda, fake


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda.Machine]:
    """One with a card; afterwards it must have all its memory, streams and graphs back."""
    result = cuda.Machine()
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = result.module()  # type: ignore[attr-defined]
    for name, module in (
        ("cuda", ModuleType("cuda")),
        ("cuda.bindings", bindings),
        ("cuda.bindings.runtime", bindings.runtime),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    yield result
    gc.collect()
    assert (result.device, result.host, result.pending, result.graphs) == ({}, {}, {}, {})


@pytest.fixture
def tensorrt(machine: cuda.Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, as far as it is faked."""
    result = fake.module(machine)
    monkeypatch.setitem(sys.modules, "tensorrt", result)
    logger.cache_clear()
    yield result
    logger.cache_clear()


@pytest.fixture
def planned(tensorrt: Any, tiny_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """planned(max_batch=8, **changes of the plan's record): a copy of the tiny bundle with a plan."""

    def make(max_batch: int = 8, source: Path = tiny_bundle, **changes: Any) -> Path:
        root = tmp_path / f"planned{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source, root)
        plan = build_engine(open_bundle(root), root / "model.plan", max_batch=max_batch)
        manifest = open_bundle(source).manifest
        seal(root, manifest.model_copy(update={"plans": [plan.model_copy(update=changes)]}))
        return root

    return make
