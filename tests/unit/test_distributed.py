"""Slices, averages and their exact resume in one process; whole runs on two processes by DDP and by FSDP2."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from trivium.runtime.errors import ConfigError
from trivium.train.distributed import Statistics, _units
from trivium.train.loop import Machine, Stage, _no_compiler, fit, machine
from trivium.train.models.backbone import create
from trivium.train.models.stages import split
from trivium.train.models.student import Student
from trivium.train.progress import Watch
from trivium.train.sections import Schedule

CPU = Machine(torch.device("cpu"), "float32")
PIXELS = torch.randint(0, 256, (30, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LABELS = torch.arange(30) % 3


class Stopped(Exception):
    """Stands for a kill."""


def net(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), middle, nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def stage(model: nn.Module, place: Path, check: Callable[[], dict[str, float]] = dict, **schedule: Any) -> Stage:
    def loss(pictures: Tensor, indices: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        noise = torch.rand(pictures.shape, generator=generator)
        with CPU.autocast():
            logits = model(pictures.float() / 255 + noise)
        value = F.cross_entropy(logits.float(), LABELS[torch.from_numpy(indices)])
        return value, {"again": value.item()}

    settings = Schedule(**({"epochs": 3, "batch": 10, "warmup": 0.0} | schedule))
    return Stage(
        "tiny", model, loss, lambda indices, generator: PIXELS[indices], 30, settings, place, "mark", 0, check=check
    )


def trained(model: nn.Module, place: Path, on: Machine = CPU, **schedule: Any) -> dict[str, Tensor]:
    fit(stage(model, place, **schedule), on, Watch(Console(file=io.StringIO()), place / "logs"))
    return model.state_dict()


def test_slices_add_up_to_the_batch(tmp_path: Path) -> None:
    """Without draws and batch statistics, a batch of 10 in slices of 4, 3 and 3 is learned from as a whole."""

    def loss(pictures: Tensor, indices: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return F.cross_entropy(model(pictures.float() / 255), LABELS[torch.from_numpy(indices)]), {}

    found = []
    for slices in (1, 3):
        model = net()
        model[4] = nn.Identity()  # type: ignore[operator]
        each = stage(model, tmp_path / str(slices), accumulate=slices, optimizer="sgd", lr=0.1)
        each.loss = loss
        _, figures = fit(each, CPU, Watch(Console(file=io.StringIO()), tmp_path / "logs"))
        found.append((model.state_dict(), figures["loss"]))
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, atol=1e-6, rtol=1e-5)


def test_batch_statistics_are_the_mean_over_the_slices() -> None:
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    norm = nn.BatchNorm1d(8)
    statistics = Statistics(list(norm.buffers()), 2)
    statistics.begin()
    for part in (x[:6], x[6:]):
        statistics.rewind()
        norm(part)
        statistics.add(len(part) / len(x))
    statistics.end()
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))
    assert norm.num_batches_tracked == 1
    frozen = norm.eval()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    statistics.begin()
    for _ in range(2):
        statistics.rewind()
        frozen(x)
        statistics.add(1 / 3)
    statistics.end()
    assert all(torch.equal(before[key], value) for key, value in frozen.state_dict().items())


def test_the_average_is_what_is_shown_and_kept(tmp_path: Path) -> None:
    model, live, shown = net(), [], []
    each = stage(model, tmp_path, epochs=2, batch=30, ema=0.15, lr=0.1)
    inner, start = each.loss, net().state_dict()["1.weight"]

    def loss(*arguments: Any) -> tuple[Tensor, dict[str, float]]:
        live.append(model.state_dict()["1.weight"].clone())
        return inner(*arguments)

    def check() -> dict[str, float]:
        shown.append(model.state_dict()["1.weight"].clone())
        return {}

    each.loss, each.check = loss, check
    fit(each, CPU, Watch(Console(file=io.StringIO()), tmp_path / "logs"))
    # min(.15, 1/10), then min(.15, 2/11)
    first = 0.1 * start + 0.9 * live[1]
    torch.testing.assert_close(shown[0], first)
    assert not torch.allclose(shown[0], live[1])
    last = load_file(tmp_path / "epoch-0002" / "tensors.safetensors")
    torch.testing.assert_close(shown[1], 0.15 * first + 0.85 * last["model.1.weight"])
    assert torch.equal(model.state_dict()["1.weight"], shown[1])


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    before = net().state_dict()
    schedule: dict[str, Any] = {
        "epochs": 1,
        "batch": 30,
        "optimizer": "sgd",
        "lr": 1.0,
        "momentum": 0.0,
        "weight_decay": 0.0,
    }
    free = trained(net(), tmp_path / "free", **schedule)
    clipped = trained(net(), tmp_path / "clipped", clip_grad=0.01, **schedule)

    def moved(after: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((after[key] - before[key]).square().sum()) for key in before))

    assert moved(free) > 0.02
    assert moved(clipped) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_resume_is_exact_with_everything_on(tmp_path: Path, precision: Any) -> None:
    on = Machine(torch.device("cpu"), precision)
    schedule = {"accumulate": 3, "ema": 0.9, "clip_grad": 0.5, "lr": 0.01}
    straight = trained(net(norm=True), tmp_path / "straight", on, **schedule)
    seen: list[int] = []

    def check() -> dict[str, float]:
        seen.append(1)
        if len(seen) == 2:
            raise Stopped
        return {}

    watch = Watch(Console(file=io.StringIO()), tmp_path / "logs")
    with pytest.raises(Stopped):
        fit(stage(net(norm=True), tmp_path / "killed", check, **schedule), on, watch)
    state = json.loads((tmp_path / "killed" / "epoch-0001" / "state.json").read_text())
    assert bool(state["scaler"]) == (precision == "float16")
    # The second time like a stage that was killed between its last epoch and its end.
    for _ in range(2):
        resumed = trained(net(norm=True), tmp_path / "killed", on, **schedule)
        assert all(torch.equal(straight[key], value) for key, value in resumed.items())


def test_settings_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny\.schedule: a batch of 10 cannot be cut into 6 slices"):
        trained(net(), tmp_path, accumulate=6)
    with pytest.raises(ConfigError, match="float16 does not go with parallel: fsdp"):
        machine("cpu", "float16", "fsdp")


def test_what_is_gathered_at_a_time() -> None:
    network = create("trivium_resnet10_tiny", 10)
    student = Student(split(network, 16, 16), ["clean", "robust"], 1)
    units = _units(student)
    assert {id(branch) for branch in student.branches} <= {id(unit) for unit in units}
    inside = [id(parameter) for unit in units for parameter in unit.parameters()]
    assert len(inside) == len(set(inside))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert _units(tied) == [tied[1]]


NET = {"model": "trivium_resnet10_tiny"}
SCHEDULE = {"epochs": 2, "batch": 32, "lr": 0.005, "accumulate": 2}
RECIPE: dict[str, Any] = {
    "name": "digits",
    "threads": 1,
    "precision": "float32",
    "data": {"kind": "digits", "limit": {"train": 128, "calibration": 40}},
    "input": {"height": 16, "width": 16, "resize": 16},
    "shifts": {"mixing_set": 10},
    "original": {**NET, "schedule": {**SCHEDULE, "clip_grad": 1.0}},
    "teacher": {**NET, "schedule": {**SCHEDULE, "epochs": 1, "optimizer": "sgd"}, "loss": "jsd"},
    "preflight": "warn",
    "student": {"schedule": {**SCHEDULE, "ema": 0.9}, "uncertainty": "mutual_information"},
}


def command(processes: int, recipe: Path, out: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [*start, "trivium", "train", str(recipe), "--out", str(out), *more]


def run(processes: int, recipe: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(processes, recipe, out, *more), capture_output=True, text=True, timeout=900)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of RECIPE on one process."""
    place = tmp_path_factory.mktemp("one")
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    done = run(1, place / "recipe.yaml", place / "run")
    assert done.returncode == 0, done.stderr
    return place / "run"


