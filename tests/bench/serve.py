"""What the server costs beside its engine, measured so that a noisy machine does not matter much.

    python -m tests.bench.serve            writes build/bench/serve.json

Efficiency is ONNX Runtime's CPU milliseconds a picture over the server's CPU milliseconds a picture, each probed in
turn within the same minute; the limit is the pictures a second of as many bare ONNX Runtime threads as the server has
instances, on the same graph with the same kernels. The clients are a closed loop in a process of their own; on a
machine whose cores they share with the server, ratio_to_limit is therefore low and efficiency is the figure to read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from tritonclient.grpc import service_pb2

METHOD = "/inference.GRPCInferenceService/ModelInfer"
ROOT = Path(__file__).parents[2]
HEADS = ("clean", "robust", "combined")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serve", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["lite0", "tiny"], help="lite0, tiny or bundle directories")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each visit")
    parser.add_argument("--rounds", type=int, default=3, help="visits of every row")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench/serve.json")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        print(json.dumps(probe(given.probe, given.instances, given.seconds)))
        return
    rows = [row for model in given.models for row in measure(model, given)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=2) + "\n")
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in columns))
    print(given.out)


def measure(model: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each concurrency: medians over the rounds."""
    bundle = Path(model) if Path(model).is_dir() else given.out.parent / f"bundle-{model}"
    if not bundle.is_dir():
        build(model, bundle)
    visits: dict[int, list[dict[str, float]]] = {concurrency: [] for concurrency in given.concurrency}
    with serving(bundle, given.instances) as ready:
        process = psutil.Process(ready["pid"])
        request = picture_request(bundle)
        asyncio.run(load(ready["grpc"], request, 2 * given.instances, 1.0))
        for _ in range(given.rounds):
            for concurrency in given.concurrency:
                limit = run_probe(bundle, given)
                before, start = process.cpu_times(), time.monotonic()
                latencies = asyncio.run(load(ready["grpc"], request, concurrency, given.seconds))
                wall, after = time.monotonic() - start, process.cpu_times()
                cpu = after.user + after.system - before.user - before.system
                ms = 1000 * cpu / len(latencies)
                visits[concurrency].append(
                    {
                        "rps": len(latencies) / wall,
                        "ratio_to_limit": len(latencies) / wall / limit["rps"],
                        "cpu_ms_per_request": ms,
                        "ort_cpu_ms": limit["cpu_ms"],
                        "ort_ms": limit["ms"],
                        "efficiency": limit["cpu_ms"] / ms,
                        "p50_ms": 1000 * float(np.quantile(latencies, 0.5)),
                        "p99_ms": 1000 * float(np.quantile(latencies, 0.99)),
                        "rss_mb": process.memory_info().rss / 1e6,
                    }
                )
    return [
        {"server": "trivium", "model": model, "concurrency": concurrency}
        | {name: statistics.median(visit[name] for visit in found) for name in found[0]}
        for concurrency, found in visits.items()
    ]


def probe(bundle: Path, threads: int, seconds: float) -> dict[str, float]:
    """Bare ONNX Runtime: pictures a second, CPU milliseconds and milliseconds a picture."""
    from trivium.runtime.bundle import open_bundle
    from trivium.runtime.engine import INPUT, OUTPUTS, Engine

    session = Engine(open_bundle(bundle))._session
    image = np.frombuffer(picture_request_pixels(bundle), np.uint8).reshape(1, *session.get_inputs()[0].shape[1:])
    counts = [0] * threads
    for _ in range(3):
        session.run(OUTPUTS, {INPUT: image})

    def work(index: int) -> None:
        while time.monotonic() < end:
            session.run(OUTPUTS, {INPUT: image})
            counts[index] += 1

    before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    end = start + seconds
    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    total = sum(counts)
    return {"rps": total / wall, "cpu_ms": 1000 * cpu / total, "ms": 1000 * wall * threads / total}


