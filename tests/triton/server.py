"""A real tritonserver without a container: NVIDIA's wheel unpacked, beside an environment with the slim runtime.

    python -m tests.triton.server        assembles build/triton, or says in one line why it cannot

The wheel nvidia-pytriton holds tritonserver 2.51 with its Python back end, which runs on a CPU. Its models run in the
first python3 on PATH, by a stub that is made for one minor version of Python.
"""

from __future__ import annotations

import ctypes.util
import filecmp
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import processes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/triton"
PACKAGE = "nvidia-pytriton==0.7.0"
START_SECONDS = 120


class Unavailable(Exception):
    """Why there is no tritonserver here, in one line."""


@dataclass(frozen=True)
class Installation:
    """An assembled server."""

    folder: Path

    @property
    def tritonserver(self) -> Path:
        return self.folder / "server/pytriton/tritonserver"

    @property
    def python(self) -> Path:
        """Of the environment that models run in."""
        return self.folder / "venv/bin/python"

    @property
    def _stamp(self) -> Path:
        return self.folder / "venv/.sources"

    def is_current(self) -> bool:
        """Whether the environment holds the runtime as it is in this checkout."""
        return self._stamp.exists() and self._stamp.read_text() == _sources()

    def install_runtime(self) -> None:
        """The wheel of this checkout, by the recipe that an exported repository brings along."""
        from trivium.export.triton import requirements

        if self.is_current():
            return
        sources = _sources()
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(self.folder / "venv")], check=True)
        dist = self.folder / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        _pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(dist), str(ROOT))
        recipe = self.folder / "requirements.txt"
        recipe.write_text(requirements(), encoding="utf-8")
        _pip(self.python, "install", "--find-links", str(dist), "--requirement", str(recipe))
        # the same version number as before is no reason for pip to install again
        _pip(self.python, "install", "--force-reinstall", "--no-deps", str(next(dist.glob("*.whl"))))
        self._stamp.write_text(sources, encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """Variables for the server's process."""
        libraries = [str(sysconfig.get_config_var("LIBDIR") or ""), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            **os.environ,
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "LD_LIBRARY_PATH": os.pathsep.join(part for part in libraries if part),
            "OMP_NUM_THREADS": "1",
        }


def find(folder: Path = FOLDER) -> Installation:
    """What `assemble` has made.

    Raises: Unavailable, with the command that makes it.
    """
    found = Installation(folder)
    if not (folder / ".complete").exists():
        raise Unavailable("there is no tritonserver in build/triton; make test-triton installs one")
    if not found.is_current():
        raise Unavailable("build/triton holds the runtime of older sources; make test-triton renews it")
    return found


def unpack(folder: Path = FOLDER) -> Installation:
    """The server alone, downloaded and unpacked where it is not there yet.

    Raises: Unavailable where this machine cannot run it.
    """
    stub, soname = _python_of_this_machine()
    found = Installation(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not found.tritonserver.is_dir():
        wheels = folder / "wheel"
        _pip(sys.executable, "download", "--no-deps", "--dest", str(wheels), PACKAGE)
        fresh = folder / "server.new"
        shutil.rmtree(fresh, ignore_errors=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
            archive.extractall(fresh)
        os.replace(fresh, folder / "server")
        shutil.rmtree(wheels)
    source = found.tritonserver / "python_backend_stubs" / stub / "triton_python_backend_stub"
    if not source.exists():
        raise Unavailable(f"{PACKAGE} has no stub for Python {stub}, {soname}")
    target = found.tritonserver / "backends/python/triton_python_backend_stub"
    # one that runs cannot be written
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        shutil.copyfile(source, target)
    for program in (target, found.tritonserver / "bin/tritonserver"):
        program.chmod(0o755)
    return found


def assemble(folder: Path = FOLDER) -> Installation:
    """Unpack and install what is not there yet, and the runtime again where its sources changed.

    Raises: Unavailable where this machine cannot run it.
    """
    (folder / ".complete").unlink(missing_ok=True)
    found = unpack(folder)
    found.install_runtime()
    (folder / ".complete").touch()
    return found


def _python_of_this_machine() -> tuple[str, str]:
    """The stub's version and the shared library that it needs."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"{PACKAGE} is for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    soname = f"libpython{version}.so.1.0"
    near = Path(str(sysconfig.get_config_var("LIBDIR")), soname)
    if not near.exists() and ctypes.util.find_library(f"python{version}") is None:
        raise Unavailable(f"the Python back end needs {soname}, and this Python has no shared library")
    return version, soname


def _sources() -> str:
    """Digest of all that the runtime's wheel is made of."""
    digest = hashlib.sha256()
    paths = [ROOT / "pyproject.toml", *(ROOT / "runtime").rglob("*"), *(ROOT / "kernels").rglob("*")]
    for path in sorted(path for path in paths if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _pip(python: Path | str, *arguments: str) -> None:
    done = subprocess.run(
        [str(python), "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise Unavailable(f"pip {arguments[0]} failed: {last[0]}")


class TritonServer:
    """`tritonserver` as a process on 127.0.0.1, ready when this returns.

    Args:
        repository: the model repository.
        models: to load at the start; others may be loaded by the repository API.
        log: file for what it prints.
        arguments: further flags.

    Raises: RuntimeError with its output where it does not become ready.
    """

    def __init__(
        self,
        installation: Installation,
        repository: Path,
        models: Sequence[str],
        log: Path,
        arguments: Sequence[str] = (),
    ) -> None:
        http, grpc, metrics = processes.free_ports(3)
        self.url = f"127.0.0.1:{grpc}"
        self.http = f"127.0.0.1:{http}"
        self.metrics_url = f"http://127.0.0.1:{metrics}/metrics"
        self.log = log
        home = installation.tritonserver
        command = [str(home / "bin/tritonserver"), f"--model-repository={repository}"]
        command += [f"--backend-directory={home / 'backends'}", f"--cache-directory={home / 'caches'}"]
        for kind, port in (("http", http), ("grpc", grpc), ("metrics", metrics)):
            command += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
        command += ["--allow-gpu-metrics=false", "--model-control-mode=explicit", "--exit-timeout-secs=10"]
        command += [f"--load-model={model}" for model in models] + list(arguments)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=installation.environment()
            )
        end = time.monotonic() + START_SECONDS
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"tritonserver did not start:\n{log.read_text(errors='replace')[-5000:]}")
            time.sleep(0.05)

    def metrics(self) -> str:
        """Everything it exposes, in Prometheus' text format."""
        with urllib.request.urlopen(self.metrics_url, timeout=30) as response:
            return str(response.read().decode())

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Send a signal and wait; the exit status."""
        return processes.stop(self.process, number, seconds)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def main() -> None:
    try:
        print(assemble().folder)
    except Unavailable as reason:
        raise SystemExit(str(reason)) from None


if __name__ == "__main__":
    main()
