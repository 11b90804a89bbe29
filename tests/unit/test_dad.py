"""Discrete adversarial distillation: samples, their store, losses, teachers, whole runs."""

import io
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from trivium.runtime.bundle import Preprocessing
from trivium.runtime.errors import ConfigError
from trivium.train.checkpoint import load_classifier, load_student
from trivium.train.data.samples import SampleStore, class_folders
from trivium.train.data.sources import open_file
from trivium.train.loop import TrainingDiverged
from trivium.train.methods.dad import Dad, dad_loss, mixed
from trivium.train.methods.discrete import Perturbation, discrete_samples
from trivium.train.models.autoencoder import VqShape
from trivium.train.models.backbone import Inlet, create
from trivium.train.models.clip import create_clip
from trivium.train.models.vq import VQGAN
from trivium.train.pipeline import train
from trivium.train.recipe import Recipe

SHAPE = VqShape(patch=2, channels=4, multipliers=(1,), codes=16, dimension=2)
CLASSES = [f"class {name}" for name in "kjihgfedcbaz"]
"""Twelve, in another order than the alphabet's: as plain numbers or names they would be read in another order."""


def discretiser() -> VQGAN:
    torch.manual_seed(0)
    vq = VQGAN(SHAPE)
    vq.quantize.begin(vq.encode(torch.rand(16, 3, 8, 8)))
    return vq.eval().requires_grad_(False)


