"""A real server's log of answers, joined with labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import pictures

from trivium.runtime.client import Client
from trivium.runtime.feedback import join, read_answers, read_labels

if TYPE_CHECKING:
    from tests.integration.conftest import Serve


def test_what_the_server_logged_is_what_it_answered(serve: Serve, guaranteed_bundle: Path, tmp_path: Path) -> None:
    server = serve(guaranteed_bundle, "--access-log", "--log-format", "json")
    images = list(pictures(12, seed=3))
    with Client(server.url) as client:
        several = client.predict(images[:10], request_id="several")
        (one,) = client.predict(images[10], request_id="one", router="robust", coverage=0.97, max_risk=0.3)
        client.predict(images[11])
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    first, second, third = (line for line in lines if line["logger"] == "trivium.access")
    assert first["class_id"] == [answer.class_id for answer in several]
    sets = [answer.prediction_set for answer in several if answer.prediction_set is not None]
    assert first["prediction_set"] == [own.nonzero()[0].tolist() for own in sets]
    assert first["abstain"] == [answer.abstain for answer in several]
    assert len(first["shift_score"]) == 10
    assert (first["router"], first["coverage"], first["max_risk"], first["version"]) == ("blend", 0.9, 0.2, "1")
    assert (second["router"], second["coverage"], second["max_risk"]) == ("robust", 0.97, 0.3)
    assert second["class_id"] == [one.class_id]

    labels = [{"id": "several", "labels": first["class_id"]}, {"id": "one", "label": (one.class_id + 1) % 10}]
    (tmp_path / "labels").write_text("\n".join(map(json.dumps, labels)))
    report = join(read_answers([server.log]), read_labels(tmp_path / "labels", None), 0.95, 86400.0)
    assert (report.labelled, report.without_label, report.without_answer) == (11, 1, 0)
    found = {(row.measure, row.promise): (row.pictures, row.share) for row in report.rows}
    assert found["accuracy", None] == (11, 10 / 11)
    # the answer is in its own set
    assert found["coverage", 0.9] == (10, 1.0)
    assert found["coverage", 0.97][0] == 1
    assert third["request_id"] not in ("several", "one")
