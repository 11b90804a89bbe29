"""The same job by torch-uncertainty and baal, in an environment of their own, beside one prediction of ours.

Peers run the whole network T times; they are given one head, a third of our job. Run as a script, this file is what
their environment executes: it knows nothing of trivium.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

PASSES = 32
PACKAGES = ("torch-uncertainty==0.13.0", "lightning", "baal==2.1.0")
ROUNDS = 3


def compare(out: Path) -> str:
    """Time the peers and our fused prediction in one run; writes out/peers.json and returns the table."""
    ours = predict_ms(out / "models")
    python = environment(out / "peers-venv")
    result = subprocess.run(
        [str(python), str(Path(__file__)), str(PASSES)], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"the peers failed: {result.stderr.strip().splitlines()[-1:]}")
    theirs: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    # Once more behind them, so that a machine that changed its pace meanwhile shows.
    ours = max(ours, predict_ms(out / "models"))
    rows = [{"setting": name, "cpu_ms": ms, "times_ours": ms / ours} for name, ms in theirs.items()]
    document = {"model": "EfficientNet-Lite0", "batch": 1, "passes": PASSES, "trivium_ms": ours, "rows": rows}
    (out / "peers.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = [f"| EfficientNet-Lite0, B 1, T {PASSES}, C 1000 | CPU ms | times ours |", "|---|---|---|"]
    lines.append(f"| trivium, three heads, fused | {ours:.1f} | 1 |")
    lines += [f"| {row['setting']}, one head | {row['cpu_ms']:.0f} | {row['times_ours']:.0f} |" for row in rows]
    return "\n".join(lines)


def predict_ms(folder: Path) -> float:
    """Our backbone and fused heads, from picture to statistics."""
    from . import kernels

    rows = kernels.measure("EfficientNet-Lite0", 1000, 1, [PASSES], 9, folder, ["fused float32"])
    fused = next(row for row in rows if row.variant == "fused float32")
    return fused.backbone_ms + fused.cpu_ms


def environment(folder: Path) -> Path:
    """A virtual environment with the peers that borrows torch from ours; returns its interpreter."""
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=True).stdout.strip()
        Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / ".complete").touch()
    return python


def main() -> None:
    """Print {setting: CPU ms} as the last line."""
    import timm
    import torch
    from torch import nn

    passes = int(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def network() -> Any:
        backbone = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        return nn.Sequential(backbone, nn.Dropout(0.5), nn.Linear(1280, 1000)).eval()

    image = torch.randn(1, 3, 224, 224)
    settings: dict[str, Callable[[], Any]] = {}

    dropout = import_module("baal.bayesian.dropout")
    for name, (call, shape) in baal_settings(dropout.MCDropoutModule(network()), image, passes).items():
        assert call().shape == shape, name
        settings[name] = call

    mc_dropout = import_module("torch_uncertainty.methods.mc_dropout").mc_dropout
    for on_batch in (True, False):
        model = mc_dropout(network(), num_estimators=passes, on_batch=on_batch).eval()
        name = f"torch-uncertainty, on_batch={on_batch}"
        with torch.no_grad():
            assert model(image).shape == (passes, 1000), name
        settings[name] = partial(model, image)

    times: dict[str, list[float]] = {name: [] for name in settings}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, call in settings.items():
                start = time.thread_time()
                call()
                times[name].append((time.thread_time() - start) * 1e3)
    print(json.dumps({name: statistics.median(values) for name, values in times.items()}))


def baal_settings(model: Any, image: Any, passes: int) -> dict[str, tuple[Callable[[], Any], tuple[int, ...]]]:
    """baal's wrapper with the passes as one batch and as a loop: name -> (call, shape of its answer)."""
    baal = import_module("baal.modelwrapper")
    wrapper = baal.ModelWrapper(model, baal.TrainingArgs(use_cuda=False, replicate_in_memory=True))
    loop = baal.ModelWrapper(model, baal.TrainingArgs(use_cuda=False, replicate_in_memory=False))
    return {
        "baal, one batch": (lambda: wrapper.predict_on_batch(image, iterations=passes), (1, 1000, passes)),
        "baal, a loop": (lambda: loop.predict_on_batch(image, iterations=passes), (1, 1000, passes)),
    }


if __name__ == "__main__":
    main()