def draws(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


class Linear(nn.Module):
    """Whose loss rises along every step of gradient ascent, since cross-entropy is convex in a linear model's input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, 5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


def test_samples_are_discretised_points_of_the_ball_around_the_reconstruction() -> None:
    vq, x, labels = discretiser(), torch.rand(12, 3, 8, 8), torch.arange(12) % 5
    seen: list[Tensor] = []

    def answer(z: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return Linear()(z)

    settings = Perturbation(eps=0.4, step=0.3, random_start=0.5)
    samples, figures = discrete_samples(x, labels, vq, settings, draws(12), answer)
    center = vq.reconstruct(x)
    start, end = seen
    at = torch.linalg.vector_norm((start - center).flatten(1), dim=1)
    assert 0 < (at == 0).sum() < 12  # a coin a picture, not a batch
    assert at.max() <= 0.4 + 1e-5  # the ball's center is Q(x), not x
    assert torch.linalg.vector_norm((start - x).flatten(1), dim=1).min() > 1
    assert torch.linalg.vector_norm((end - center).flatten(1), dim=1).max() <= 0.4 + 1e-5
    assert end.min() >= 0
    assert end.max() <= 1
    assert torch.equal(samples, vq.reconstruct(end))
    assert figures["loss_after"] > figures["loss_before"]
    assert figures["flips"] == pytest.approx((vq.codes(end) != vq.codes(center)).float().mean().item())
    assert figures["requantised"] == pytest.approx((vq.codes(center) != vq.codes(x)).float().mean().item())
    assert 0 < figures["displacement"] <= 0.4 + 1e-5

    # A picture's sample does not depend on the batch it was made in.
    alone, _ = discrete_samples(x[5:6], labels[5:6], vq, settings, draws(12)[5:6], answer)
    torch.testing.assert_close(alone[0], samples[5])


def test_ablations_of_the_sample() -> None:
    vq, x, labels = discretiser(), torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
    plain, figures = discrete_samples(x, labels, vq, None)
    assert torch.equal(plain, vq.reconstruct(x))
    assert set(figures) == {"moved"}
    random, figures = discrete_samples(x, labels, vq, Perturbation(eps=0.5, random_start=1.0), draws(6))
    assert "loss_after" not in figures
    assert 0.2 < figures["displacement"] <= 0.5 + 1e-5
    assert not torch.equal(random, vq.reconstruct(plain))
    still, figures = discrete_samples(x, labels, vq, Perturbation(eps=0.5, random_start=0.0), draws(6))
    assert figures["displacement"] == 0
    assert figures["flips"] == 0
    assert torch.equal(still, vq.reconstruct(plain))
    # A larger step moves farther and flips more codes.
    near, far = (
        discrete_samples(x, labels, vq, Perturbation(eps=3, step=step, random_start=0), draws(6), Linear())[1]
        for step in (0.01, 2.0)
    )
    assert near["displacement"] == pytest.approx(0.01, rel=0.2)
    assert far["flips"] > near["flips"]


def store(root: Path, form: str, mark: str = "one", count: int = 30) -> SampleStore:
    names = np.arange(100, 100 + count, dtype=np.int64)
    return SampleStore(root, form, names, np.arange(count) % 12, CLASSES, 8, mark)  # type: ignore[arg-type]


def coloured(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor, dict[str, Any]]:
    pictures = torch.zeros(len(numbers), 3, 4, 6, dtype=torch.uint8)
    pictures[:, 0] = torch.from_numpy(numbers)[:, None, None]
    return pictures, {"figures": {"flips": 0.5}}


@pytest.mark.parametrize("form", ["array", "png"])
def test_what_is_written_is_not_made_again(tmp_path: Path, form: str) -> None:
    asked: list[int] = []

    def make(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor, dict[str, Any]]:
        if 16 in numbers and 16 not in asked:
            asked.append(16)
            raise KeyboardInterrupt
        asked.extend(n for n in numbers.tolist() if n != 16)
        return coloured(numbers)

    first = store(tmp_path, form)
    assert not first.open()
    with pytest.raises(KeyboardInterrupt):
        list(first.write(range(first.chunks), make))
    with pytest.raises(ConfigError, match="missing"):
        first.records()
    again = store(tmp_path, form)
    assert not again.open()
    assert list(again.write(range(again.chunks), make)) == [2, 3]
    assert sorted(asked) == list(range(30))
    assert sum(record["samples"] for record in again.records()) == 30
    batch = again.batch(np.array([29, 0, 17, 17]))
    assert batch.shape == (4, 3, 4, 6)
    assert batch[:, 0, 0, 0].tolist() == [29, 0, 17, 17]
    assert not [path for path in tmp_path.rglob(".*")]
    other = store(tmp_path, form, "two")
    assert other.open()
    assert list(other.write(range(other.chunks), coloured)) == [0, 1, 2, 3]


def test_png_of_a_chunk_cut_short_are_kept(tmp_path: Path) -> None:
    made = store(tmp_path, "png")
    made.open()
    list(made.write(range(1), coloured))
    (tmp_path / "records" / "000000.json").unlink()
    (tmp_path / "pictures" / made.folders[3] / "00000103.png").unlink()
    asked: list[int] = []

    def make(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor, dict[str, Any]]:
        asked.extend(numbers.tolist())
        return coloured(numbers)

    list(store(tmp_path, "png").write(range(1), make))
    assert asked == [3]


def test_folders_keep_the_labels_of_more_than_ten_classes(tmp_path: Path) -> None:
    made = store(tmp_path, "png")
    made.open()
    list(made.write(range(made.chunks), coloured))
    folder = ImageFolder(str(tmp_path / "pictures"))
    assert len(folder.classes) == 12
    for path, label in folder.samples:
        number = int(Path(path).stem) - 100
        assert label == number % 12
        assert CLASSES[label].split()[-1] in Path(path).parent.name
        assert np.asarray(open_file(Path(path)))[0, 0, 0] == number
    assert sorted(class_folders(["1/2", "é", "Ü x"])) == ["0-1-2", "1-", "2-x"]


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_dad import coloured, store
made = store(Path(sys.argv[2]), "png", count=80)
def make(numbers):
    time.sleep(0.05)
    return coloured(numbers)
for chunk in made.write(range(int(sys.argv[3]), made.chunks, 2), make):
    print(chunk, flush=True)
"""


def test_two_processes_share_a_store_and_survive_a_kill(tmp_path: Path) -> None:
    made = store(tmp_path, "png", count=80)
    made.open()

    def writer(share: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(tmp_path), str(share)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    both = [writer(0), writer(1)]
    assert both[0].stdout is not None
    assert both[0].stdout.readline() == "0\n"
    both[0].send_signal(signal.SIGKILL)
    assert both[0].wait() == -signal.SIGKILL
    out, _ = both[1].communicate(timeout=60)
    assert out.split() == ["1", "3", "5", "7", "9"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").rglob("*.png")}
    out, _ = writer(0).communicate(timeout=60)
    assert "0" not in out.split()
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").rglob("*.png")}
    assert len(after) == 80
    assert all(after[path] == at for path, at in before.items())
    assert made.batch(np.arange(80))[:, 0, 0, 0].tolist() == list(range(80))


def settings(**changes: Any) -> Dad:
    return Dad.model_validate({"schedule": {"epochs": 1}, "discretiser": {"schedule": {"epochs": 1}}} | changes)


def softmax(z: Any, tau: float = 1.0) -> Any:
    e = np.exp((z - z.max(-1, keepdims=True)) / tau)
    return e / e.sum(-1, keepdims=True)


def test_losses_against_float64() -> None:
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 8, 5)) * 3
    y = np.eye(5)[rng.integers(0, 5, 8)]
    ce = -(y * np.log(softmax(s))).sum(-1)
    p, q = softmax(t, 4), softmax(s, 4)
    kl = (p * np.log(p / q)).sum(-1)
    logits, taught, targets = (torch.from_numpy(a) for a in (s, t, y))

    learned, distilled = dad_loss(logits, targets, taught, settings(), 4)
    assert learned.item() == pytest.approx(ce[:4].mean())
    assert distilled.item() == pytest.approx(0.5 * 16 * kl[:4].mean() + 0.5 * 16 * kl[4:].mean())
    # Without samples as much is distilled, from clean pictures alone.
    _, distilled = dad_loss(logits[:4], targets[:4], taught[:4], settings(samples_of="clean_kd"), 4)
    assert distilled.item() == pytest.approx(16 * kl[:4].mean())
    learned, distilled = dad_loss(logits[:4], targets[:4], None, settings(samples_of="nothing"), 4)
    assert (learned.item(), distilled.item()) == (pytest.approx(ce[:4].mean()), 0)
    # The form that the published code carries out: 0.75 CE + 4 KL over both halves.
    learned, distilled = dad_loss(logits, targets, taught, settings(loss="joint"), 4)
    assert learned.item() == pytest.approx(0.75 * ce.mean())
    assert distilled.item() == pytest.approx(4 * kl.mean())


def test_mixing_pairs_a_picture_with_a_sample() -> None:
    x = torch.cat([torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)])
    targets = torch.eye(2).repeat_interleave(4, 0)
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0)):
        for seed in range(8):
            views, labels = mixed(x, targets, mixup, cutmix, torch.Generator().manual_seed(seed))
            assert torch.allclose(labels.sum(1), torch.ones(8))
            # The share of a sample's pixels in a picture is the share of its label.
            torch.testing.assert_close(views.mean((1, 2, 3)), labels[:, 1], atol=1e-5, rtol=0)
            assert cutmix == 0 or set(views.unique().tolist()) <= {0.0, 1.0}


