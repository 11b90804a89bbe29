"""Replicas: server processes with an address that outlives them, to be killed, drained, frozen and started again."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import ServerProcess

GRACE_SECONDS = 3.0
"""Serving on after SIGTERM; envoy asks for health every second, and needs two answers."""


class Replica:
    """One address, and the processes that listen there one after the other."""

    def __init__(self, bundle: Path, folder: Path, *flags: object) -> None:
        self._bundle, self._folder, self._flags = bundle, folder, flags
        self.logs: list[Path] = []
        self.server = self._start(0)
        self.url = self.server.url

    def start(self) -> None:
        """Listen again where the last process did."""
        self.server = self._start(int(self.url.rpartition(":")[2]))

    def kill(self, halted: float) -> None:
        """End it by SIGKILL, halted for some seconds before, so that some clients certainly wait for its answers."""
        self.server.process.send_signal(signal.SIGSTOP)
        time.sleep(halted)
        assert self.server.stop(signal.SIGKILL) == -signal.SIGKILL

    def drain(self) -> None:
        """End it as an orchestrator does."""
        assert self.server.stop(signal.SIGTERM) == 0, self.server.log.read_text()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.server.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.process.send_signal(signal.SIGCONT)

    def requests(self) -> Counter[str]:
        """Inference requests of all its processes by status, as the access logs have it: metrics die with a process."""
        lines = [json.loads(line) for log in self.logs for line in log.read_text().splitlines() if line.endswith("}")]
        return Counter(line["status"] for line in lines if line["logger"] == "trivium.access")

    def _start(self, port: int) -> ServerProcess:
        folder = self._folder / str(len(self.logs))
        flags = ("--grace-seconds", GRACE_SECONDS, "--access-log", "--log-format", "json", *self._flags)
        server = ServerProcess(folder, self._bundle, *flags, grpc_port=port)
        self.logs.append(server.log)
        return server


@contextmanager
def replica(bundle: Path, folder: Path, *flags: object) -> Iterator[Replica]:
    """One that ends with the block, however it does."""
    running = Replica(bundle, folder, *flags)
    try:
        yield running
    finally:
        running.server.stop(signal.SIGKILL)
