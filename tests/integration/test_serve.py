"""`trivium serve` at the command line: settings, and one line for each mistake."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from tests.integration.conftest import Serve


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trivium", "serve", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )  # fmt: skip


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    lines = [line for line in result.stderr.splitlines() if " INFO " not in line]
    assert result.returncode != 0
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_print_config_can_be_read_back(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("grpc_port: 7000\nhttp_port: 7001\nmax_queue: 99\n")
    printed = run("one", "--config", file, "--http-port", "7003", "--print-config", TRIVIUM_HTTP_PORT="7002",
                  TRIVIUM_GRPC_PORT="7009")  # fmt: skip
    assert printed.returncode == 0
    values = yaml.safe_load(printed.stdout)
    assert values["bundles"] == ["one"]
    assert (values["grpc_port"], values["http_port"], values["max_queue"]) == (7009, 7003, 99)
    file.write_text(printed.stdout)
    assert run("--config", file, "--print-config").stdout == printed.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no bundle"]),
        (["nowhere"], ["nowhere: no such directory"]),
        (["x", "--grpc-port", "high"], ["grpc_port", "'high'"]),
        (["x", "--grcp-port", "1"], ["--grcp-port", "--grpc-port"]),
        (["x", "--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: list[str]) -> None:
    line = refused(run(*arguments))
    assert all(word in line for word in words)


def test_a_repository_without_a_bundle_that_loads_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    assert "no bundle; they are looked for as MODEL/VERSION" in refused(run("--repository", tmp_path))
    assert "No such file" in refused(run("--repository", tmp_path / "nowhere"))
    shutil.copytree(tiny_bundle, tmp_path / "tiny" / "2")
    result = run("--repository", tmp_path)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].endswith("the manifest says version 1, its folder 2")


def test_a_damaged_bundle_is_refused_by_name(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = bytearray((copy / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (copy / "model.onnx").write_bytes(model)
    assert "SHA-256" in refused(run(copy))


def test_the_same_model_twice_is_refused(tiny_bundle: Path) -> None:
    assert "two bundles are named 'tiny', version 1" in refused(run(tiny_bundle, tiny_bundle))


@pytest.mark.parametrize(("flag", "what"), [("--grpc-port", "gRPC"), ("--http-port", "HTTP")])
def test_a_taken_port_is_named(tiny_bundle: Path, flag: str, what: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = "--http-port" if flag == "--grpc-port" else "--grpc-port"
        line = refused(run(tiny_bundle, flag, port, other, 0))
    assert f"127.0.0.1:{port}" in line
    assert what in line


def test_the_environment_configures_a_server(serve: Serve, tiny_bundle: Path) -> None:
    server = serve(environment={"TRIVIUM_BUNDLES": str(tiny_bundle), "TRIVIUM_INSTANCES": "5"})
    assert server.ready["instances"] == 5
    assert server.ready["models"] == ["tiny/1"]
    assert server.metric("trivium_instances") == 5
