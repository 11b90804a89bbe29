"""Discrete adversarial distillation (DAD, Zhou et al. 2023): the student learns from the teacher on pictures and on
discrete adversarial samples of them, which are made once, before training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from trivium.runtime.bundle import digest
from trivium.runtime.errors import ConfigError

from ..checkpoint import Cost
from ..data.pictures import load_pictures
from ..data.samples import Form, SampleStore
from ..data.sources import stratified_order
from ..distributed import barrier, once, processes, rank
from ..loop import Loss, TrainingDiverged, derive, fingerprint
from ..models.autoencoder import VqShape
from ..models.stages import Classifier
from ..models.student import Student
from ..models.vq import VQGAN, VqTraining, load_vq
from ..sections import Count, NonNegative, Rate, Schedule, Section
from .discrete import Perturbation, Sample, discrete_samples
from .losses import distillation

if TYPE_CHECKING:
    from ..feed import Feed
    from ..pipeline import Run

BEGIN = 256
"""Training pictures whose encodings the codebook begins with."""
GLANCE = 500
"""Held-out pictures that an epoch's check reconstructs."""


class Discretiser(Section):
    """The vector-quantised autoencoder Q."""

    weights: str = "train"
    """train (from scratch, here), a local file (models/vq.py says of what kind), or the directory of a run of this
    method."""
    shape: VqShape = VqShape()
    """Where it is trained here; a file brings its own."""
    schedule: Schedule | None = None
    commitment: NonNegative = 0.25
    adversarial: NonNegative = 0.0
    """Weight of a patch discriminator; it pays on large data only."""

    @model_validator(mode="after")
    def _trained(self) -> Discretiser:
        if self.weights == "train" and self.schedule is None:
            raise ValueError("weights: train needs a schedule")
        return self


class Samples(Section):
    """Which samples are made, and how they are kept."""

    pictures: Count | None = None
    """Of the training split, drawn class by class; None makes one of each."""
    form: Form = "array"
    """array is faster to read; png is a tree of class folders."""
    chunk: Count = 128
    """Samples made and written at once: what a kill loses at most."""


class Dad(Section):
    """Losses, samples and their ablations."""

    schedule: Schedule
    samples_of: Literal["nothing", "clean_kd"] | Sample = "dad"
    """What is learned beside clean pictures: dad; its ablations student_gradient, random_start and q_only; clean_kd,
    distillation on clean pictures alone; nothing, cross-entropy alone."""
    loss: Literal["three_terms", "joint"] = "three_terms"
    """three_terms: CE(x) + kd_clean tau^2 KL(x) + kd_samples tau^2 KL(x'), as the paper describes it. joint:
    lambda_ce CE + lambda_kd KL over the pictures and samples mixed, as its published code carries it out."""
    tau: Rate = 4.0
    kd_clean: NonNegative = 0.5
    kd_samples: NonNegative = 0.5
    """Falls to the clean pictures where there are no samples, so that clean_kd distils as much."""
    lambda_ce: NonNegative = 0.75
    lambda_kd: NonNegative = 4.0
    mixup: NonNegative = 0.0
    """alpha of mixup over pictures and samples, for joint; the published 0.8 leaves no picture unmixed. 0: off."""
    cutmix: NonNegative = 0.0
    """The same of CutMix (published: 1); where both are given, each takes half of the batches."""
    perturbation: Perturbation = Perturbation()
    samples: Samples = Samples()
    discretiser: Discretiser | None = None
    tail_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Learning rate of the tuned stages as a multiple of the heads'."""

    @property
    def sample(self) -> Sample | None:
        """The kind of sample, where there are samples."""
        return self.samples_of if self.samples_of in get_args(Sample) else None  # type: ignore[return-value]

    @model_validator(mode="after")
    def _consistent(self) -> Dad:
        if self.sample and self.discretiser is None:
            raise ValueError(f"samples_of: {self.samples_of} needs a discretiser")
        if (self.mixup or self.cutmix) and self.loss != "joint":
            raise ValueError("mixup and cutmix belong to loss: joint")
        return self


