"""The runner over fake TensorRT and fake device memory: right answers, buffers, graphs, and when it steps back.

The fakes compute with ONNX Runtime on the addresses they are given. No TensorRT and no card took part.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from trivium.export.router_graph import fold_router
from trivium.kernels import HeadStatistics
from trivium.runtime import engines
from trivium.runtime.bundle import open_bundle, seal
from trivium.runtime.config import Settings
from trivium.runtime.device import card
from trivium.runtime.engine import Engine
from trivium.runtime.engines import start_engine
from trivium.runtime.errors import EngineError, EngineMismatch, InvalidRequest
from trivium.runtime.health import Health
from trivium.runtime.lifecycle import Lifecycle
from trivium.runtime.metrics import Metrics
from trivium.runtime.repository import Repository
from trivium.runtime.tensorrt import TensorRTEngine, fitting_plan, padded

from .cuda import Machine

Planned = Callable[..., Path]


def same(found: HeadStatistics, expected: HeadStatistics) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert a.dtype == np.float32


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 12])
def test_every_picture_gets_its_own_answer(planned: Planned, some_pictures: NDArray[np.uint8], count: int) -> None:
    bundle = open_bundle(planned(max_batch=5))
    engine = TensorRTEngine(bundle)
    images = some_pictures[:count]
    expected = Engine(bundle, kernels="off").run(images)
    for _ in range(3):
        same(engine.run(images), expected)
        same(engine.run_batch(images), expected)
    same(engine.run(images[::-1]), HeadStatistics(*(values[::-1] for values in expected)))
    assert (engine.device, engine.kernels) == ("cuda", "tensorrt")
    assert "model.plan: TensorRT 11.4.0.106, fp32, NVIDIA Fake 100" in engine.kernels_reason
    engine.self_test()


def test_the_outputs_of_a_folded_router_are_left_on_the_card(
    planned: Planned, machine: Machine, tiny_bundle: Path, tmp_path: Path, some_pictures: NDArray[np.uint8]
) -> None:
    root = tmp_path / "folded"
    shutil.copytree(tiny_bundle, root)
    bundle = open_bundle(root)
    folded = fold_router(onnx.load(bundle.model_path), bundle.manifest, "float32")
    bundle.model_path.write_bytes(folded.SerializeToString())
    seal(root, bundle.manifest)
    engine = TensorRTEngine(open_bundle(planned(source=root)), lanes=1)
    assert len(machine.device) == 7 + len(folded.graph.output) - 5
    same(engine.run(some_pictures), Engine(bundle, kernels="off").run(some_pictures))


def test_a_size_is_captured_once_and_then_launched(
    planned: Planned, machine: Machine, some_pictures: NDArray[np.uint8]
) -> None:
    engine = TensorRTEngine(open_bundle(planned(max_batch=8)), lanes=1)
    for count in (3, 4, 3, 4, 4):
        engine.run(some_pictures[:count])
    assert (machine.launches, len(machine.graphs)) == (5, 1)
    engine.run(some_pictures[:1])
    engine.run(some_pictures[:1])
    assert (machine.launches, len(machine.graphs)) == (7, 2)
    del engine


def test_memory_does_not_grow(planned: Planned, machine: Machine, some_pictures: NDArray[np.uint8]) -> None:
    engine = TensorRTEngine(open_bundle(planned(max_batch=8)), lanes=2)
    held = len(machine.device), len(machine.host), len(machine.pending)
    assert held == (2 * 7, 2 * 6, 2), "a lane has scratch, input and five outputs, and one stream"
    for count in (1, 2, 3, 8, 12):
        engine.run(some_pictures[:count])
    assert (len(machine.device), len(machine.host), len(machine.pending)) == held
    del engine


def test_a_plan_that_cannot_be_captured_is_enqueued(
    planned: Planned,
    machine: Machine,
    tensorrt: Any,
    some_pictures: NDArray[np.uint8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = open_bundle(planned())
    tensorrt.Runtime.engine.capturable = False
    engine = TensorRTEngine(bundle, lanes=1)
    expected = Engine(bundle, kernels="off").run(some_pictures[:2])
    for _ in range(2):
        same(engine.run(some_pictures[:2]), expected)
    assert machine.launches == 0
    assert "batches of 2 run without a CUDA graph" in caplog.text
    del engine


def test_threads_share_the_lanes(planned: Planned, some_pictures: NDArray[np.uint8]) -> None:
    bundle = open_bundle(planned(max_batch=4))
    engine = TensorRTEngine(bundle, lanes=2)
    expected = Engine(bundle, kernels="off").run(some_pictures)
    wrong: list[BaseException] = []

    def ask(seed: int) -> None:
        draw = np.random.default_rng(seed)
        try:
            for _ in range(20):
                chosen = draw.integers(0, len(some_pictures), draw.integers(1, 7))
                same(engine.run(some_pictures[chosen]), HeadStatistics(*(values[chosen] for values in expected)))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_lane_survives_a_failure(planned: Planned, tensorrt: Any, some_pictures: NDArray[np.uint8]) -> None:
    bundle = open_bundle(planned())
    engine = TensorRTEngine(bundle, lanes=1)
    tensorrt.Runtime.engine.ready = False
    for _ in range(3):
        with pytest.raises(EngineError, match="could not enqueue"):
            engine.run(some_pictures[:2])
    tensorrt.Runtime.engine.ready = True
    same(engine.run(some_pictures[:2]), Engine(bundle, kernels="off").run(some_pictures[:2]))


def test_pictures_of_another_shape_are_refused(planned: Planned) -> None:
    engine = TensorRTEngine(open_bundle(planned()))
    for wrong in (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((0, 32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3))):
        with pytest.raises(InvalidRequest):
            engine.run(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        ({"card": "NVIDIA T4"}, "other-card", r"for NVIDIA T4 \(9.0\), this card is NVIDIA Fake 100 \(9.0\)"),
        ({"compute_capability": "7.5"}, "other-card", r"NVIDIA Fake 100 \(7.5\)"),
        ({"tensorrt": "10.13.0.35"}, "other-version", "of TensorRT 10.13.0.35, installed is 11.4.0.106"),
    ],
)
def test_a_plan_of_another_machine_is_a_named_error(
    planned: Planned, changes: dict[str, str], reason: str, text: str
) -> None:
    with pytest.raises(EngineMismatch, match=text) as caught:
        TensorRTEngine(open_bundle(planned(**changes)))
    assert caught.value.reason == reason


def test_the_plan_for_this_card_is_found_among_others(planned: Planned, tiny_bundle: Path) -> None:
    bundle = open_bundle(planned())
    own = bundle.manifest.plans[0]
    other = own.model_copy(update={"card": "NVIDIA T4"})
    bundle.manifest.plans[:] = [other, own]
    assert fitting_plan(bundle) is own
    with pytest.raises(EngineMismatch, match="the bundle has no TensorRT plan") as caught:
        fitting_plan(open_bundle(tiny_bundle))
    assert caught.value.reason == "no-plan"


def test_without_driver_or_card(planned: Planned, machine: Machine) -> None:
    bundle = open_bundle(planned())
    machine.cards = 0
    with pytest.raises(EngineMismatch, match="no CUDA card") as caught:
        TensorRTEngine(bundle)
    assert caught.value.reason == "no-card"
    machine.driver = False
    with pytest.raises(EngineMismatch, match="count the cards: cudaErrorInsufficientDriver") as caught:
        TensorRTEngine(bundle)
    assert caught.value.reason == "no-card"


def test_a_plan_of_another_model_is_refused(
    planned: Planned, build_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    other = planned(source=build_bundle(tmp_path / "other", classes=7))
    bundle = open_bundle(planned())
    (bundle.path / "model.plan").write_bytes((other / "model.plan").read_bytes())
    with pytest.raises(
        EngineError, match=r"model.plan: probabilities is .*\[-1, 3, 7\], the manifest says \['N', 3, 10\]"
    ):
        TensorRTEngine(bundle)
    (bundle.path / "model.plan").write_bytes(b"\0" * 100)
    with pytest.raises(EngineMismatch, match="TensorRT cannot read this plan") as caught:
        TensorRTEngine(bundle)
    assert caught.value.reason == "unreadable"


def test_a_card_without_memory_is_an_error(planned: Planned, machine: Machine) -> None:
    bundle = open_bundle(planned())
    machine.memory = 10_000
    with pytest.raises(EngineError, match=r"allocate \d+ bytes on the card: cudaErrorMemoryAllocation"):
        TensorRTEngine(bundle)


def test_padding() -> None:
    assert [padded(n, 12) for n in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]


@pytest.fixture
def onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Start ONNX Runtime on the CPU wherever a card is asked for; the list holds what it was asked."""
    asked: list[dict[str, Any]] = []

    def start(bundle: Any, **options: Any) -> Engine:
        asked.append(options)
        return Engine(bundle, kernels="off")

    monkeypatch.setattr(engines, "Engine", start)
    return asked


