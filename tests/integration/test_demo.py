"""The demo: its server and its client on a tiny bundle, what it refuses, and (slow) all of it on the digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trivium.export.demo import Demo, DemoError
from trivium.runtime.bundle import open_bundle
from trivium.runtime.engine import Engine
from trivium.runtime.router import route


def demo_on(bundle: Path, out: Path) -> Demo:
    """A demo that got as far as its bundle."""
    demo = Demo(out, data="tiny", pictures=6, test_pictures=1, settings=[])
    demo.bundle = bundle
    return demo


def save_pictures(demo: Demo, images: NDArray[np.uint8], clean_first: bool) -> None:
    """Declare the pictures of which the model is surest the clean ones, or the corrupted ones."""
    bundle = open_bundle(demo.bundle)
    found = Engine(bundle).run(images)
    order = found.predictive_entropy.mean(1).argsort()
    kinds = ["clean"] * 6 + ["fog"] * 6
    labels = [bundle.manifest.classes[i] for i in route(found, bundle.manifest).class_id[order]]
    np.savez(
        demo.out / "pictures.npz",
        images=images[order],
        truth=np.array(labels),
        kind=np.array(kinds if clean_first else kinds[::-1]),
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_server_is_asked_and_leaves(
    tiny_bundle: Path, some_pictures: NDArray[np.uint8], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    demo = demo_on(tiny_bundle, tmp_path)
    save_pictures(demo, some_pictures, clean_first=True)
    demo.ask()
    out = capfd.readouterr().out
    assert "clean    : 6 of 6 right" in out
    assert "corrupted: 6 of 6 right" in out
    assert "the server drained and left with status 0" in out
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(answers) == 12
    assert all(answer["divergence"] > 0 and answer["entropy"] > answer["information"] > 0 for answer in answers)
    assert not alive(json.loads((tmp_path / "server.json").read_text())["pid"])


def test_corrupted_pictures_must_be_the_more_uncertain_ones(
    tiny_bundle: Path, some_pictures: NDArray[np.uint8], tmp_path: Path
) -> None:
    demo = demo_on(tiny_bundle, tmp_path)
    save_pictures(demo, some_pictures, clean_first=False)
    with pytest.raises(DemoError, match="is not above that of clean"):
        demo.ask()
    assert not alive(json.loads((tmp_path / "server.json").read_text())["pid"])


def test_a_server_that_cannot_start_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_bundle, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(DemoError, match=r"did not start: .*model\.onnx") as caught, demo_on(broken, tmp_path).server():
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)


def test_a_failure_while_the_server_runs_ends_it(tiny_bundle: Path, tmp_path: Path) -> None:
    pids = []

    def interrupted() -> None:
        with demo_on(tiny_bundle, tmp_path).server():
            pids.append(json.loads((tmp_path / "server.json").read_text())["pid"])
            assert alive(pids[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not alive(pids[0])


def test_a_step_that_fails_stops_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo = Demo(tmp_path, data="digits", pictures=1, test_pictures=1, settings=["nothing.of.it=1"])
    with pytest.raises(DemoError, match=r"stopped: `trivium train demo .*` ended with status"):
        demo.run()
    assert "unknown key" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_demo_on_the_digits(tmp_path: Path) -> None:
    settings = ("original.schedule.epochs=8", "teacher.schedule.epochs=12", "student.schedule.epochs=4")
    words = ["--data", "digits", "--test-pictures", "60", *(word for each in settings for word in ("--set", each))]
    command = [sys.executable, "-m", "trivium", "demo", "--out", str(tmp_path / "demo"), *words]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert {"student", "bundle", "report.html", "results.json"} <= {path.name for path in (tmp_path / "demo").iterdir()}
    assert "this bundle's already" in second.stdout
    assert f"report: {tmp_path / 'demo' / 'report.html'}" in first.stdout
