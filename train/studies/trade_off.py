"""Where heads truly trade off, who should answer: python -m trivium.train.studies.trade_off --results FILE.json.

A clean and an adversarially trained head of one student meet Fashion-MNIST, each picture once as it is and once
attacked through a surrogate. The learned gate is fitted on calibration pictures attacked through one surrogate and
judged on test pictures attacked through another; both are originals of other seeds. Beside it stand each head alone,
ensembles of two networks, the controls that see one head alone, and the oracle, which knows which head is right; and
what is left of the routed system where an attack is made for itself. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trivium.kernels import HeadStatistics
from trivium.runtime.bundle import Calibration, Manifest
from trivium.runtime.router import route

from ..attacks.adaptive import adaptive
from ..attacks.pgd import pgd
from ..attacks.system import System
from ..calibration.calibrate import domain_of, fit_temperature
from ..calibration.comparison import by_picture, provisional
from ..calibration.gate import fit_gate, with_gate
from ..calibration.observe import CLEAN, Observations, Observer
from ..checkpoint import CheckpointMeta, load_student, write_json
from ..data.pictures import load_described
from ..data.sources import Split
from ..evaluation.metrics import Interval, paired_bootstrap
from ..evaluation.summary import Spread, show, spread
from ..models.mc import normalise
from ..pipeline import train
from ..recipe import Recipe
from .tables import DIFFERENCES

EPS = 25 / 255
"""Linf; whole steps of a byte, so that attacked pictures can be kept as pictures."""
STEPS = 10
"""Of PGD through the surrogate."""
ADAPTIVE_STEPS = 30
"""Of each attempt of the attack on the routed system."""
HEADS = ("clean", "robust")
ATTACKED = "pgd"
ENSEMBLES = ("mean of both heads", "mean of two robust heads")
"""Two networks each, as the gate; the second robust head is another seed's."""
BATCH = 250
MODEL = {
    "threads": 1,
    "data": {"kind": "fashion-mnist", "calibration": 5000},
    "input": {"height": 28, "width": 28, "resize": 28},
    "views": {"flip": True},
    "original": {
        "model": "trivium_resnet10_tiny",
        "schedule": {"epochs": 3, "pictures": 15000, "lr": 5e-3, "warmup": 0.15},
    },
}
ROBUST = {
    "heads": {"names": ["robust"], "depth": "all"},
    "adversarial": {
        "attack": {"eps": EPS, "steps": 5},
        "schedule": {"epochs": 3, "pictures": 5000, "lr": 3e-3, "warmup": 0.15},
        "held_out": 100,
    },
}
STUDENT = {"student": {"schedule": {"epochs": 1, "pictures": 3000, "lr": 1e-3}}}
WHITE_BOX = {"clean head": "clean", "robust head": "robust", "mean of both heads": "mean", "gate": "gate"}
"""Rows that are attacked for themselves, and what their routers are called."""
COLUMNS = ("clean", "attacked", "mixture", "own attack")
EXPLAINED = (
    "% right, mean ± standard deviation over seeds. attacked: by PGD through a network that is none of these; mixture: "
    "both, half and half; own attack: clean pictures attacked for this row, with masks, temperatures and rule known."
)


