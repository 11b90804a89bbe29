"""Prometheus's own checker: on PATH, or out of Debian's package, unpacked into build/promtool.

python -m tests.docker.promtool        fetches it, or says in one line why it cannot
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "promtool"


def find() -> str | None:
    """Where it is, if it is."""
    return shutil.which("promtool") or shutil.which("promtool", path=FOLDER)


def main() -> None:
    if find() is not None:
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        print("promtool: not on PATH, and this is no Debian to fetch it from; its checks are skipped")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        got = subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, check=False)
        package = next(Path(folder).glob("prometheus_*.deb"), None)
        if got.returncode or package is None:
            print("promtool: not on PATH, and apt-get does not have the package prometheus; its checks are skipped")
            return
        subprocess.run(["dpkg", "--extract", str(package), folder], check=True)
        shutil.copy2(Path(folder) / "usr/bin/promtool", FOLDER / "promtool")


if __name__ == "__main__":
    main()
