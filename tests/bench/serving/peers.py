"""Other servers with the same graph, kernels and number of workers: what each of them is started with and asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tests.processes import free_ports
from tritonclient.grpc import service_pb2

from .environments import InstallFailed, environment
from .pictures import Picture
from .servers import Answer, Server, Unavailable, bytes_message, image_message, read_v2

if TYPE_CHECKING:
    from tests.triton.server import Installation

APPS = Path(__file__).with_name("apps")
RAW = "application/octet-stream"
NAMES = ("mosec", "tritonserver", "LitServe", "BentoML", "MLServer", "Ray Serve")


def peer(name: str, folder: Path, bundle: Path, workers: int, picture: Picture, expected: Answer) -> Server:
    """One of NAMES, ready to be started.

    Args:
        folder: for environments and configurations.
        expected: tells the names and sizes of the outputs.

    Raises: Unavailable where it cannot be installed.
    """
    from trivium.kernels import custom_ops_library
    from trivium.runtime.bundle import open_bundle

    variables = {
        "TRIVIUM_MODEL": str(open_bundle(bundle).model_path.resolve()),
        "TRIVIUM_OPERATORS": str(custom_ops_library()),
        "TRIVIUM_WORKERS": str(workers),
        "PYTHONPATH": str(APPS),
    }
    try:
        binaries = environment(name, folder / "envs") / "bin"
    except InstallFailed as error:
        raise Unavailable(f"it cannot be installed: {error}") from None
    python = str(binaries / "python")
    if name == "tritonserver":
        installation = _tritonserver()
        command = _triton_command(installation, folder / "triton", picture, workers, expected)
        libraries = installation.environment()["LD_LIBRARY_PATH"]
        variables |= {"PATH": f"{binaries}:/usr/bin:/bin", "LD_LIBRARY_PATH": libraries}
        return Server(name, "grpc", command, image_message(picture), read_v2, expected, environment=variables)
    if name == "MLServer":
        command = _mlserver_command(binaries, folder / "mlserver", picture.model, workers)
        read = _read_mlserver(expected)
        return Server(name, "grpc", command, bytes_message(picture), read, expected, environment=variables)
    commands: dict[str, tuple[str, Callable[[int], list[str]]]] = {
        "mosec": (
            "/inference",
            lambda port: (
                [python, str(APPS / "mosec_app.py"), f"--port={port}", "--address=127.0.0.1"]
                + ["--timeout=60000", "--log-level=error"]
            ),
        ),
        "LitServe": ("/predict", lambda port: [python, str(APPS / "litserve_app.py"), str(port)]),
        "BentoML": (
            "/predict",
            lambda port: (
                [str(binaries / "bentoml"), "serve", "bentoml_app:HeadsService", "--working-dir", str(APPS)]
                + ["--host", "127.0.0.1", "--port", str(port)]
            ),
        ),
        "Ray Serve": ("/", lambda port: [python, str(APPS / "ray_app.py"), str(port)]),
    }
    if name == "Ray Serve":
        # its own choice for throughput, save that clients would have to find the replicas' ports themselves
        variables |= {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    path, command = commands[name]
    return Server(name, "http", command, picture.pixels.tobytes(), read_raw(expected), expected, path, RAW, variables)


def _tritonserver() -> Installation:
    from tests.triton import server

    try:
        return server.unpack()
    except server.Unavailable as error:
        raise Unavailable(str(error)) from None


def _triton_command(
    installation: Installation, folder: Path, picture: Picture, workers: int, expected: Answer
) -> Callable[[int], list[str]]:
    model = folder / picture.model
    (model / "1").mkdir(parents=True, exist_ok=True)
    # its stub sets PYTHONPATH anew
    for source, target in (("triton_model.py", "model.py"), ("heads.py", "heads.py")):
        (model / "1" / target).write_bytes((APPS / source).read_bytes())
    outputs = [
        f'output {{ name: "{name}" data_type: TYPE_FP32 dims: {list(values.shape)} }}'
        for name, values in expected.items()
    ]
    shape = [1, *picture.pixels.shape]
    lines = [
        f'name: "{picture.model}"',
        'backend: "python"',
        f'input {{ name: "image" data_type: TYPE_UINT8 dims: {shape} }}',
        *outputs,
        f"instance_group {{ kind: KIND_CPU count: {workers} }}",
    ]
    (model / "config.pbtxt").write_text("\n".join(lines) + "\n")
    home = installation.tritonserver

    def command(port: int) -> list[str]:
        command = [str(home / "bin/tritonserver"), f"--model-repository={folder}", "--allow-http=false"]
        command += [f"--backend-directory={home / 'backends'}", f"--cache-directory={home / 'caches'}"]
        command += ["--grpc-address=127.0.0.1", f"--grpc-port={port}", "--allow-metrics=false"]
        return [*command, "--model-control-mode=explicit", f"--load-model={picture.model}"]

    return command


def _mlserver_command(binaries: Path, folder: Path, model: str, workers: int) -> Callable[[int], list[str]]:
    settings = folder / model
    settings.mkdir(parents=True, exist_ok=True)
    implementation = {"name": model, "implementation": "mlserver_app.HeadsModel", "parameters": {"version": "1"}}
    (settings / "model-settings.json").write_text(json.dumps(implementation))

    def command(port: int) -> list[str]:
        http, metrics = free_ports(2)
        server = {"host": "127.0.0.1", "grpc_port": port, "http_port": http, "metrics_port": metrics}
        (settings / "settings.json").write_text(json.dumps(server | {"parallel_workers": workers, "debug": False}))
        return [str(binaries / "mlserver"), "start", str(settings)]

    return command


def read_raw(expected: Answer) -> Callable[[bytes], Answer]:
    """Tells outputs apart that lie behind one another in a body."""

    def read(body: bytes) -> Answer:
        values, found, at = np.frombuffer(body, np.float32), {}, 0
        for name, like in expected.items():
            found[name] = values[at : at + like.size]
            at += like.size
        return found

    return read


def _read_mlserver(expected: Answer) -> Callable[[bytes], Answer]:
    def read(body: bytes) -> Answer:
        response = service_pb2.ModelInferResponse.FromString(body[5:])
        if response.raw_output_contents:
            return read_raw(expected)(response.raw_output_contents[0][4:])
        return read_raw(expected)(response.outputs[0].contents.bytes_contents[0])

    return read
