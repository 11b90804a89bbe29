"""Evil pictures, each with its expected answer: in this process, in training's loader, and through a running server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from PIL import Image
from tests.fuzz.evil import Evil, evil_pictures

from trivium.runtime.client import Client
from trivium.runtime.errors import InvalidPicture, InvalidRequest
from trivium.runtime.predictor import Predictor
from trivium.runtime.preprocess import open_picture, prepare

if TYPE_CHECKING:
    from tests.integration.conftest import ServerProcess

EVIL = evil_pictures()
MEMORY_MB = 64
"""What a server may grow by when it has met all of them before."""


@pytest.mark.parametrize("name", EVIL)
def test_the_picture_or_the_line(name: str) -> None:
    evil = EVIL[name]
    if evil.pixels is None:
        with pytest.raises(InvalidPicture, match=evil.line) as caught:
            open_picture(evil.data)
        assert str(caught.value).isprintable()
        return
    picture = open_picture(evil.data)
    assert picture.mode == "RGB"
    found = np.asarray(picture)
    assert found.shape == evil.pixels.shape
    assert np.abs(found.astype(int) - evil.pixels).max() <= evil.tolerance


def test_training_reads_files_as_serving_does(tmp_path: Path) -> None:
    sources = pytest.importorskip("trivium.train.data.sources", reason="pip install 'trivium[train]'")
    for number, (name, evil) in enumerate(EVIL.items()):
        path = tmp_path / f"{number}.png"
        path.write_bytes(evil.data)
        if evil.pixels is None:
            assert sources.fault(path), name
        else:
            assert sources.fault(path) is None, name
            np.testing.assert_array_equal(sources.open_file(path), np.asarray(open_picture(evil.data)), name)


def test_a_server_gives_each_its_answer_and_stays_as_it_is(server: ServerProcess, tiny_bundle: Path) -> None:
    predictor = Predictor.load(tiny_bundle)
    process = psutil.Process(server.process.pid)
    with Client(server.url, "tiny", "1") as client:
        for name, evil in EVIL.items():
            _check(client, predictor, name, evil)
        before = process.memory_info().rss
        refused = server.metric("trivium_requests_total", model="tiny", code="INVALID_ARGUMENT")

        def ask() -> None:
            for name, evil in EVIL.items():
                _check(client, predictor, name, evil)

        failures: list[BaseException] = []

        def guarded() -> None:
            try:
                ask()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        assert client.ready()
    assert process.memory_info().rss - before < MEMORY_MB << 20
    bad = sum(evil.pixels is None for evil in EVIL.values())
    assert server.metric("trivium_requests_total", model="tiny", code="INVALID_ARGUMENT") == refused + 3 * bad


def test_one_evil_picture_in_a_request_is_named(server: ServerProcess) -> None:
    good = EVIL["rgb.png"].data
    with (
        Client(server.url, "tiny", "1") as client,
        pytest.raises(InvalidRequest, match="picture 1: the picture is empty"),
    ):
        client.predict([good, b"", good])


def _check(client: Client, predictor: Predictor, name: str, evil: Evil) -> None:
    if evil.pixels is None:
        # INVALID_ARGUMENT, as the client's error says, with the line that stands above
        with pytest.raises(InvalidRequest, match=(evil.line or "").removeprefix("^")):
            client.predict([evil.data])
        return
    answer = client.predict([evil.data])[0]
    expected = predictor.infer(prepare(open_picture(evil.data), predictor.manifest.preprocessing))
    assert answer.probabilities.tobytes() == expected.probabilities.tobytes(), name
    if evil.tolerance == 0:
        reference = predictor.infer(prepare(Image.fromarray(evil.pixels), predictor.manifest.preprocessing))
        assert answer.probabilities.tobytes() == reference.probabilities.tobytes(), name