def run(run: Run, student: Student, teacher: Classifier | None, upstream: str) -> None:
    """Discretiser, samples, student: train the student's heads in place.

    Raises: ConfigError where a recipe without a teacher asks for distillation; TrainingDiverged.
    """
    settings = run.recipe.dad
    assert settings is not None, "the recipe's method"
    if settings.samples_of != "nothing" and teacher is None:
        raise ConfigError(f"dad.samples_of: {settings.samples_of} distils, and the recipe has no teacher")
    store, mark = None, "none"
    if settings.sample is not None:
        vq, vq_print = _discretiser(run, settings)
        gradient = {"dad": teacher, "student_gradient": run.feed.answer(student.original_logits)}
        answer = gradient.get(settings.sample)
        if isinstance(answer, Classifier):
            answer = run.feed.answer(answer)
        store, mark = _samples(run, settings, vq, answer, fingerprint(upstream, vq_print))
    run.stage(
        "student",
        student,
        settings.schedule,
        lambda: dad_objective(run.feed, student, teacher, settings, store),
        (settings.model_dump(exclude={"samples", "discretiser", "perturbation"}), mark, upstream),
        kept=Student.is_tuned,
        lr_scale=lambda name: settings.tail_lr if name.startswith("branches.") else 1.0,
        check=lambda: run.feed.glance_heads(student),
    )


