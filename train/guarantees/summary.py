"""What a calibration found, for the terminal: the promises, what they cost, and what was not certified."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from trivium.runtime.bundle import Manifest
from trivium.runtime.guarantees import Guarantees
from trivium.runtime.promises import confidence, conformity_scores
from trivium.runtime.router import route, shift_probability

from ..calibration.observe import CLEAN
from ..evaluation.metrics import auroc, calibration_error, reliability
from .calibrate import Calibrated, certified_risks
from .conformal import set_sizes
from .harm import measure_harm
from .views import Views

SHOWN_COVERAGES = (0.90, 0.95)
SHOWN_RISKS = (0.01, 0.02, 0.05, 0.10)


def show(found: Calibrated, console: Console) -> None:
    """Print what was found."""
    manifest, calibration = found.manifest, found.calibration
    guarantees = manifest.guarantees
    assert guarantees is not None
    mixture = ", ".join(f"{share:.0%} {kind}" for kind, share in guarantees.mixture.items())
    console.print(
        f"guarantees on {guarantees.pictures} calibration pictures ({mixture}), with {guarantees.tuning_pictures} more "
        f"for what had to be chosen: {guarantees.data}"
    )
    console.print(router_table(manifest, guarantees, calibration))
    errors = []
    for k, head in enumerate(manifest.heads):
        probabilities = calibration.statistics.probabilities[:, k]
        right = probabilities.argmax(1) == calibration.labels
        errors.append(f"{head} {calibration_error(reliability(probabilities.max(1), right)):.3f}")
    console.print(f"expected calibration error: {', '.join(errors)}")
    shift = shift_probability(calibration.statistics, guarantees.shift, manifest.heads)
    if (area := auroc(shift, calibration.kind != CLEAN)) is not None:
        console.print(
            f"shift_score tells the mixture's shifted pictures from its clean ones with an AUROC of {area:.3f}"
        )
    console.print(guard_line(manifest, calibration))
    console.print(risk_line(manifest.router.default, guarantees))
    console.print(
        f"each bound on risk or harm fails with a probability of at most {guarantees.delta:g} over calibration "
        "pictures, by itself; nothing is promised for pictures unlike this mixture, or for a single class"
    )


def router_table(manifest: Manifest, guarantees: Guarantees, calibration: Views) -> Table:
    """Thresholds and mean sizes of sets, and the share answered at each risk, measured on the calibration part."""
    default = manifest.router.default
    risks = [risk for risk in guarantees.risks if risk in {*SHOWN_RISKS, guarantees.max_risk}]
    table = Table(
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        caption_justify="left",
        caption=f"sets of this coverage by {guarantees.score}: threshold and mean number of classes; % of pictures "
        "answered if at most so many answers may be wrong, by probability, entropy or information, - where that is not "
        "certified; → default router",
    )
    table.add_column("router", no_wrap=True)
    shown = sorted({*SHOWN_COVERAGES, guarantees.coverage} & {*guarantees.coverages})
    for coverage in shown:
        table.add_column(f"{coverage:.4g}", justify="right", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for risk in risks:
        table.add_column(f"{100 * risk:g} %", justify="right", no_wrap=True)
    for name, own in guarantees.routers.items():
        routed = route(calibration.statistics, manifest, name)
        scores = conformity_scores(
            routed.probabilities,
            routed.class_id,
            guarantees.score,
            guarantees.raps_penalty,
            guarantees.raps_free_ranks,
        )
        quantiles = own.lac if guarantees.score == "lac" else own.raps
        chosen = [quantiles[guarantees.coverages.index(coverage)] for coverage in shown]
        ranked = confidence(routed, calibration.statistics, manifest, own.confidence)
        least = [own.least[guarantees.risks.index(risk)] for risk in risks]
        table.add_row(
            ("→ " if name == default else "  ") + name,
            *(f"{quantile:.3f} {set_sizes(scores, quantile).mean():.2f}" for quantile in chosen),
            own.confidence.rpartition("_")[2],
            *("-" if each is None else f"{100 * (ranked >= each).mean():.1f}" for each in least),
            style="bold" if name == default else None,
        )
    return table


def guard_line(manifest: Manifest, calibration: Views) -> str:
    """What the guard may cost, or why there is none; measured on the half that it was not certified on."""
    rule, guarantees = manifest.router.guard, manifest.guarantees
    assert guarantees is not None
    if rule is None:
        if "clean" not in manifest.heads or manifest.router.default == "clean":
            return "no guard: that takes a clean head and another router to answer by default"
        return (
            f"not certified: a guard; {guarantees.pictures} pictures show of no threshold that it keeps its bounds, so "
            "take more of them or wider bounds"
        )
    views = calibration.take(slice(len(calibration) // 2, None))
    shift = shift_probability(views.statistics, rule, manifest.heads)
    clean, base = (route(views.statistics, manifest, name).class_id == views.labels for name in ("clean", rule.base))
    harm = measure_harm(shift, clean, base, views.kind == CLEAN, rule.threshold)
    leaves = f"{100 * (shift > rule.threshold).mean():.1f} %"
    return (
        f"guard leaves the clean head for {rule.base} above a shift probability of {rule.threshold:g} ({leaves} of the "
        f"pictures): clean accuracy falls by at most {100 * rule.accuracy_loss:g} points (measured "
        f"{100 * harm.accuracy_loss:.2f}), negative flips stay below {100 * rule.negative_flips:g} % (measured "
        f"{100 * harm.negative_flips:.2f})"
    )


def risk_line(router: str, guarantees: Guarantees) -> str:
    """Which risks are certified for a router, which not, and what the bundle abstains by."""
    certified = certified_risks(guarantees, router)
    missing = [risk for risk in guarantees.risks if risk not in certified]
    if not certified:
        return f"not certified: any risk of {router}, so that nothing is abstained from"
    answered = f"answers of {router} by default: "
    answered += "all" if guarantees.max_risk is None else f"at most {100 * guarantees.max_risk:g} % of them wrong"
    return answered + (f"; not certified: {percentages(missing)}" if missing else "")


def percentages(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:g} %" for share in shares)