def main() -> None:
    """Train what is missing, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("studies"), metavar="DIR", help="of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="three or more (default 0 1 2)")
    parser.add_argument("--calibration-pictures", type=int, default=1500, metavar="N", help="(default 1500)")
    parser.add_argument("--pictures", type=int, default=2000, metavar="N", help="of the test (default 2000)")
    parser.add_argument("--attack-pictures", type=int, default=100, metavar="N", help="for own attacks (default 100)")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="where the figures go")
    given = parser.parse_args()
    if len(set(given.seeds)) < max(3, len(given.seeds)):
        parser.error("--seeds: three or more, all different: the networks of two others are each one's surrogates")
    console = Console()
    runs = [run(seed, given.out / "trade-off" / str(seed), console) for seed in given.seeds]
    limits = (given.calibration_pictures, given.pictures, given.attack_pictures)
    found = []
    for i, seed in enumerate(given.seeds):
        found.append(measure(seed, runs[i], runs[(i + 1) % len(runs)], runs[(i + 2) % len(runs)], *limits))
        console.print(f"seed {seed}: measured", highlight=False)
    show_table(found, console)
    if given.results:
        write_json(given.results, document(given.seeds, found))


def run(seed: int, out: Path, console: Console) -> Path:
    """A student whose robust head is a run of adversarial training from the same original; its directory."""
    robust = Recipe.model_validate({**MODEL, **ROBUST, "name": "trade-off-robust", "seed": seed})
    train(robust, out / "robust", console)
    heads = {"names": list(HEADS), "depth": "all", "sources": {"robust": str(out / "robust")}}
    student = Recipe.model_validate({**MODEL, **STUDENT, "name": "trade-off", "seed": seed, "heads": heads})
    train(student, out / "student", console, reuse=[out / "robust"])
    return out / "student"


class Measured(NamedTuple):
    """Of one seed; accuracies are shares in [0, 1]."""

    accuracy: dict[str, dict[str, float]]
    """Row -> column -> accuracy."""
    gate_over_head: Interval
    """On the mixture, over the best head there, with its paired bootstrap over pictures."""
    gate_over_ensemble: Interval
    """Over the better of the two ensembles."""
    gate_over_control: Interval
    """Over the better of the gates that see one head alone."""
    gap: float
    """Of the oracle over the best head."""


def measure(
    seed: int, own: Path, other: Path, third: Path, calibration_pictures: int, pictures: int, attack_pictures: int
) -> Measured:
    """The student of one seed against all rows.

    Args:
        other, third: runs of other seeds, whose originals are the surrogates of calibration and test.
    """
    student, meta = load_student(own)
    observer = Observer(student, meta.preprocessing, meta.dropout)
    images, labels, kind = views(meta, "calibration", calibration_pictures, other, seed)
    features, _ = observer.look(images)
    temperature = []
    for k, head in enumerate(HEADS):
        rows = domain_of(head, kind)
        temperature.append(fit_temperature(observer.pass_logits(features[rows], k), labels[rows]))
    fit = observations(observer.statistics(features, temperature), labels, kind)
    images, labels, kind = views(meta, "test", pictures, third, seed)
    judged = observations(observer.statistics(observer.look(images)[0], temperature), labels, kind)

    plain = manifest_of(meta, temperature, calibration_pictures)
    forms = {"gate": HEADS, "gate on the clean head alone": HEADS[:1], "gate on the robust head alone": HEADS[1:]}
    gates = {name: with_gate(plain, fit_gate(fit, HEADS, seen)) for name, seen in forms.items()}
    routers = {"clean head": "clean", "robust head": "robust", "min_entropy": "min_entropy", ENSEMBLES[0]: "mean"}
    answers = {name: route(judged.statistics, plain, router).class_id for name, router in routers.items()}
    answers[ENSEMBLES[1]] = (robust_answers(own, images) + robust_answers(other, images)).argmax(1)
    answers |= {name: route(judged.statistics, gate, "gate").class_id for name, gate in gates.items()}
    right = {name: answered == labels for name, answered in answers.items()}
    right["oracle"] = right["clean head"] | right["robust head"]

    own_attack = attacked_for_itself(System(student, gates["gate"]), meta, attack_pictures, seed)
    clean, accuracy = kind == CLEAN, {}
    for name, each in right.items():
        row = {"clean": each[clean].mean(), "attacked": each[~clean].mean(), "mixture": each.mean()}
        row |= {"own attack": own_attack[name]} if name in own_attack else {}
        accuracy[name] = {column: round(float(value), 6) for column, value in row.items()}
    gate = by_picture(judged, right["gate"], 0.5)

    def over(names: Iterable[str]) -> Interval:
        best = max((by_picture(judged, right[name], 0.5) for name in names), key=lambda score: float(score.mean()))
        return paired_bootstrap(gate - best, seed=seed)

    mixture = {name: row["mixture"] for name, row in accuracy.items()}
    gap = mixture["oracle"] - max(mixture["clean head"], mixture["robust head"])
    controls = [name for name in forms if name != "gate"]
    return Measured(accuracy, over(["clean head", "robust head"]), over(ENSEMBLES), over(controls), gap)


def views(
    meta: CheckpointMeta, split: Split, count: int, surrogate: Path, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.str_]]:
    """(pictures uint8 [2 N, H, W, 3], labels, kinds): N of a split as they are, then attacked through a surrogate, the
    original of another run."""
    images, labels = draw(meta, split, count, seed)
    other, its = load_student(surrogate)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for x, y in batches(images, labels):
        out = pgd(
            lambda z: other.original_logits(normalise(z, its.preprocessing)),
            x, y, "linf", EPS, EPS / 4, STEPS, generator=generator,
        )  # fmt: skip
        found.append((out * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    kinds = np.repeat(np.array([CLEAN, ATTACKED]), len(images))
    return np.concatenate([images, *found]), np.tile(labels, 2), kinds


def draw(meta: CheckpointMeta, split: Split, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Some pictures of a split, uint8 [N, H, W, 3], and their labels."""
    part = load_described(meta.data, split, meta.preprocessing)
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(part))[:count]
    return part.batch(chosen).permute(0, 2, 3, 1).contiguous().numpy(), part.labels[chosen]


