"""`trivium predict`: classify picture files with a bundle or by a server, as a table or as one JSON object a line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from .bundle import printable
from .cli import positive
from .cpus import usable_cpus
from .errors import ConfigError, InvalidPicture, InvalidRequest
from .predictor import Prediction, Predictor
from .preprocess import SUFFIXES, read_picture
from .promises import check, ranges, terms
from .router import routers, unknown_router

if TYPE_CHECKING:
    from .client import Client

Answer: TypeAlias = "Callable[[str], Prediction | InvalidPicture]"
LOCAL = ("kernels", "device")
REMOTE = ("model", "timeout", "token_file", "tls", "tls_ca", "tls_cert", "tls_key")
"""Options that belong to a bundle alone, or to a server alone."""
IN_FLIGHT = 8
"""Pictures that a server is asked about at a time."""
SET = 5
"""Classes of a prediction set that a table shows."""
WIDTH = 1000
"""Columns of a table that goes into a file or a pipe, where nothing needs to be folded."""


class Names(Protocol):
    """What the axes of a prediction mean: a bundle's manifest, or what a server says of a model."""

    @property
    def name(self) -> str: ...

    @property
    def heads(self) -> Sequence[str]: ...

    @property
    def classes(self) -> Sequence[str]: ...


def main() -> None:
    """Answer every picture that can be read; exit status 1 where some could not."""
    arguments = _arguments()
    one: Answer
    names: Names
    with ExitStack() as stack:
        if arguments.server is None:
            predictor = Predictor.load(
                arguments.bundle, kernels=arguments.kernels or "auto", device=arguments.device or "cpu"
            )
            names, available, workers = predictor.manifest, routers(predictor.manifest), usable_cpus()
            offered = ranges(predictor.manifest)
            one = partial(_local, predictor, arguments)
        else:
            client = stack.enter_context(_client(arguments))
            names = metadata = client.metadata()
            available, workers = list(metadata.routers), IN_FLIGHT
            offered = metadata.guarantees
            one = partial(_served, client, arguments)
        if arguments.router is not None and arguments.router not in available:
            raise unknown_router(arguments.router, available)
        check(offered, names.name, arguments.router, arguments.coverage, arguments.max_risk)
        failed = 0
        rows: list[tuple[str, Prediction]] = []
        for path, answer in predict(one, list(pictures(arguments.images)), workers):
            if isinstance(answer, InvalidPicture):
                failed += 1
                print(f"{sys.argv[0]}: {printable(str(answer))}", file=sys.stderr)
            elif arguments.json:
                print(json_line(record(path, answer, names, arguments.top)), flush=True)
            else:
                rows.append((path, answer))
    if rows:
        print_table(rows, names, arguments.top)
    if failed:
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        usage="%(prog)s [options] BUNDLE IMAGE...\n       %(prog)s [options] --server HOST:PORT IMAGE...",
        description="Classify picture files with a bundle, or ask a server that does.",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="JPEG, PNG or WebP files, or directories of them")
    parser.add_argument("--router", metavar="NAME", help="a head's name or a rule; the model's own choice by default")
    parser.add_argument("--coverage", metavar="SHARE", type=float, help="of the prediction sets, say 0.95")
    parser.add_argument("--max-risk", metavar="SHARE", type=float, help="of error where no abstention is, say 0.05")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--top", metavar="N", type=positive, default=1, help="classes to show a picture (default 1)")
    local = parser.add_argument_group("with a bundle")
    local.add_argument("--kernels", choices=["auto", "on", "off"], help="use of the fused kernel (default auto)")
    local.add_argument("--device", choices=["cpu", "cuda"], help="default cpu")
    remote = parser.add_argument_group("with a server")
    parser.add_argument(
        "--server", metavar="HOST:PORT", help="of its gRPC; several, as a list with commas or a name, take turns"
    )
    remote.add_argument("--model", metavar="NAME[/VERSION]", help="needed where it has several, or does not list them")
    remote.add_argument("--timeout", metavar="SECONDS", type=float, help="for each picture (default 30)")
    remote.add_argument("--token-file", metavar="FILE", help="holds a bearer token")
    remote.add_argument("--tls", action="store_true", default=None, help="encrypt; the files below imply it")
    remote.add_argument("--tls-ca", metavar="FILE", help="PEM: who must have signed the server's certificate")
    remote.add_argument("--tls-cert", metavar="FILE", help="PEM: one's own certificate")
    remote.add_argument("--tls-key", metavar="FILE", help="PEM: its key")
    arguments = parser.parse_args()
    others, needed = (REMOTE, "--server") if arguments.server is None else (LOCAL, "a bundle")
    for name in others:
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is of use only with {needed}")
    if arguments.server is None:
        arguments.bundle, *arguments.images = arguments.images
        if not arguments.images:
            parser.error("expected a bundle and at least one IMAGE, or --server HOST:PORT")
    return arguments


def _client(arguments: argparse.Namespace) -> Client:
    from .client import Client

    token: str | None = None
    if arguments.token_file is not None:
        try:
            token = Path(arguments.token_file).read_text(encoding="ascii").strip()
        except OSError as error:
            raise ConfigError(f"{arguments.token_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{arguments.token_file}: the token must be printable ASCII") from None
    model, _, version = (arguments.model or "").partition("/")
    return Client(
        arguments.server,
        model or None,
        version,
        timeout=30.0 if arguments.timeout is None else arguments.timeout,
        token=token,
        tls=bool(arguments.tls),
        tls_ca=arguments.tls_ca,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
    )