def dad_objective(
    feed: Feed, student: Student, teacher: Classifier | None, settings: Dad, store: SampleStore | None
) -> Loss:
    """The sum over the heads that are trained of the loss of the recipe; picture i goes with sample i mod N."""

    def loss(
        pictures: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        labels = feed.labels(indices)
        x = feed.clean(pictures, generator)
        if store is not None:
            numbers = indices % len(store)
            again = feed.machine.channels_last(store.batch(numbers))
            x = torch.cat([x, feed.clean(again, generator)])
            labels = torch.cat([labels, torch.from_numpy(store.labels[numbers]).to(labels)])
        targets = F.one_hot(labels, len(feed.classes)).float()
        if settings.mixup or settings.cutmix:
            x, targets = mixed(x, targets, settings.mixup, settings.cutmix, generator)
        views = feed.normalise(x)
        total, parts = torch.zeros((), device=x.device), dict[str, float]()
        with feed.machine.autocast():
            with torch.no_grad():
                z = student.trunk(views)
                taught = teacher(views).float() if teacher is not None and settings.samples_of != "nothing" else None
            for index, name in enumerate(student.head_names):
                if name not in student.fixed:
                    logits = student.logits(index, student.branch(index, z))
                    learned, distilled = dad_loss(logits, targets, taught, settings, len(pictures))
                    total = total + learned + distilled
                    parts |= {f"{name}_ce": learned.item(), f"{name}_kd": distilled.item()}
        return total, parts

    return loss


def dad_loss(
    logits: Tensor, targets: Tensor, taught: Tensor | None, settings: Dad, clean: int
) -> tuple[Tensor, Tensor]:
    """(cross-entropy part, distillation part) of the loss, in nats.

    logits, targets, taught: the student's answers, the labels' distributions and the teacher's answers (None: no
    distillation) [N, C], of which the first `clean` belong to clean pictures and the others to samples.
    """
    smoothing = settings.schedule.label_smoothing
    kl = distillation(taught, logits, settings.tau) if taught is not None else logits.new_zeros(len(logits))
    if settings.loss == "joint":
        learned = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return settings.lambda_ce * learned, settings.lambda_kd * kl.mean() / settings.tau**2
    learned = F.cross_entropy(logits[:clean], targets[:clean], label_smoothing=smoothing)
    if len(logits) == clean:
        return learned, (settings.kd_clean + settings.kd_samples) * kl.mean()
    return learned, settings.kd_clean * kl[:clean].mean() + settings.kd_samples * kl[clean:].mean()


def mixed(x: Tensor, targets: Tensor, mixup: float, cutmix: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch [N, C, H, W] and its targets [N, K], picture i
    with picture N - 1 - i, a clean one with a sample; one ratio a batch, Beta(alpha, alpha)."""
    draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    cut = draw.random() < (cutmix > 0) / ((cutmix > 0) + (mixup > 0))
    ratio = float(draw.beta(cutmix, cutmix) if cut else draw.beta(mixup, mixup))
    partner, height, width = x.flip(0), x.shape[2], x.shape[3]
    if not cut:
        return torch.lerp(partner, x, ratio), torch.lerp(targets.flip(0), targets, ratio)
    side = (1 - ratio) ** 0.5 / 2
    row, column = draw.random(2)
    top, bottom = (round(min(max(row + s, 0), 1) * height) for s in (-side, side))
    left, right = (round(min(max(column + s, 0), 1) * width) for s in (-side, side))
    x = x.clone()
    x[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return x, torch.lerp(targets.flip(0), targets, kept)


def _discretiser(run: Run, settings: Dad) -> tuple[VQGAN, str]:
    """The discretiser on the device, frozen, and its fingerprint."""
    spec = settings.discretiser
    assert spec is not None, "the section's validator asks for it"
    size = run.feed.preprocessing
    if spec.weights == "train":
        assert spec.schedule is not None, "the section's validator asks for it"
        torch.manual_seed(derive(run.recipe.seed, "vq", "initial"))
        model = VqTraining(VQGAN(spec.shape), spec.adversarial)
        model.vq.fits(size.height, size.width)
        plan = spec.model_dump(exclude={"weights"})
        run.stage(
            "vq",
            model,
            spec.schedule,
            lambda: vq_objective(run.feed, model, spec.commitment),
            plan,
            check=lambda: {"psnr": _psnr(run.feed, model.vq)},
        )
        vq, mark = model.vq, fingerprint(*run.common, plan)
    else:
        file = Path(spec.weights)
        if file.is_dir():
            file = file / "vq" / "model.safetensors"
            if not file.is_file():
                raise ConfigError(f"dad.discretiser.weights: {spec.weights} is no run that trained a discretiser")
        vq = load_vq(file)
        vq.fits(size.height, size.width)
        mark = digest(file)
    run.machine.place(vq)
    return vq.eval().requires_grad_(False), mark


def vq_objective(feed: Feed, model: VqTraining, commitment: float) -> Loss:
    """Reconstruction of clean views (models/vq.py). The codebook begins from the first training pictures."""
    pictures = feed.fetch(np.arange(min(BEGIN, len(feed.pictures))), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.vq.quantize.begin(model.vq.encode(pictures.float() / 255))

    def loss(
        pictures: Tensor, indices: NDArray[np.int64], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        x = feed.clean(pictures, generator)
        with feed.machine.autocast():
            return model(x, commitment)  # type: ignore[no-any-return]

    return loss


@torch.no_grad()
def _psnr(feed: Feed, vq: VQGAN) -> float:
    """Peak signal-to-noise ratio of reconstructions of held-out pictures, in decibels."""
    errors = [((vq.reconstruct(x) - x) ** 2).flatten(1).mean(1) for x, _ in feed.held_out_batches(GLANCE, False)]
    return float(-10 * torch.cat(errors).mean().clamp(min=1e-10).log10())


def _samples(run: Run, settings: Dad, vq: VQGAN, answer: Any, upstream: str) -> tuple[SampleStore, str]:
    """The samples, made where they are not there yet, each process its share of the chunks; and their fingerprint."""
    feed, seed = run.feed, run.recipe.seed
    perturbation = None if settings.sample == "q_only" else settings.perturbation
    plan = (settings.samples.model_dump(), settings.sample, perturbation and perturbation.model_dump())
    mark = fingerprint("samples", *run.common, plan, upstream)
    # Views of training may be random crops; samples are made of whole pictures, as serving sees them.
    pictures = load_pictures(run.recipe.data, "train", feed.preprocessing)
    chosen = np.arange(len(pictures), dtype=np.int64)
    if settings.samples.pictures is not None:
        chosen = np.sort(stratified_order(pictures.labels, seed)[: settings.samples.pictures])
    store = SampleStore(
        run.out / "samples", settings.samples.form, chosen, pictures.labels[chosen], feed.classes,
        settings.samples.chunk, mark,
    )  # fmt: skip

    def begin() -> None:
        if store.open():
            run.watch.say("samples: the recipe or the data changed, made anew")

    once(begin)

    def make(numbers: NDArray[np.int64]) -> tuple[Tensor, dict[str, Any]]:
        cpu, wall = time.process_time(), time.monotonic()
        x = feed.machine.channels_last(pictures.batch(chosen[numbers])).float() / 255
        labels = feed.labels(chosen[numbers])
        generators = [torch.Generator().manual_seed(derive(seed, "sample", int(i))) for i in chosen[numbers]]
        samples, figures = discrete_samples(x, labels, vq, perturbation, generators, answer)
        if not (torch.isfinite(samples).all() and np.isfinite(list(figures.values())).all()):
            raise TrainingDiverged(f"samples: a picture or a loss is no number, in chunk {numbers[0] // store.chunk}")
        spent = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.monotonic() - wall}
        return (samples * 255).round().to(torch.uint8), {"figures": figures, **spent}

    share = range(rank(), store.chunks, processes())
    made = sum(1 for _ in store.write(share, make))
    barrier()
    records = store.records()
    counts = np.array([record["samples"] for record in records], np.float64)
    names = sorted({name for record in records for name in record.get("figures", {})})
    figures = {
        name: float(np.average([record.get("figures", {}).get(name, 0.0) for record in records], weights=counts))
        for name in names
    }
    run.costs["samples"] = Cost(
        cpu_seconds=sum(record.get("cpu_seconds", 0.0) for record in records),
        wall_seconds=sum(record.get("wall_seconds", 0.0) for record in records),
        pictures=int(counts.sum()),
    )
    run.results["samples"] = figures
    done = f"{len(store)} made" if made else f"{len(store)} made before, skipped"
    run.watch.say(f"samples: {done}  " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    return store, mark
