"""`trivium train`: run a recipe or a preset."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from rich.console import Console

from .distributed import joined
from .pipeline import train
from .recipe import load_recipe, presets


def main() -> None:
    """Parse sys.argv and train.

    Raises: TriviumError, which trivium.runtime.cli turns into one line.
    """
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description="Train a robust student: original classifier, teacher, three heads. An interrupted run goes on "
        "where it stopped; stages whose part of the recipe did not change are not repeated. On several cards or "
        "machines: torchrun --nproc-per-node N -m trivium train ...",
    )
    parser.add_argument("recipe", help=f"a YAML file or a preset: {', '.join(presets())}")
    parser.add_argument(
        "--set", dest="settings", metavar="KEY=VALUE", action="append", default=[],
        help="change a setting, such as --set student.schedule.epochs=3; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the run goes (default: runs/NAME)")
    parser.add_argument(
        "--reuse", type=Path, metavar="RUN", action="append", default=[],
        help="copy stages that this run finished with the same settings on the same data; may be repeated",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="same as --set seed=N")
    parser.add_argument("--print-recipe", action="store_true", help="print the whole recipe and stop")
    arguments = parser.parse_args()
    with joined():
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    settings = [*arguments.settings, *([] if arguments.seed is None else [f"seed={arguments.seed}"])]
    recipe = load_recipe(arguments.recipe, settings)
    if arguments.print_recipe:
        print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        return
    train(recipe, arguments.out or Path("runs") / recipe.name, Console(), arguments.reuse)
