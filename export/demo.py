"""`trivium demo`: the whole way on real pictures - data, training, bundle, server, questions, report - in one command.

Every step is a command that a user could type, is printed as such, and runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trivium.runtime.bundle import MANIFEST, open_bundle
from trivium.runtime.errors import BundleError, TriviumError
from trivium.train.checkpoint import read_meta
from trivium.train.data.pictures import load_described
from trivium.train.shifts.corruptions import TEST_CORRUPTIONS, corrupt

from .source import package_versions

SEVERITY = 4
"""Of the corrupted pictures that the client asks about."""
READY_SECONDS, EXIT_SECONDS = 60, 60
CUT_FOR_DIGITS = ("data.kind=digits", "data.calibration=0.2")
"""Settings of the recipe where scikit-learn's digits stand in."""


class DemoError(TriviumError):
    """A step of the demo failed or did not show what it should."""


class Demo:
    """One run; `out` receives student/, bundle/, report.html, results.json and what the client asked and heard.

    Args:
        pictures: clean ones to ask about, and as many corrupted ones.
        test_pictures: of the evaluation.
        settings: KEY=VALUE of the training recipe.
    """

    def __init__(self, out: Path, data: str, pictures: int, test_pictures: int, settings: Sequence[str]) -> None:
        self.out, self.data, self.pictures, self.test_pictures = out, data, pictures, test_pictures
        self.settings = list(settings)
        self.student, self.bundle = out / "student", out / "bundle"
        self.results = out / "results.json"
        self.console = Console(highlight=False, soft_wrap=True)

    def run(self) -> None:
        """All steps; raises TriviumError where one fails."""
        began = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        self.obtain()
        self.train()
        self.export()
        self.write_pictures()
        self.ask()
        self.evaluate()
        self.summary()
        self.console.print(f"\n[bold]report: {self.out / 'report.html'}[/]   ({time.monotonic() - began:.0f} s)")

    def step(self, title: str) -> None:
        self.console.print(f"\n[bold cyan]== {title}[/]")

    def command(self, *words: str | Path, check: bool = True) -> int:
        """Run `trivium WORDS` and show it; its output goes to the terminal.

        Raises: DemoError where it fails and check is on.
        """
        text = shlex.join(map(str, words))
        self.console.print(f"[bold]$ trivium {text}[/]")
        status = subprocess.run([sys.executable, "-m", "trivium", *map(str, words)], check=False).returncode
        if check and status:
            raise DemoError(f"stopped: `trivium {text}` ended with status {status}")
        return status

    def obtain(self) -> None:
        """Fashion-MNIST; where it cannot be had, the digits, and loudly."""
        self.step("data")
        if self.data == "fashion-mnist" and self.command("data", "fashion-mnist", check=False):
            self.console.print(
                "[bold white on red] FALLING BACK: Fashion-MNIST cannot be had here. Everything below is about "
                "scikit-learn's 8 x 8 digits, and its figures say nothing about Fashion-MNIST. [/]"
            )
            self.data = "digits"
        if self.data == "digits":
            self.settings = [*CUT_FOR_DIGITS, *self.settings]

    def train(self) -> None:
        """The student; the training itself skips what is finished and goes on where it was stopped."""
        self.step("train: a classifier, a small robust teacher, a student with three heads")
        changes = [word for setting in self.settings for word in ("--set", setting)]
        self.command("train", "demo", "--out", self.student, *changes)

    def export(self) -> None:
        """The bundle, unless it is this student's already."""
        self.step("export: calibrate, compile to one ONNX graph, compare the implementations")
        words = ("export", self.student, self.bundle, "--name", self.data, "--force")
        if self.exported():
            self.console.print(
                f"{self.bundle} is this student's already; [bold]trivium {shlex.join(map(str, words))}[/] makes it anew"
            )
            return
        self.command(*words)

    def exported(self) -> bool:
        """Whether the bundle is whole and holds the student as it is now."""
        try:
            manifest = open_bundle(self.bundle).manifest
        except BundleError:
            return False
        meta = read_meta(self.student)
        packages = meta.packages | package_versions()
        return (manifest.provenance.get("weights_sha256"), manifest.provenance.get("packages")) == (
            meta.weights_sha256,
            packages,
        )

    def write_pictures(self) -> None:
        """Test pictures for the client, clean and under the test's corruptions in turn."""
        meta = read_meta(self.student)
        test = load_described(meta.data, "test", meta.preprocessing)
        count = min(self.pictures, len(test))
        chosen = np.sort(np.random.default_rng(0).choice(len(test), count, replace=False))
        clean = np.ascontiguousarray(test.batch(chosen).permute(0, 2, 3, 1).numpy())
        names = [TEST_CORRUPTIONS[i % len(TEST_CORRUPTIONS)] for i in range(count)]
        corrupted = [corrupt(clean[i : i + 1], name, SEVERITY, seed=i) for i, name in enumerate(names)]
        truth = [meta.classes[label] for label in test.labels[chosen]]
        np.savez(
            self.out / "pictures.npz",
            images=np.concatenate([clean, *corrupted]),
            truth=np.array(truth * 2),
            kind=np.array(["clean"] * count + names),
        )

    def ask(self) -> None:
        """Start the server, ask it from another process, look at the answers, end it."""
        self.step(f"serve, and ask about {self.pictures} clean and {self.pictures} corrupted test pictures")
        answers = self.out / "answers.json"
        with self.server() as url:
            client = [
                *("-m", "trivium.export.demo_client", "--url", url, "--model", self.data),
                *("--pictures", str(self.out / "pictures.npz"), "--answers", str(answers)),
            ]
            self.console.print(f"[bold]$ python {shlex.join(client)}[/]")
            status = subprocess.run([sys.executable, *client], check=False).returncode
            if status:
                raise DemoError(f"stopped: the client ended with status {status}; the server's lines: {self.log}")
        self.compare(json.loads(answers.read_text(encoding="utf-8")))

    @property
    def log(self) -> Path:
        return self.out / "server.log"

    @contextmanager
    def server(self) -> Iterator[str]:
        """The bundle's server while the block runs, on free ports; yields the address of its gRPC.

        Raises: DemoError where it does not start, or does not leave in good order.
        """
        ready = self.out / "server.json"
        ready.unlink(missing_ok=True)
        words = ["serve", str(self.bundle), "--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
        words += ["--grace-seconds", "0.5"]
        self.console.print(f"[bold]$ trivium {shlex.join(words)} &[/]")
        began = time.monotonic()
        with self.log.open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "trivium", *words], stdout=log, stderr=log)
        try:
            while not ready.exists():
                if process.poll() is not None or time.monotonic() - began > READY_SECONDS:
                    lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
                    raise DemoError(f"the server did not start: {lines[-1]}")
                time.sleep(0.02)
            url = json.loads(ready.read_text())["grpc"]
            self.console.print(f"ready after {time.monotonic() - began:.1f} s on {url}, lines in {self.log}")
            yield url
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                raise DemoError(f"the server was still there {EXIT_SECONDS} s after SIGTERM") from None
            if status:
                raise DemoError(f"the server ended with status {status} after SIGTERM; its lines: {self.log}")
            self.console.print("SIGTERM: the server drained and left with status 0")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def compare(self, answers: list[dict[str, Any]]) -> None:
        """Print what the answers say of clean and corrupted pictures.

        Raises: DemoError where corrupted pictures are not the more uncertain ones.
        """
        clean = [answer for answer in answers if answer["kind"] == "clean"]
        corrupted = [answer for answer in answers if answer["kind"] != "clean"]
        entropy = []
        for kind, rows in (("clean", clean), ("corrupted", corrupted)):
            mean = {key: float(np.mean([row[key] for row in rows])) for key in ("entropy", "information", "divergence")}
            right = sum(row["truth"] == row["answer"] for row in rows)
            entropy.append(mean["entropy"])
            self.console.print(
                f"{kind:9}: {right} of {len(rows)} right; mean entropy {mean['entropy']:.3f}, mutual information "
                f"{mean['information']:.3f}, KL clean-robust {mean['divergence']:.3f} nats"
            )
        if not entropy[1] > entropy[0]:
            raise DemoError(
                f"mean entropy of corrupted pictures, {entropy[1]:.3f}, is not above that of clean, {entropy[0]:.3f}"
            )
        self.console.print("so the model is less sure of corrupted pictures, as it should be")

    def evaluate(self) -> None:
        """Accuracy, flips and the report, unless they are this bundle's already."""
        self.step(f"evaluate on the test pictures, {self.test_pictures} of them under 15 corruptions x 5 severities")
        words = ["evaluate", str(self.bundle), "--original", str(self.student), "--data", self.data]
        words += ["--pictures", str(self.test_pictures), "--out", str(self.out)]
        if self.evaluated():
            again = f"[bold]trivium {shlex.join(words)}[/] makes them anew"
            self.console.print(f"{self.results} and the report are this bundle's already; {again}")
            return
        self.command(*words)

    def evaluated(self) -> bool:
        """Whether report and results are younger than the bundle and about as many corrupted pictures as asked for."""
        files = (self.bundle / MANIFEST, self.results, self.out / "report.html")
        if not all(file.is_file() for file in files):
            return False
        bundle, *made = (file.stat().st_mtime_ns for file in files)
        found = json.loads(self.results.read_text(encoding="utf-8"))
        return min(made) > bundle and found["data"].get("corrupted") == self.test_pictures

    def summary(self) -> None:
        """Accuracy and flips of the original classifier, each head, and the chosen router."""
        self.step("what came of it")
        document = json.loads(self.results.read_text(encoding="utf-8"))
        table = Table(
            title="% of clean / corrupted pictures; flips: right by the original, wrong here", title_justify="left"
        )
        for header in ("answers by", "clean", "corrupted", "negative flips"):
            table.add_column(header, justify="left" if header == "answers by" else "right", no_wrap=True)
        for row in document["answerers"]:
            if row["role"] == "rule" and not row["default"]:
                continue
            flips = row["negative_flips"] if row["role"] != "original" else None
            table.add_row(
                f"{'router: ' if row['default'] else ''}{row['name']}",
                *(f"{100 * row['accuracy'][part]:.1f}" for part in ("clean", "corrupted")),
                "-" if flips is None else f"{100 * flips['clean']:.1f} / {100 * flips['corrupted']:.1f}",
            )
        self.console.print(table)


def main() -> None:
    """Parse sys.argv and run the demo."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description="Train a robust three-headed classifier on Fashion-MNIST, export it, serve it, ask it, and write "
        "a report. A second run skips what is finished.",
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="directory (default build/demo)")
    parser.add_argument("--data", choices=("fashion-mnist", "digits"), default="fashion-mnist", help=argparse.SUPPRESS)
    parser.add_argument(
        "--pictures", type=int, default=24, help="clean and corrupted ones to ask about (default 24 each)"
    )
    parser.add_argument("--test-pictures", type=int, default=400, help="of the evaluation (default 400)")
    parser.add_argument(
        "--set", dest="settings", metavar="KEY=VALUE", action="append", default=[], help="change the recipe"
    )
    given = parser.parse_args()
    # A killed demo must not leave its server behind: turned into SystemExit, the signal runs the finally blocks.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    Demo(given.out, given.data, given.pictures, given.test_pictures, given.settings).run()
