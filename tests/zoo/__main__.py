"""Try every architecture and write the table: python -m tests.zoo [--out FILE]; more at once share the work."""

from __future__ import annotations

import argparse
import re
from importlib.metadata import version
from pathlib import Path

from trivium.export.operators import operator_list

from .architectures import ARCHITECTURES, Architecture
from .trial import BATCHES, OUT, ROOT, Outcome, outcome


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "export" / "ZOO.md")
    arguments = parser.parse_args()
    for wait in (False, True):
        rows = []
        for number, architecture in enumerate(ARCHITECTURES, 1):
            found = outcome(architecture, wait)
            if found is not None:
                rows.append((architecture, found))
                print(f"{number}/{len(ARCHITECTURES)} {_line(architecture, found)}", flush=True)
        if len(rows) == len(ARCHITECTURES):
            break
    arguments.out.write_text(table(rows), encoding="utf-8")
    print(f"{arguments.out}; what each line comes from is kept in {OUT}")


def table(rows: list[tuple[Architecture, Outcome]]) -> str:
    """Markdown: those that pass, then those that do not with the reason."""
    good = [(architecture, found) for architecture, found in rows if not found.reason]
    bad = [(architecture, found) for architecture, found in rows if found.reason]
    seconds = sum(found.cpu_seconds or 0 for _, found in rows)
    lines = [
        "# Architectures that were exported",
        "",
        "`make test-zoo` draws random weights for one small timm model of each family, at the model's own picture "
        "size, reads them as `trivium export --timm NAME --weights FILE` does, exports them with a free batch and "
        "compares ONNX Runtime with torch, one picture and three at a time. It wrote this page.",
        "",
        f"{len(good)} of {len(rows)} pass, with timm {version('timm')}, torch {version('torch')}, onnx "
        f"{version('onnx')}, onnxruntime {version('onnxruntime')}; the exports took {seconds:.0f} CPU seconds on a "
        "busy machine. The difference is the largest over features (beside the largest feature) and all answers "
        "(beside max(1, |b|)); the weights are drawn so that every branch counts. *TensorRT lacks* are operators that "
        f"the list for TensorRT {operator_list()['tensorrt']} refuses (`tensorrt_operators.yaml`): checked against "
        "that list, no engine was built; an empty cell says that it takes them all.",
        "",
        "| family | timm model | parameters | nodes | TensorRT lacks | CPU s | "
        + " | ".join(f"difference at B={batch}" for batch in BATCHES)
        + " |",
        "|---|---|--:|--:|---|--:|" + "--:|" * len(BATCHES),
        *(_line(architecture, found) for architecture, found in good),
    ]
    if bad:
        lines += ["", "These do not pass:", "", "| family | timm model | why |", "|---|---|---|"]
        lines += [_line(architecture, found) for architecture, found in bad]
    return "\n".join(lines) + "\n"


def _line(architecture: Architecture, found: Outcome) -> str:
    if found.reason:
        reason = re.sub(r" : \[num_users=.*", "", found.reason).replace("|", "/")
        note = f": {architecture.note}" if architecture.note else ""
        return f"| {architecture.family} | `{found.name}` | {reason}{note} |"
    assert found.parameters is not None
    assert found.difference is not None
    lacks = found.tensorrt.removeprefix(f"TensorRT {operator_list()['tensorrt']} does not take operator ")
    differences = " | ".join(f"{found.difference[str(batch)]:.0e}" for batch in BATCHES)
    return (
        f"| {architecture.family} | `{found.name}` | {found.parameters / 1e6:.1f} M | {found.nodes} "
        f"| {lacks.replace('|', '/')} | {found.cpu_seconds:.0f} | {differences} |"
    )


if __name__ == "__main__":
    main()
