"""A real server raises the alarm under a corrupted stream, and is quiet under a clean one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.conftest import pictures, tiny_guarantees

from trivium.runtime.client import Client
from trivium.runtime.drift import BLOCK
from trivium.runtime.predictor import Predictor

if TYPE_CHECKING:
    from tests.integration.conftest import Serve

STATISTICS = {"predictive_entropy", "mutual_information", "divergence", "energy", "class_id"}
BATCH = 50


@pytest.fixture(scope="module")
def watched_bundle(tiny_bundle: Path, build_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, with histograms of 1,000 pictures such as a server is then asked about."""
    from trivium.train.guarantees.drift_reference import drift_reference

    predictor = Predictor.load(tiny_bundle)
    tuning, calibration = (predictor.engine.run(pictures(1000, seed=seed)) for seed in (101, 102))
    reference = drift_reference(tuning, calibration, predictor.manifest)
    guarantees = tiny_guarantees(drift=reference.model_dump())
    path: Path = build_bundle(tmp_path_factory.mktemp("watched") / "bundle", guarantees=guarantees)
    return path


def ask(client: Client, stream: NDArray[np.uint8]) -> None:
    for start in range(0, len(stream), BATCH):
        client.predict(list(stream[start : start + BATCH]))


def test_alarm_and_index_follow_the_stream(serve: Serve, watched_bundle: Path) -> None:
    server = serve(watched_bundle, "--drift-window", 2 * BLOCK)
    with Client(server.url) as client:
        ask(client, pictures(4 * BLOCK, seed=103))
        server.wait_until(lambda: server.metric("trivium_drift_window_pictures", model="tiny") == 2 * BLOCK)
        assert server.metric("trivium_drift_alarm", model="tiny", version="1") == 0
        assert server.metric("trivium_drift_alarms_total", model="tiny", version="1") == 0
        assert server.metric("trivium_drift_psi", model="tiny", statistic="energy") < 0.2
        shown = {dict(labels)["statistic"] for name, labels in server.metrics() if name == "trivium_drift_psi"}
        assert shown == STATISTICS

        # a fifth without contrast, as through a fogged lens
        stream = pictures(2000, seed=104)
        stream[::5] = 160 + stream[::5] // 8
        ask(client, stream)
        server.wait_until(lambda: server.metric("trivium_drift_alarm", model="tiny", version="1") == 1)
        assert server.metric("trivium_drift_alarms_total", model="tiny", version="1") >= 1
    assert "drift: pictures are unlike the calibration pictures" in server.log.read_text()
