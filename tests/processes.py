"""Servers as processes of their own: how a test starts one, asks it over HTTP, and ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 60
"""A loaded machine is slow to start anything; tests of the start-up time look at the process's own clock."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def stop(process: subprocess.Popen[Any], number: signal.Signals, seconds: float) -> int:
    """Send a signal and wait; the exit status."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(seconds)
    finally:
        process.kill()


class ServerProcess:
    """`trivium serve` as a process, with ports of the system's choice where none is given."""

    def __init__(
        self, directory: Path, *arguments: object, environment: dict[str, str] | None = None, grpc_port: int = 0
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        ready = directory / "ready.json"
        command = [sys.executable, "-m", "trivium", "serve", *map(str, arguments)]
        command += ["--grpc-port", str(grpc_port), "--http-port", "0", "--ready-file", str(ready)]
        self.log = directory / "stderr.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **(environment or {})}
            )
        end = time.monotonic() + START_SECONDS
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        self.ready = json.loads(ready.read_text())
        self.url: str = self.ready["grpc"]

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Status and body of an HTTP request."""
        request = urllib.request.Request(f"http://{self.ready['http']}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every sample by name and labels."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.metrics().items() if found == name and wanted <= has)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the server did not get there in time"
            time.sleep(0.005)

    def stop(self, number: signal.Signals = signal.SIGINT, seconds: float = 30.0) -> int:
        """Send a signal and wait; the exit status."""
        try:
            return stop(self.process, number, seconds)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()
