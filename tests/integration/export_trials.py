"""Exports in forked children of one process that has loaded everything: killed at random, on a full disk, read-only.

python export_trials.py CHECKPOINT DIRECTORY prints a JSON document; under `unshare -rm` it mounts its own small disks.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trivium.export import build
from trivium.export.cli import main as export_main
from trivium.runtime.bundle import digest, open_bundle
from trivium.runtime.cli import main
from trivium.runtime.errors import BundleError

KILLS = 10
MOST = 60
"""Exports that a kill may come too late for before that is a failure."""


class Trials:
    """All trials on one checkpoint, in one directory."""

    def __init__(self, checkpoint: Path, root: Path) -> None:
        self.checkpoint, self.root = checkpoint, root
        self.errors = root / "stderr.txt"

    def start(self, *words: object, before: Callable[[], None] = lambda: None) -> int:
        """Fork a child that exports; returns its process id."""
        process = os.fork()
        if process:
            return process
        try:
            signal.alarm(120)
            with self.errors.open("wb") as errors, open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(errors.fileno(), 2)
            sys.argv = ["trivium", "export", str(self.checkpoint), *map(str, words), "--no-calibrate"]
            before()
            main()
            os._exit(0)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(99)

    def end(self, process: int) -> tuple[int, str]:
        """Exit status and stderr of a child."""
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return status, self.errors.read_text()

    def state(self, bundle: Path) -> Any:
        """Digests of a whole bundle, None where there is nothing, or what is wrong with it."""
        if not os.path.lexists(bundle):
            return None
        try:
            open_bundle(bundle)
        except BundleError as error:
            return str(error)
        return {path.name: digest(path) for path in sorted(bundle.iterdir())}

    def reference(self) -> tuple[float, Any]:
        """Seconds and digests of an export that is left alone. The first compiles the backbone, which touches no file
        and takes nearly all the time; the others get what it compiled."""
        compile_backbone, compiled = build.export_backbone, []
        build.export_backbone = lambda *given: compiled.append(compile_backbone(*given)) or compiled[0]  # type: ignore
        sys.argv = ["trivium export", str(self.checkpoint), str(self.root / "warm"), "--no-calibrate", "--json"]
        output, sys.stdout = sys.stdout, sys.stderr
        export_main()
        sys.stdout = output
        build.export_backbone = lambda *given: compiled[0]
        began = time.monotonic()
        status, errors = self.end(self.start(self.root / "reference"))
        assert status == 0, errors
        seconds, found = time.monotonic() - began, self.state(self.root / "reference")
        assert found == self.state(self.root / "warm")
        return seconds, found

    def kill(self, seconds: float) -> list[dict[str, Any]]:
        """Ten exports killed at random moments, every other one onto a bundle that is there; then one that is not."""
        draw, found = random.Random(20), []
        folder = self.root / "kill"
        for number in range(MOST):
            bundle = folder / f"bundle{number % 2}"
            if number % 2 and not os.path.lexists(bundle):
                self.end(self.start(bundle))
            elif not number % 2 and os.path.lexists(bundle):
                shutil.rmtree(bundle)
            existed = os.path.lexists(bundle)
            process = self.start(bundle, "--force")
            time.sleep(draw.uniform(0, 1.1 * seconds))
            os.kill(process, signal.SIGKILL)
            status, errors = self.end(process)
            left = len([path for path in folder.glob(".*")]) if folder.exists() else 0
            if status == -signal.SIGKILL:
                found.append({"existed": existed, "state": self.state(bundle), "left": left})
            if len(found) == KILLS:
                break
        for number in range(2):
            status, errors = self.end(self.start(folder / f"bundle{number}", "--force"))
            assert status == 0, errors
        return found

    def refused(self, bundle: Path, before: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """An export that cannot end well."""
        beside = sorted(path.name for path in bundle.parent.iterdir()) if bundle.parent.exists() else None
        status, errors = self.end(self.start(bundle, before=before))
        after = sorted(path.name for path in bundle.parent.iterdir()) if bundle.parent.exists() else None
        return {"status": status, "errors": errors, "left": after != beside}

    def limited(self) -> dict[str, Any]:
        """The quota's stand-in: no file of this process may pass 64 KiB."""
        limit = (1 << 16, 1 << 16)
        return self.refused(
            self.root / "new" / "deep" / "bundle", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        )

    def disk(self, name: str, options: str) -> dict[str, Any] | None:
        """On a small disk of its own; None where none can be mounted."""
        place = self.root / name
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            return None
        return self.refused(place / "bundle")


def run(checkpoint: Path, root: Path) -> dict[str, Any]:
    """All trials; see the keys."""
    # OpenMP's threads do not survive a fork.
    torch.set_num_threads(1)
    trials = Trials(checkpoint, root)
    seconds, reference = trials.reference()
    return {
        "reference": reference,
        "kills": trials.kill(seconds),
        "after kills": sorted(path.name for path in (root / "kill").iterdir()),
        "after kills, states": [trials.state(root / "kill" / f"bundle{number}") for number in range(2)],
        "limited": trials.limited(),
        "full": trials.disk("full", "size=300k"),
        "read-only": trials.disk("readonly", "ro"),
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2])), indent=2))
