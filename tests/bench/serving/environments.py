"""The peers' environments: each server in a virtual environment of its own, made once."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = {
    "mosec": ["mosec==0.9.8"],
    # of its models: with numpy 2 the server says OK and sends empty tensors (python_backend#384)
    "tritonserver": ["numpy<2"],
    "LitServe": ["litserve==0.2.19"],
    "BentoML": ["bentoml==1.4.39"],
    # with uvloop 0.22 its workers die in a loop while the server says that it is ready (MLServer#2286)
    "MLServer": ["mlserver==1.7.1", "uvloop<0.22"],
    "Ray Serve": ["ray[serve]==2.60.0"],
}


class InstallFailed(Exception):
    """pip could not make an environment; the message says why."""


def environment(peer: str, folder: Path) -> Path:
    """The folder of a peer's environment with ONNX Runtime in our version, made where it is not there yet.

    Raises: InstallFailed.
    """
    target = folder / peer.lower().replace(" ", "-")
    wanted = [*PACKAGES[peer], f"onnxruntime=={version('onnxruntime')}", "numpy"]
    stamp = target / "installed.txt"
    if not stamp.exists() or stamp.read_text().split("\n") != wanted:
        print(f"installing {' '.join(wanted)} into {target}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(target)], check=True)
        command = [str(target / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        result = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise InstallFailed(lines[0][:300])
        stamp.write_text("\n".join(wanted))
    return target