def batches(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures [B, 3, H, W] in [0, 1] with labels [B]."""
    for start in range(0, len(images), BATCH):
        x = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
        yield x, torch.from_numpy(labels[start : start + BATCH])


def observations(statistics: HeadStatistics, labels: NDArray[np.int64], kind: NDArray[np.str_]) -> Observations:
    """Of views as `views` orders them."""
    return Observations(statistics, labels, None, kind, np.tile(np.arange(len(labels) // 2), 2))


def robust_answers(directory: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities [N, C] of a run's robust head."""
    student, meta = load_student(directory)
    observer = Observer(student, meta.preprocessing, meta.dropout)
    statistics = observer.statistics(observer.look(images)[0], [1.0] * len(HEADS))
    return statistics.probabilities[:, HEADS.index("robust")]


def manifest_of(meta: CheckpointMeta, temperature: Sequence[float], pictures: int) -> Manifest:
    """A manifest with these temperatures and no gate yet."""
    record = Calibration(
        temperature=dict(zip(HEADS, temperature, strict=True)), mixture={CLEAN: 0.5, ATTACKED: 0.5}, pictures=pictures,
        data=meta.data["source"], seed=meta.recipe["seed"], routers=[], chosen_because="nothing was chosen",
    )  # fmt: skip
    plain = provisional(meta.classes, HEADS, meta.preprocessing, meta.dropout)
    return plain.model_copy(update={"calibration": record})


def attacked_for_itself(system: System, meta: CheckpointMeta, count: int, seed: int) -> dict[str, float]:
    """Row of WHITE_BOX -> accuracy on test pictures that were attacked for it."""
    images, labels = draw(meta, "test", count, seed)
    accuracy = {}
    for row, router in WHITE_BOX.items():
        generator = torch.Generator().manual_seed(seed)
        right = 0
        for x, y in batches(images, labels):
            out = adaptive(system, router, x, y, "linf", EPS, ADAPTIVE_STEPS, generator)
            right += int((system.class_ids(out)[router] == y).sum())
        accuracy[row] = right / len(labels)
    return accuracy


def document(seeds: Sequence[int], found: Sequence[Measured]) -> dict[str, Any]:
    """All figures as plain JSON: mean, deviation and values over seeds, and each seed's intervals."""
    return {
        "format": "trivium-trade-off",
        "seeds": list(seeds),
        "eps": EPS,
        "rows": {
            name: {column: cell._asdict() for column, cell in cells.items()} for name, cells in rows(found).items()
        },
        "differences": {
            name: {**cell._asdict(), "intervals": [list(getattr(each, name)) for each in found]}
            for name in DIFFERENCES
            if (cell := spread([getattr(each, name).mean for each in found])) is not None
        },
        "share_of_gap": spread(shares(found))._asdict(),  # type: ignore[union-attr]
    }


def rows(found: Sequence[Measured]) -> dict[str, dict[str, Spread]]:
    """Row -> column -> spread over seeds."""
    return {
        name: {
            column: cell
            for column in COLUMNS
            if (cell := spread([each.accuracy[name].get(column) for each in found])) is not None
        }
        for name in found[0].accuracy
    }


def shares(found: Sequence[Measured]) -> list[float]:
    """Of the way from the best head to the oracle, how much the gate goes; a seed each, 0 where there is no way."""
    return [each.gate_over_head.mean / each.gap if each.gap > 0 else 0.0 for each in found]


def show_table(found: Sequence[Measured], console: Console) -> None:
    """Rows by columns, the differences, and the share of the gap."""
    table = Table(title=f"Fashion-MNIST, Linf {EPS:.3f}, {len(found)} seeds", title_justify="left")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, cells in rows(found).items():
        table.add_row(name, *(show(cells[column], "share") if column in cells else "" for column in COLUMNS))
    console.print(table)
    console.print(EXPLAINED, soft_wrap=True)
    for name, title in DIFFERENCES.items():
        each = [getattr(one, name) for one in found]
        sure = sum(interval.low > 0 for interval in each)
        cell = show(spread([interval.mean for interval in each]), "points")
        console.print(
            f"gate over {title}: {cell} points, above 0 with its 95 % interval in {sure} of {len(each)} seeds"
        )
    console.print(
        f"share of the gap between the best head and the oracle: {show(spread(shares(found)), 'share')} %",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