def run_probe(bundle: Path, given: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.serve", "--probe", str(bundle)]
    command += ["--instances", str(given.instances), "--seconds", str(given.seconds / 2)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    return found


async def load(url: str, request: bytes, concurrency: int, seconds: float) -> list[float]:
    """Closed loop: seconds of each answer of `concurrency` clients that ask again at once."""
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client(call: Any) -> None:
        while (start := time.monotonic()) < end:
            await call(request)
            latencies.append(time.monotonic() - start)

    async with grpc.aio.insecure_channel(url) as channel:
        # no serializer: the request is bytes already, so that the client costs little
        call = channel.unary_unary(METHOD)
        await asyncio.gather(*(client(call) for _ in range(concurrency)))
    return latencies


@contextmanager
def serving(bundle: Path, instances: int) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "trivium", "serve", str(bundle), "--grpc-port", "0", "--http-port", "0"]
    command += ["--instances", str(instances), "--log-level", "error"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield json.loads(server.stdout.readline())
    finally:
        server.terminate()
        server.terminate()
        server.wait()


def picture_request(bundle: Path) -> bytes:
    manifest = json.loads((bundle / "manifest.json").read_text())
    shape = [1, manifest["preprocessing"]["height"], manifest["preprocessing"]["width"], 3]
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=shape)
    request = service_pb2.ModelInferRequest(
        model_name=manifest["name"], inputs=[tensor], raw_input_contents=[picture_request_pixels(bundle)]
    )
    return bytes(request.SerializeToString())


def picture_request_pixels(bundle: Path) -> bytes:
    size = json.loads((bundle / "manifest.json").read_text())["preprocessing"]
    return bytes(np.random.default_rng(0).integers(0, 256, (size["height"], size["width"], 3), np.uint8).tobytes())


def build(model: str, target: Path) -> None:
    """A bundle of random weights, three heads: EfficientNet-Lite0, 1000 classes; or the heads alone, 10 classes."""
    from trivium.export import pack
    from trivium.export.graph import append_heads
    from trivium.export.onnx import masks_of
    from trivium.runtime.bundle import Dropout, Manifest

    classes = 1000 if model == "lite0" else 10
    backbone, units, size = lite0() if model == "lite0" else tiny()
    rng = np.random.default_rng(0)
    dropout = Dropout(rate=0.5, passes=32, seed=0)
    weights, bias = rng.normal(0, 0.05, (3, classes, units)), np.zeros((3, classes))
    graph = append_heads(backbone, "features", weights, bias, np.ones(3), masks_of(dropout, units), 0.5)
    manifest = Manifest(
        name=model,
        classes=[f"class {i}" for i in range(classes)],
        heads=list(HEADS),
        preprocessing={"height": size, "width": size, "mean": (0.5,) * 3, "std": (0.5,) * 3},  # type: ignore[arg-type]
        dropout=dropout,
        router={"default": "combined"},  # type: ignore[arg-type]
        golden=pack.GOLDEN,
        files=pack.UNSEALED,
    )
    with pack.staging(target) as root:
        pack.write(root, graph, manifest)


def lite0() -> tuple[Any, int, int]:
    import timm
    import torch
    from safetensors.torch import save_file

    from trivium.export.onnx import export_backbone
    from trivium.export.source import timm_source
    from trivium.runtime.bundle import Dropout

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "random.safetensors"
        save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), file)
        dropout = Dropout(rate=0.5, passes=32, seed=0)
        source = timm_source(
            "tf_efficientnet_lite0", weights=file, labels=None, dropout=dropout, preprocessing={}, say=lambda _: None
        )
    return export_backbone(source.classifier, source.preprocessing), 1280, source.preprocessing.height


def tiny() -> tuple[Any, int, int]:
    from onnx import TensorProto, helper, numpy_helper

    scale = numpy_helper.from_array(np.full((), 1 / 255, np.float32), "scale")
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 8, 8, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 192])],
        [scale],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), 192, 8


if __name__ == "__main__":
    main()
