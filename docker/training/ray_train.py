"""`trivium train` on the workers of a Ray cluster; after a failure they begin again and go on from the last epoch.

python ray_train.py --workers N [--gpu] [--failures N] -- RECIPE [options of trivium train]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(config: dict[str, Any]) -> None:
    """One process of the run; Ray has joined it to the others already."""
    from trivium.train.cli import main

    sys.argv = ["trivium train", *config["arguments"]]
    main()


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="processes, each with a card where there is --gpu")
    parser.add_argument("--gpu", action="store_true", help="on cards")
    parser.add_argument("--failures", type=int, default=3, help="how often to begin again (default 3)")
    parser.add_argument("--storage", help="where Ray keeps what it says of the run, a directory that all nodes share")
    parser.add_argument("arguments", nargs="+", metavar="ARGUMENT", help="what trivium train is called with")
    asked = parser.parse_args()
    trainer = TorchTrainer(
        work,
        train_loop_config={"arguments": asked.arguments},
        # trivium adds up numbers on the CPU as well
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if asked.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=asked.workers, use_gpu=asked.gpu),
        run_config=RunConfig(storage_path=asked.storage, failure_config=FailureConfig(max_failures=asked.failures)),
    )
    trainer.fit()


if __name__ == "__main__":
    run()