def pictures(arguments: Sequence[str]) -> Iterator[str]:
    """Files as they are named, and of each directory the pictures below it, sorted.

    Raises: InvalidRequest for a directory without pictures.
    """
    for argument in arguments:
        if not Path(argument).is_dir():
            yield argument
            continue
        found = sorted(str(p) for p in Path(argument).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise InvalidRequest(f"{argument}: no {', '.join(SUFFIXES)} file in this directory")
        yield from found


def predict(one: Answer, paths: Sequence[str], workers: int) -> Iterator[tuple[str, Prediction | InvalidPicture]]:
    """Answers in the order of the paths, so many of them asked for at a time."""
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        yield from zip(paths, pool.map(one, paths), strict=True)
    finally:
        # without waiting: after an interrupt, closing the client ends the calls under way
        pool.shutdown(wait=False, cancel_futures=True)


def _local(predictor: Predictor, arguments: argparse.Namespace, path: str) -> Prediction | InvalidPicture:
    start = perf_counter_ns()
    try:
        image = read_picture(path, predictor.manifest.preprocessing, predictor.limits)
    except InvalidPicture as error:
        return error
    asked = terms(predictor.manifest, arguments.router, arguments.coverage, arguments.max_risk)
    return predictor.infer(image, arguments.router, asked, decode_ns=perf_counter_ns() - start)


def _served(client: Client, arguments: argparse.Namespace, path: str) -> Prediction | InvalidPicture:
    asked = {name: getattr(arguments, name) for name in ("router", "coverage", "max_risk")}
    try:
        return client.predict(path, **asked)[0]
    except InvalidPicture as error:
        return error
    except InvalidRequest as error:  # all else in the request is known to be right
        return InvalidPicture(f"{path}: {error}")


def answering(head: str, heads: Sequence[str]) -> list[int]:
    """Places among the heads of those that answered, by a prediction's `head`: all of them under a name of their own,
    say "mean"."""
    return [k for k, each in enumerate(heads) if each in head.split("+")] or list(range(len(heads)))


def record(path: str, prediction: Prediction, names: Names, top: int) -> dict[str, Any]:
    """What --json prints of a picture. Entropies and divergences in nats, times in nanoseconds."""

    def by_head(values: Any) -> dict[str, Any]:
        return dict(zip(names.heads, values, strict=True))

    best = prediction.probabilities.argsort(kind="stable")[::-1][:top]
    timings = prediction.timings
    promised: dict[str, Any] = {}
    if prediction.prediction_set is not None:
        promised = {
            "prediction_set": [names.classes[i] for i in set_of(prediction)],
            "abstain": prediction.abstain,
            "shift_score": prediction.shift_score,
        }
    return {
        "path": path,
        "class_id": prediction.class_id,
        "label": prediction.label,
        "probability": float(prediction.probabilities[prediction.class_id]),
        "head": prediction.head,
        "top": [
            {"class_id": int(i), "label": names.classes[i], "probability": float(prediction.probabilities[i])}
            for i in best
        ],
        "predictive_entropy": by_head(prediction.predictive_entropy.tolist()),
        "mutual_information": by_head(prediction.mutual_information.tolist()),
        "divergence": by_head(by_head(row) for row in prediction.divergence.tolist()),
        "energy": by_head(prediction.energy.tolist()),
        **promised,
        "decode_ns": timings.decode,
        "queue_ns": timings.queue,
        "compute_ns": timings.compute,
        "route_ns": timings.route,
    }


def set_of(prediction: Prediction) -> list[int]:
    """The classes of a prediction's set, the most probable first."""
    assert prediction.prediction_set is not None, "asked where the bundle has guarantees"
    inside = np.flatnonzero(prediction.prediction_set)
    ranked: list[int] = inside[(-prediction.probabilities[inside]).argsort(kind="stable")].tolist()
    return ranked


def json_line(row: dict[str, Any]) -> str:
    """JSON with letters as they are, or escaped where the output's encoding lacks one."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return json.dumps(row)
    return text


def print_table(rows: Sequence[tuple[str, Prediction]], names: Names, top: int) -> None:
    """Uncertainty of the head that answered, or the mean over the heads where several did."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("picture", "label", "p", "head", "entropy", "MI", box=None, pad_edge=False)
    if disagreement := {"clean", "robust"} <= set(names.heads):
        table.add_column("KL clean-robust")
    if guaranteed := rows[0][1].prediction_set is not None:
        for column in ("set", "", "shift"):
            table.add_column(column)
    shared = _shared_folder([path for path, _ in rows])
    for path, prediction in rows:
        best = prediction.probabilities.argsort(kind="stable")[::-1][:top]
        own = answering(prediction.head, names.heads)
        cells = [
            printable(os.path.relpath(path, shared) if shared else path),
            "\n".join(names.classes[i] for i in best),
            "\n".join(f"{prediction.probabilities[i]:.3f}" for i in best),
            prediction.head,
            f"{prediction.predictive_entropy[own].mean():.3f}",
            f"{prediction.mutual_information[own].mean():.3f}",
        ]
        if disagreement:
            clean, robust = names.heads.index("clean"), names.heads.index("robust")
            cells.append(f"{prediction.divergence[clean, robust]:.3f}")
        if guaranteed:
            labels = [names.classes[i] for i in set_of(prediction)]
            more = [f"and {len(labels) - SET} more"] if len(labels) > SET else []
            cells += [", ".join(labels[:SET] + more), "abstains" if prediction.abstain else ""]
            cells.append(f"{prediction.shift_score:.3f}")
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if shared:
        console.print(Text(f"in {printable(shared)}"))
    console.print(table)
    console.print("entropy, MI (mutual information) and KL in nats", style="dim")


def _shared_folder(paths: Sequence[str]) -> str:
    """The directory above all paths, which would only push the answers off the screen; "" where there is none."""
    try:
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # some absolute, some relative
        return ""
    return shared if len(paths) > 1 and shared != os.sep else ""
