"""docker/training/hosts.sh, twice on this machine as two hosts on 127.0.0.1 with one process each."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

pytest.importorskip("torch", reason="training needs torch: pip install 'trivium[train]'")
from tests.processes import free_ports
from tests.unit.test_distributed import RECIPE, close

SCRIPT = Path(__file__).parents[2] / "docker/training/hosts.sh"
START_SECONDS = 900
Host = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return path


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Starts a host; it is ended after the test."""
    running: list[subprocess.Popen[str]] = []
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PET_LOCAL_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }

    def start(*words: object) -> subprocess.Popen[str]:
        with (tmp_path / f"host-{len(running)}.txt").open("w") as log:
            process = subprocess.Popen(
                [str(SCRIPT), *map(str, words)],
                stdout=log,
                stderr=log,
                text=True,
                env=environment,
            )
        running.append(process)
        return process

    yield start
    for process in running:
        lose(process)


def lose(process: subprocess.Popen[str]) -> None:
    """End a host and everything on it at once, as a power cut would."""
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(process.pid)
        # torchrun gives each process a session of its own
        for one in [agent, *agent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(60)


def until(reached: Callable[[], bool], *hosts: subprocess.Popen[str]) -> None:
    """Wait for something to be true while all hosts run."""
    end = time.monotonic() + START_SECONDS
    while not reached():
        assert all(one.poll() is None for one in hosts), "a host ended too early"
        assert time.monotonic() < end
        time.sleep(0.01)


def meeting_place() -> str:
    (port,) = free_ports(1)
    return f"127.0.0.1:{port}"


def listening(place: str) -> bool:
    """Whether the first host is there: the other must not become the meeting place, on one machine it could."""
    name, _, port = place.partition(":")
    with socket.socket() as one:
        return one.connect_ex((name, int(port))) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("node0", "2", "1"), "run the same line on each of them"),
        (("node0", "two", "1", "demo", "--out", "x"), "run the same line on each of them"),
        (("node0", "2", "1", "demo"), "--out DIR is missing"),
    ],
)
def test_what_is_missing_is_said(words: tuple[str, ...], said: str) -> None:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_of_two_hosts_is_lost_and_the_other_goes_on_alone(recipe: Path, host: Host, tmp_path: Path) -> None:
    more = ("--set", "parallel=ddp", "--set", "student.schedule.epochs=6")
    out, place = tmp_path / "run", meeting_place()
    first = host(place, "1:2", 1, recipe, "--out", out, *more)
    until(lambda: listening(place), first)
    second = host(place, "1:2", 1, recipe, "--out", out, *more)
    until((out / "student/epoch-0001/state.json").exists, first, second)
    lose(second)
    assert not (out / "checkpoint.json").exists()
    assert first.wait(900) == 0, (tmp_path / "host-0.txt").read_text()
    text = (tmp_path / "host-0.txt").read_text()
    assert ", 2 processes" in text
    assert "original: done before, skipped" in text
    assert re.search(r"student: resumed after epoch \d", text)
    alone = host(meeting_place(), 1, 1, recipe, "--out", tmp_path / "alone", *more)
    assert alone.wait(900) == 0
    close(out, tmp_path / "alone", 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hosts_share_one_model(recipe: Path, host: Host, tmp_path: Path) -> None:
    """By FSDP2; then one host takes up what two have done."""
    out, place = tmp_path / "run", meeting_place()
    first = host(place, 2, 1, recipe, "--out", out, "--set", "parallel=fsdp")
    until(lambda: listening(place), first)
    second = host(place, 2, 1, recipe, "--out", out, "--set", "parallel=fsdp")
    assert [first.wait(900), second.wait(900)] == [0, 0], (tmp_path / "host-0.txt").read_text()
    alone = host(meeting_place(), 1, 1, recipe, "--out", tmp_path / "alone")
    assert alone.wait(900) == 0
    close(out, tmp_path / "alone", 5e-3)
    again = host(meeting_place(), 1, 1, recipe, "--out", out)
    assert again.wait(900) == 0
    assert "student: done before, skipped" in (tmp_path / "host-3.txt").read_text()