def test_the_plan_runs_where_it_fits(planned: Planned, onnx_runtime: list[dict[str, Any]]) -> None:
    bundle = open_bundle(planned())
    for choice in ("tensorrt", "auto"):
        started, fallback = start_engine(bundle, engine=choice, device="cuda")  # type: ignore[arg-type]
        assert isinstance(started, TensorRTEngine)
        assert fallback == ""
        del started
    assert onnx_runtime == []


@pytest.mark.parametrize("choice", ["tensorrt", "auto"])
def test_onnx_runtime_takes_over(
    planned: Planned, onnx_runtime: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, choice: Any
) -> None:
    bundle = open_bundle(planned(card="NVIDIA T4"))
    with caplog.at_level(logging.WARNING):
        started, fallback = start_engine(bundle, engine=choice, device="cuda")
    assert isinstance(started, Engine)
    assert fallback == "other-card"
    assert "tiny: ONNX Runtime in TensorRT's place: the bundle's plans are for NVIDIA T4" in caplog.text
    assert [options["provider"] for options in onnx_runtime] == ["plain"]


def test_wrong_answers_make_onnx_runtime_take_over(
    planned: Planned, tensorrt: Any, onnx_runtime: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(planned())
    right = TensorRTEngine.run

    def wrong(self: TensorRTEngine, images: NDArray[np.uint8]) -> HeadStatistics:
        statistics = right(self, images)
        return statistics._replace(probabilities=statistics.probabilities[..., ::-1])

    monkeypatch.setattr(TensorRTEngine, "run", wrong)
    started, fallback = start_engine(bundle, engine="tensorrt", device="cuda")
    assert isinstance(started, Engine)
    assert fallback == "failed"


def test_no_plan_is_no_reason_to_warn_in_auto(
    tensorrt: Any, tiny_bundle: Path, onnx_runtime: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = open_bundle(tiny_bundle)
    assert start_engine(bundle, engine="auto", device="cuda")[1] == ""
    assert start_engine(bundle, engine="onnx", device="cuda")[1] == ""
    assert caplog.text == ""
    assert start_engine(bundle, engine="tensorrt", device="cuda")[1] == "no-plan"
    assert "the bundle has no TensorRT plan" in caplog.text


def test_a_plan_is_not_touched_unless_asked_for(planned: Planned, onnx_runtime: list[dict[str, Any]]) -> None:
    bundle = open_bundle(planned())
    for arguments in ({"engine": "onnx", "device": "cuda"}, {"engine": "auto", "device": "cpu"}, {}):
        assert isinstance(start_engine(bundle, **arguments)[0], Engine)  # type: ignore[arg-type]


def test_without_the_library(
    machine: Machine, planned: Planned, monkeypatch: pytest.MonkeyPatch, onnx_runtime: list[dict[str, Any]]
) -> None:
    bundle = open_bundle(planned())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert start_engine(bundle, engine="tensorrt", device="cuda")[1] == "no-tensorrt"
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineMismatch, match="cuda-bindings"):
        card()


def test_a_server_counts_the_fallback(planned: Planned, onnx_runtime: list[dict[str, Any]]) -> None:
    root = planned(tensorrt="10.13.0.35")
    metrics = Metrics({}, lambda: 0)
    settings = Settings(bundles=(root,), engine="tensorrt", device="cuda")
    asyncio.run(Lifecycle(settings, Repository(metrics), metrics.loads, Health()).start())
    assert 'trivium_engine_fallbacks_total{model="tiny",reason="other-version"} 1.0' in metrics.exposition()[1].decode()
    assert 'kernels="function"' in metrics.exposition()[1].decode()


@pytest.mark.parametrize("started", [True, False])
def test_the_tensorrt_provider_gets_its_options(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    """ONNX Runtime's own TensorRT provider needs a card too: what it is asked for is looked at, and a CPU answers."""
    asked: list[Any] = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path: str, options: Any, providers: Any) -> None:
            asked.extend(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            first = ["TensorrtExecutionProvider"] if started else []
            return [*first, "CUDAExecutionProvider", "CPUExecutionProvider"]

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    options: dict[str, Any] = {"kernels": "off", "device": "cuda", "provider": "tensorrt", "cache": tmp_path}
    if not started:
        with pytest.raises(EngineError, match="could not start its TensorRT provider"):
            Engine(open_bundle(tiny_bundle), **options)
        return
    Engine(open_bundle(tiny_bundle), **options)
    name, settings = asked[0]
    assert [name, *asked[1:]] == names
    assert settings == {
        "trt_engine_cache_enable": True, "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": True, "trt_timing_cache_path": str(tmp_path),
    }  # fmt: skip
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names[1:])
    with pytest.raises(EngineError, match="has no TensorRT provider"):
        Engine(open_bundle(tiny_bundle), **options)