def close(found: Path, wanted: Path, tolerance: float) -> None:
    for file in ("original/model.safetensors", "teacher/model.safetensors", "student.safetensors"):
        got, right = load_file(found / file), load_file(wanted / file)
        assert got.keys() == right.keys()
        for key, value in right.items():
            difference = float((got[key] - value).abs().max())
            assert difference <= tolerance * max(1.0, float(value.abs().max())), f"{file}: {key}: {difference}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("parallel", "tolerance"), [("ddp", 1e-4), ("fsdp", 5e-3)])
def test_two_processes_end_as_one_does(
    recipe: Path, tmp_path: Path, one: Path, parallel: str, tolerance: float
) -> None:
    """Batch norm, dropout, draws and all: the slices are the same. FSDP2 adds up in another order, and Adam makes much
    of small differences."""
    done = run(2, recipe, tmp_path / "two", "--set", f"parallel={parallel}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("original: epoch 2/2") == 1
    assert ", 2 processes" in done.stdout
    close(tmp_path / "two", one, tolerance)
    assert len(list((tmp_path / "two" / "logs" / "student").iterdir())) == 1
    costs = json.loads((tmp_path / "two" / "checkpoint.json").read_text())["costs"]
    assert costs["original"]["pictures"] == 256


def killed(first: int, recipe: Path, out: Path, sign: str) -> str:
    """Kill a run's last process as soon as a file is there; what the others say."""
    process = subprocess.Popen(command(first, recipe, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (out / sign).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    victim = process.pid
    if first > 1:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
        (victim,) = workers
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    _, text = process.communicate(timeout=120)
    assert time.monotonic() - begun < 90
    assert process.returncode != 0
    return text


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_one_process_is_killed_and_the_run_goes_on(
    recipe: Path, tmp_path: Path, one: Path, before: int, after: int
) -> None:
    """Also with another number of processes than it began with."""
    out = tmp_path / "run"
    text = killed(before, recipe, out, "student/epoch-0001/state.json")
    if before == 2:
        said = [line for line in text.splitlines() if "trivium train:" in line]
        assert len(said) == 1, text
        assert "process 0: another process of this run" in said[0]
    assert not (out / "checkpoint.json").exists()
    done = run(after, recipe, out)
    assert done.returncode == 0, done.stderr
    assert "original: done before, skipped" in done.stdout
    assert "student: resumed after epoch 1" in done.stdout
    close(out, one, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2])
def test_errors_are_one_line(recipe: Path, tmp_path: Path, one: Path, processes: int) -> None:
    wild = "original.schedule={epochs: 2, batch: 64, optimizer: sgd, lr: 1.0e+30, warmup: 0, accumulate: 2}"
    other = f"original={{model: trivium_resnet10_tiny, weights: '{one}#clean'}}"
    trials = [
        (("--set", "original.shedule.epochs=1"), "unknown key 'original.shedule'"),
        (("--set", "original.weights=/nowhere/w.pt"), "no such weights file"),
        (("--set", wild), "the loss is nan in epoch 1"),
        (("--set", "data.root=/nowhere", "--set", "data.kind=imagefolder"), "/nowhere: no such directory"),
        (("--set", other, "--set", "data.classes=['1', '2', '3']"), "trained for other classes"),
        (("--set", "original.schedule.accumulate=40"), "cannot be cut into 40 slices"),
    ]
    for more, text in trials[: 6 // processes]:
        done = run(processes, recipe, tmp_path / "run", *more)
        said = [line for line in done.stderr.splitlines() if line.startswith("trivium train:")]
        assert len(said) == 1, done.stderr
        assert text in said[0]
        assert done.returncode != 0
        assert not (tmp_path / "run" / "checkpoint.json").exists()
        if processes == 1:
            assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule: dict[str, Any] = {"accumulate": 2, "optimizer": "sgd", "lr": 0.01}
    on = replace(CPU, compile=True)
    found = []
    for name, where in (("plain", CPU), ("compiled", on)):
        model = net(norm=True)
        model[4] = nn.Identity()  # type: ignore[operator]  # a compiled dropout draws other numbers
        found.append(trained(model, tmp_path / name, where, **schedule))
        assert not any(module._compiled_call_impl for module in model.modules())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=1e-5, rtol=1e-4)
    _no_compiler.cache_clear()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/c++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    said = io.StringIO()
    fit(stage(net(norm=True), tmp_path / "without"), on, Watch(Console(file=said), tmp_path / "logs"))
    assert said.getvalue().startswith("compile: not possible here, going on without (")
    _no_compiler.cache_clear()