def digits(**changes: Any) -> Recipe:
    schedule = {"epochs": 1, "batch": 32, "lr": 0.005}
    net = {"model": "trivium_resnet10_tiny", "schedule": schedule}
    document = {
        "name": "digits",
        "threads": 1,
        "data": {"kind": "digits", "limit": {"train": 128, "calibration": 32}},
        "input": {"height": 16, "width": 16, "resize": 16},
        "views": {"flip": False},
        "shifts": {"mixing_set": 5},
        "original": net,
        "teacher": net,
        "preflight": "off",
        "heads": {"names": ["robust"], "depth": "all"},
        "dad": {
            "schedule": schedule,
            "samples": {"pictures": 48, "chunk": 16},
            "perturbation": {"eps": 2.0, "step": 1.0},
            "discretiser": {
                "shape": {"colours": 1, "patch": 4, "channels": 8, "multipliers": [1], "codes": 32, "dimension": 4},
                "schedule": schedule,
            },
        },
    }
    for key, value in changes.items():
        above, _, last = key.rpartition("__")
        inner: Any = document
        for part in above.split("__") if above else []:
            inner = inner[part]
        inner[last] = value
    return Recipe.model_validate(document)


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_run_its_resumption_and_its_ablations(tmp_path: Path) -> None:
    meta = train(digits(), tmp_path / "dad", quiet())
    assert list(meta.costs) == ["original", "teacher", "vq", "samples", "student"]
    assert meta.costs["samples"].pictures == 48
    figures = meta.results["samples"]
    assert 0 < figures["flips"] <= 1
    assert figures["loss_after"] > figures["loss_before"]
    student, _ = load_student(tmp_path / "dad")
    assert student.head_names == ("robust",)
    assert load_classifier(str(tmp_path / "dad"))[0](torch.zeros(1, 3, 16, 16)).shape == (1, 10)

    # A kill after one chunk: the rest is made, to the same bits, and the student need not be trained again.
    chunk = tmp_path / "dad" / "samples" / "pictures" / "000001.npy"
    bits = chunk.read_bytes()
    chunk.unlink()
    (tmp_path / "dad" / "samples" / "records" / "000001.json").unlink()
    said = io.StringIO()
    again = train(digits(), tmp_path / "dad", Console(file=said, width=200))
    assert "student: done before, skipped" in said.getvalue()
    assert chunk.read_bytes() == bits
    assert again.weights_sha256 == meta.weights_sha256

    # Ablations take original, teacher and discretiser over.
    said = io.StringIO()
    ablation = digits(dad__samples_of="student_gradient", dad__loss="joint", dad__mixup=0.8, dad__cutmix=1.0)
    other = train(ablation, tmp_path / "other", Console(file=said, width=200), [tmp_path / "dad"])
    assert said.getvalue().count("skipped") == 3
    assert other.results["samples"]["loss_after"] > other.results["samples"]["loss_before"]
    given: Any = {"weights": str(tmp_path / "dad")}
    clean = digits(dad__samples_of="q_only", dad__discretiser=given, dad__samples={"pictures": 32, "form": "png"})
    result = train(clean, tmp_path / "q", quiet())
    assert "vq" not in result.costs
    assert set(result.results["samples"]) == {"moved"}
    assert len(list((tmp_path / "q" / "samples" / "pictures").rglob("*.png"))) == 32


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"teacher": None}, ConfigError, "no teacher"),
        ({"dad__discretiser": {"weights": str(tmp_path / "no.pt")}}, ConfigError, "no such weights file"),
        ({"dad__discretiser": {"weights": str(tmp_path)}}, ConfigError, "no run that trained a discretiser"),
        ({"input": {"height": 18, "width": 18, "resize": 18}}, ConfigError, "multiples of 4, not 18 x 18"),
        ({"teacher": {"model": "clip:ViT-B-32", "weights": "absent.pt"}}, ConfigError, "must be a local file"),
        ({"teacher": {"model": "clip:ViT-Z", "weights": "absent.pt"}}, ConfigError, "no model 'ViT-Z'"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            train(digits(**changes), tmp_path / "run", quiet())
        assert "\n" not in str(caught.value)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dad__discretiser": None}, "needs a discretiser"),
        ({"dad__mixup": 0.8}, "loss: joint"),
        ({"dad__discretiser": {"weights": "train"}}, "needs a schedule"),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            digits(**changes)


def test_a_teacher_of_no_numbers_is_one_line_and_keeps_the_chunks(tmp_path: Path, monkeypatch: Any) -> None:
    train(digits(), tmp_path, quiet())
    state = tmp_path / "samples" / "records" / "000002.json"
    state.unlink()
    from trivium.train.methods import dad

    def broken(*arguments: Any) -> tuple[Tensor, dict[str, float]]:
        return arguments[0] * math.nan, {"flips": math.nan}

    monkeypatch.setattr(dad, "discrete_samples", broken)
    with pytest.raises(TrainingDiverged, match="no number, in chunk 2"):
        train(digits(), tmp_path, quiet())
    assert json.loads((tmp_path / "samples" / "records" / "000001.json").read_text())["samples"] == 16
    assert not state.exists()


def test_a_teacher_sees_its_own_statistics_and_size(tmp_path: Path) -> None:
    def taken(mean: float, std: float, side: int) -> Preprocessing:
        return Preprocessing(
            height=side, width=side, resize=side, interpolation="bilinear", mean=(mean,) * 3, std=(std,) * 3
        )

    x = torch.rand(2, 3, 16, 16)
    inlet = Inlet(taken(0.1, 0.3, 16), taken(0.5, 0.25, 16))
    assert inlet.needed
    torch.testing.assert_close(inlet((x - 0.1) / 0.3), (x - 0.5) / 0.25)
    assert Inlet(taken(0.1, 0.3, 16), taken(0.1, 0.3, 32))(x).shape == (2, 3, 32, 32)
    assert not Inlet(taken(0.1, 0.3, 16), taken(0.1, 0.3, 16)).needed

    # In a run: the data's statistics are measured, the teacher's file asks for 0.5 and 0.5.
    torch.manual_seed(0)
    source = create("trivium_resnet10_tiny", 10)
    torch.save(source.state_dict(), tmp_path / "teacher.pt")
    teacher = {"model": "trivium_resnet10_tiny", "weights": str(tmp_path / "teacher.pt")}
    recipe = digits(teacher=teacher, dad__samples_of="clean_kd")
    answers: list[Tensor] = []
    from trivium.train.pipeline import METHODS

    def look(run: Any, student: Any, teacher: Any, upstream: str) -> None:
        picture = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        assert run.feed.preprocessing.mean[0] != 0.5
        answers.extend([teacher(run.feed.normalise(picture)), source.eval()((picture - 0.5) / 0.5)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "dad", look)
        train(recipe, tmp_path / "run", quiet())
    torch.testing.assert_close(answers[0], answers[1], atol=1e-4, rtol=1e-3)


def test_clip_is_a_teacher_with_a_head_of_prompts(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "Tiny-Clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Tiny-Clip.json")
    torch.manual_seed(0)
    net = open_clip.create_model("Tiny-Clip").eval()
    torch.save(net.state_dict(), tmp_path / "clip.pt")
    names = ["zero", "one", "two"]
    kwargs = {"templates": ["a drawing of {}.", "{} {{}}"]}
    made = create_clip("clip:Tiny-Clip", names, kwargs, str(tmp_path / "clip.pt")).eval()
    assert made.pretrained_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        words = open_clip.get_tokenizer("Tiny-Clip")(
            [template.replace("{}", name) for name in names for template in kwargs["templates"]]
        )
        text = nn.functional.normalize(net.encode_text(words), dim=-1).view(3, 2, -1).mean(1)
        image = nn.functional.normalize(net.encode_image(x), dim=-1)
        wanted = net.logit_scale.exp() * image @ nn.functional.normalize(text, dim=-1).T
        torch.testing.assert_close(made(x), wanted, atol=1e-4, rtol=1e-4)

    # A tuned head is taken as it is, and only with its classes.
    torch.save(made.state_dict() | {"head.weight": made.head.weight * 2}, tmp_path / "tuned.pt")
    tuned = create_clip("clip:Tiny-Clip", names, None, str(tmp_path / "tuned.pt"))
    torch.testing.assert_close(tuned.eval()(x), 2 * made(x))
    with pytest.raises(ConfigError, match="head of 2 classes"):
        create_clip("clip:Tiny-Clip", names[:2], None, str(tmp_path / "tuned.pt"))
    with pytest.raises(ConfigError, match="1 names, the data has 3 classes"):
        create_clip("clip:Tiny-Clip", names, {"names": ["x"]}, str(tmp_path / "clip.pt"))

    # As a teacher in a run it sees 32 x 32 pictures in CLIP's own statistics.
    teacher = {"model": "clip:Tiny-Clip", "weights": str(tmp_path / "clip.pt")}
    meta = train(digits(teacher=teacher, dad__samples_of="clean_kd"), tmp_path / "run", quiet())
    assert meta.costs["teacher"].pictures == 0
    assert math.isfinite(meta.results["student"]["loss"])


def test_without_open_clip_the_line_names_the_extra(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"trivium\[clip\]"):
        create_clip("clip:ViT-B-32", ["a", "b"])
