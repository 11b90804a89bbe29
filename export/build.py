"""The way from a source to a verified bundle: compile, calibrate, write, compare, seal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from trivium.runtime.bundle import Bundle, Calibration, Manifest, Quantization, RouterSettings, seal
from trivium.runtime.engine import Engine
from trivium.runtime.errors import ConfigError
from trivium.runtime.predictor import Predictor
from trivium.runtime.staging import staging
from trivium.train.calibration.calibrate import calibrate, describe, drawn
from trivium.train.guarantees.calibrate import Settings, calibrate_bundle, least_in_all
from trivium.train.guarantees.summary import show

from . import drift, pack, parity, quantize, tensorrt, triton
from .half import half_precision
from .onnx import add_heads, export_backbone
from .plan import Plan
from .result import Result
from .router_graph import fold_router, folded
from .source import Source

PARITY_PICTURES = 32


def build(source: Source, plan: Plan, console: Console) -> Result:
    """Compile a source as planned, and say on the console what is done and measured.

    Raises: TriviumError; what the plan would write is then as it was before.
    """
    begin = announcer(plan.steps(source), console)
    heads = list(source.classifier.head_names)
    pictures = None if plan.precision == "fp32" else real_pictures(source, plan)
    with staging(plan.bundle, plan.force) as root:
        begin("backbone")
        backbone = export_backbone(source.classifier, source.preprocessing)
        if source.pictures is not None:
            begin("calibrate")
        fitted, kept = plan.parts(source)
        settings, calibration = calibrated(source, plan.router, fitted, console)
        begin("heads")
        manifest = manifest_of(source, plan.name or source.name, plan.version, settings, calibration)
        temperature = calibration.temperature if calibration else dict.fromkeys(heads, 1.0)
        scales = [temperature[head] for head in heads]
        model = add_heads(backbone, source.classifier, source.dropout, scales)
        draft = pack.write(root, model, manifest)

        begin("parity")
        images, kind = parity_pictures(source)
        rows = parity.measure(model, draft, source.classifier, images, scales, source.unrounded)
        parity.check(rows)
        changed = drifted = None
        if pictures is not None:
            begin("precision")
            changed, quantization = reduced(source, plan, backbone, model, scales, pictures)
            drifted = drift.measure(model, changed, manifest, pictures.held_out, pictures.labels)
            console.print(drifted.table(plan.precision, pictures.source))
            drift.check(drifted, plan.max_drop)
            update = {"precision": plan.precision, "quantization": quantization, "drift": drifted.document()}
            manifest = manifest.model_copy(update=update)
            draft = pack.write(root, changed, manifest)
            rows += parity.fused(changed, draft, images, plan.precision)
        if kept:
            begin("guarantee")
            manifest = promised(source, draft, fitted, kept, console)
        elif source.pictures is not None:
            least = least_in_all(Settings().coverages[-1])
            console.print(
                f"no guarantees: they need {least} calibration pictures beside at least as many for the router; "
                "trivium calibrate finds them on other pictures"
            )
        if plan.fold_router:
            begin("fold")
            changed = fold_router(changed or model, manifest, "float32" if plan.tensorrt else "float64")
            manifest = manifest.model_copy(update={"folded_router": folded(manifest)})
            rows += parity.routed(changed, manifest, images)
        console.print(parity.table(rows, f"{len(images)} {kind} pictures"))
        parity.check(rows)
        manifest = manifest.model_copy(update={"tolerances": parity.tolerances(rows)})
        draft = pack.write(root, changed or model, manifest)
        if plan.tensorrt:
            begin("tensorrt")
            engine = tensorrt.build_engine(draft, root / tensorrt.PLAN, precision=plan.precision)
            manifest = manifest.model_copy(update={"plans": [engine]})
        begin("seal")
        sealed = seal(root, manifest)
        Engine(sealed).self_test()
        repository: list[Path] = []
        if "triton" in plan.targets:
            begin("triton")
            repository = triton.write_repository(root, plan.triton, device=plan.device)
    inside = [path for path in repository if triton.BUNDLE not in path.relative_to(plan.triton).parts]
    return Result(Bundle(plan.bundle, sealed.manifest), rows, drifted, inside)


def real_pictures(source: Source, plan: Plan) -> quantize.RealPictures:
    """What a lower precision is calibrated and judged on: the user's folder, or the source's calibration split.

    Raises: ConfigError where there are none, or too few; InvalidPicture.
    """
    if plan.calibration:
        return quantize.from_folder(plan.calibration, source.preprocessing, list(source.classes))
    if source.pictures is None:
        raise ConfigError(f"--precision {plan.precision} needs real pictures: give some with --calibration FOLDER")
    return quantize.from_data(source.pictures)


def reduced(
    source: Source,
    plan: Plan,
    backbone: onnx.ModelProto,
    model: onnx.ModelProto,
    scales: list[float],
    pictures: quantize.RealPictures,
) -> tuple[onnx.ModelProto, Quantization | None]:
    """The model in the plan's precision, and how it was quantised.

    Raises: EngineError.
    """
    if plan.precision == "fp16":
        return half_precision(model), None
    activations: Literal["uint8", "int8"] = "int8" if plan.tensorrt else "uint8"
    quantised, layers = quantize.quantize_backbone(backbone, pictures.ranges, activations)
    how = quantize.record(pictures, activations, layers)
    return add_heads(quantised, source.classifier, source.dropout, scales), how


def announcer(steps: dict[str, str], console: Console) -> Callable[[str], None]:
    """Says of each planned step that it begins."""
    place = {key: number for number, key in enumerate(steps, 1)}
    return lambda key: console.print(f"[bold]{place[key]}/{len(steps)}[/] {escape(steps[key])}")


def calibrated(
    source: Source, router: str | None, limit: int, console: Console
) -> tuple[RouterSettings, Calibration | None]:
    """The router's settings and the record of how they were found; no record where there is nothing to calibrate on."""
    heads = list(source.classifier.head_names)
    if source.pictures is None:
        return RouterSettings(default=router or ("combined" if "combined" in heads else heads[0])), None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("calibrating", total=None)
        settings, calibration = calibrate(
            source.classifier,
            source.pictures,
            source.dropout,
            limit=limit,
            spec=source.calibration,
            router=router,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(calibration_table(calibration))
    console.print(f"router {settings.default}: {calibration.chosen_because}")
    return settings, calibration


def promised(source: Source, draft: Bundle, fitted: int, kept: int, console: Console) -> Manifest:
    """The draft's manifest with what may be promised of its answers, found on the pictures that its temperatures and
    router were not fitted on."""
    assert source.pictures is not None
    assert draft.manifest.calibration is not None
    order = drawn(len(source.pictures), draft.manifest.calibration.seed)[fitted:]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("looking", total=None)
        found = calibrate_bundle(
            Predictor(draft, Engine(draft)),
            source.pictures,
            Settings(data=describe(source.pictures)),
            limit=kept,
            order=order,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    show(found, console)
    return found.manifest


def calibration_table(calibration: Calibration) -> Table:
    """The comparison of routers, for the terminal; shares in percent."""
    title = f"routers on {calibration.pictures} calibration pictures, " + ", ".join(
        f"{share:.0%} {kind}" for kind, share in calibration.mixture.items()
    )
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    result.add_column("router", no_wrap=True)
    columns = {
        "accuracy": "accuracy",
        "accuracy_clean": "clean",
        "accuracy_shifted": "shifted",
        "difference": "over null head [95 %]",
        "negative_flips": "flips",
    }
    for header in columns.values():
        result.add_column(header, justify="right", no_wrap=True)
    for row in calibration.routers:
        cells = ["" if row.get(key) is None else f"{100 * row[key]:.2f}" for key in columns]
        cells[3] += f" [{100 * row['difference_low']:+.2f}, {100 * row['difference_high']:+.2f}]"
        result.add_row(row["router"], *(escape(cell) for cell in cells))
    return result


def manifest_of(
    source: Source, name: str, version: str, settings: RouterSettings, calibration: Calibration | None
) -> Manifest:
    """The manifest, but for files and tolerances.

    Raises: ConfigError for a name, version or router that no manifest takes.
    """
    try:
        return Manifest(
            name=name,
            version=version,
            classes=list(source.classes),
            heads=list(source.classifier.head_names),
            preprocessing=source.preprocessing,
            dropout=source.dropout,
            router=settings,
            model=pack.MODEL,
            golden=pack.GOLDEN,
            calibration=calibration,
            provenance=source.provenance,
            training=source.training,
            files=pack.UNSEALED,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()) from None


def parity_pictures(source: Source) -> tuple[NDArray[np.uint8], str]:
    """Pictures uint8 [N, H, W, 3] to compare implementations on, and of which kind they are."""
    if source.pictures is not None:
        chosen = np.linspace(0, len(source.pictures) - 1, min(PARITY_PICTURES, len(source.pictures))).astype(np.int64)
        return np.ascontiguousarray(source.pictures.batch(chosen).permute(0, 2, 3, 1).numpy()), "calibration"
    drawn = [pack.golden_pictures(source.preprocessing, seed) for seed in range(2)]
    return np.concatenate(drawn), "drawn"
