"""The CPU benchmark of the kernels: python -m tests.bench [--peers] writes build/bench/kernels.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from trivium.kernels import backend

from . import kernels, models, peers

OUT = Path(__file__).parents[2] / "build" / "bench"
ROUNDS = {"EfficientNet-Lite0": 15, "ResNet-50": 9, "ViT-B/16": 5}
"""At batch 1; a third of them at larger ones."""
FEW_CLASSES = (2, 10, 100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=models.BACKBONES, default=list(models.BACKBONES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--passes", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--rounds", type=int, help="instead of what suits each model")
    parser.add_argument("--peers", action="store_true", help="torch-uncertainty and baal too, in their own environment")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()

    print(f"instruction set {backend()}, one thread, medians of thread CPU time")
    folder = arguments.out / "models"
    rows: list[kernels.Row] = []
    for title in arguments.models:
        for batch in arguments.batches:
            rounds = arguments.rounds or (ROUNDS[title] if batch == 1 else max(3, ROUNDS[title] // 3))
            part = kernels.measure(title, 1000, batch, arguments.passes, rounds, folder)
            print(kernels.table(part), flush=True)
            rows += part
    if "EfficientNet-Lite0" in arguments.models:
        rounds = arguments.rounds or ROUNDS["EfficientNet-Lite0"]
        for classes in FEW_CLASSES:
            part = kernels.measure("EfficientNet-Lite0", classes, 1, [32], rounds, folder)
            print(kernels.table(part), flush=True)
            rows += part
    kernels.write(rows, arguments.out / "kernels.json")
    print(kernels.summary(rows))
    print(f"written: {arguments.out / 'kernels.json'}")
    if arguments.peers:
        print(peers.compare(arguments.out), flush=True)


if __name__ == "__main__":
    main()
