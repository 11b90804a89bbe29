"""Models that come, change and go while a server runs, and bad ones that change nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trivium.runtime.bundle import read_manifest, seal
from trivium.runtime.client import Client
from trivium.runtime.errors import TriviumError
from trivium.runtime.predictor import Predictor

if TYPE_CHECKING:
    from tests.integration.conftest import Serve, ServerProcess

Build = Callable[..., Path]
PICTURE = np.full((32, 32, 3), 99, np.uint8)
BAD_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A model file in a folder disk-fails-N fails as on a broken disk when it is read for the Nth time: 1000 bytes come,
   then EIO. In disk-changes-N it gets another time of change then. In disk-denies it cannot be opened. */

static int times[2][10];

ssize_t read(int fd, void *buffer, size_t size) {
    static ssize_t (*real)(int, void *, size_t);
    char link[64], path[4096];
    if (!real) real = (ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    const char *fails = strstr(path, "/disk-fails-"), *changes = strstr(path, "/disk-changes-");
    if ((!fails && !changes) || !strstr(path, "/model.onnx")) return real(fd, buffer, size);
    int wanted = fails ? fails[12] - '0' : changes[14] - '0', start = lseek(fd, 0, SEEK_CUR) == 0;
    int *time = &times[!fails][wanted];
    *time += start;
    if (*time != wanted) return real(fd, buffer, size);
    if (changes) {
        if (start) futimens(fd, NULL);
        return real(fd, buffer, size);
    }
    if (start) return real(fd, buffer, size < 1000 ? size : 1000);
    errno = EIO;
    return -1;
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, mode_t) = (int (*)(const char *, int, mode_t))dlsym(RTLD_NEXT, name);
    if (!strstr(path, "/disk-denies/") || !strstr(path, "/model.onnx")) return real(path, flags, mode);
    errno = EACCES;
    return -1;
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened("open64", path, flags, mode);
}
"""


@pytest.fixture(scope="module")
def bad_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process to which the disk does what the names of folders say."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("a C compiler makes the library that lets reads fail")
    root = tmp_path_factory.mktemp("disk")
    (root / "disk.c").write_text(BAD_DISK)
    library = root / "disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, root / "disk.c", "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


class Models:
    """The repository's side of a server."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.channel = grpc.insecure_channel(server.url)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def index(self, **fields: Any) -> dict[tuple[str, str], tuple[str, str]]:
        found = self.stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(**fields))
        return {(one.name, one.version): (one.state, one.reason) for one in found.models}

    def state(self, name: str, version: str) -> str:
        return self.index().get((name, version), ("", ""))[0]

    def wait_for(self, name: str, version: str, state: str) -> None:
        self.server.wait_until(lambda: self.state(name, version) == state)

    def load(self, name: str, **fields: Any) -> None:
        self.stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=name, **fields))

    def unload(self, name: str, **fields: Any) -> None:
        self.stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name=name, **fields))

    def health(self, name: str) -> int:
        return int(health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(service=name)).status)

    def served(self, name: str) -> str:
        """The version that answers."""
        message = service_pb2.ModelInferRequest(model_name=name, raw_input_contents=[PICTURE.tobytes()])
        message.inputs.add(name="image", datatype="UINT8", shape=[1, 32, 32, 3])
        return str(self.stub.ModelInfer(message).model_version)


@pytest.fixture
def models(serve: Serve) -> Iterator[Callable[..., Models]]:
    """models("--flag", value, ...) starts a server and gives its repository's side."""
    started: list[Models] = []

    def start(*arguments: object, environment: dict[str, str] | None = None) -> Models:
        started.append(Models(serve(*arguments, "--instances", "2", environment=environment)))
        return started[-1]

    yield start
    for one in started:
        one.channel.close()


def publish(bundle: Path, target: Path) -> None:
    """Copy elsewhere, then appear all at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}"
    shutil.copytree(bundle, part)
    if target.exists():
        target.rename(target.parent / f".old-{target.name}")
    part.rename(target)


def with_wrong_digest(bundle: Path) -> Path:
    model = bytearray((bundle / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(model)
    return bundle


def with_wrong_answers(bundle: Path) -> Path:
    """Whole by its digests, but not the model that was exported."""
    with np.load(bundle / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["probabilities"] = np.roll(arrays["probabilities"], 1, axis=-1)
    np.savez(bundle / "golden.npz", **arrays)
    seal(bundle, read_manifest(bundle))
    return bundle


@contextmanager
def asking(url: str, model: str, expected: set[bytes]) -> Iterator[list[str]]:
    """Clients that ask all the time; what went wrong is in the list in the end."""
    wrong: list[str] = []
    end = threading.Event()

    def fault(client: Client) -> list[str]:
        try:
            (answer,) = client.predict([PICTURE])
        except TriviumError as error:
            return [repr(error)]
        return [] if answer.probabilities.tobytes() in expected else ["another answer"]

    def ask() -> None:
        # without retries, so that nothing is glossed over
        with Client(url, model, retries=False) as client:
            while not end.wait(0.005):
                wrong.extend(fault(client))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        end.set()
        for thread in threads:
            thread.join(30)


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert "\n" not in error.details()
    return error.code().name, error.details()


def test_bad_versions_leave_the_old_one_serving(
    models: Callable[..., Models], tiny_bundle: Path, build_bundle: Build, bad_disk: dict[str, str], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    publish(tiny_bundle, repository / "tiny" / "1")
    running = models("--repository", repository, "--watch", environment=bad_disk)
    server = running.server
    expected = {Predictor.load(tiny_bundle).infer(PICTURE).probabilities.tobytes()}
    with asking(server.url, "tiny", expected) as wrong:
        publish(with_wrong_digest(build_bundle(tmp_path / "b2", version="2")), repository / "tiny" / "2")
        running.wait_for("tiny", "2", "UNAVAILABLE")
        publish(with_wrong_answers(build_bundle(tmp_path / "b3", version="3")), repository / "tiny" / "3")
        running.wait_for("tiny", "3", "UNAVAILABLE")
        broken = build_bundle(tmp_path / "disk-fails-1" / "4", version="4")
        (repository / "tiny" / "4").symlink_to(broken)
        running.wait_for("tiny", "4", "UNAVAILABLE")
        index = running.index()
        assert index["tiny", "1"] == ("READY", "")
        assert "SHA-256 differs" in index["tiny", "2"][1]
        assert "self-test: probabilities differs" in index["tiny", "3"][1]
        assert "cannot be read: Input/output error" in index["tiny", "4"][1]
        log = server.log.read_text()
        for reason in ("DigestMismatch", "EngineError", "MissingFile"):
            assert server.metric("trivium_loads_total", model="tiny", outcome="refused", reason=reason) == 1
            assert f"refused: {reason}: " in log
        assert "; version 1 serves on" in log
        assert running.health("tiny") == 1
        assert running.served("tiny") == "1"

        publish(build_bundle(tmp_path / "b5", version="5"), repository / "tiny" / "5")
        running.wait_for("tiny", "5", "READY")
        server.wait_until(lambda: "drained and unloaded model=tiny version=1" in server.log.read_text())
        assert running.served("tiny") == "5"
        assert running.index()["tiny", "1"] == ("UNAVAILABLE", "newer versions are served")
        # the newest is taken away: the one before it comes back
        (repository / "tiny" / "5").rename(tmp_path / "away")
        running.wait_for("tiny", "1", "READY")
        assert running.served("tiny") == "1"
        # and the last one stays, whatever becomes of its directory
        shutil.rmtree(repository / "tiny")
        server.wait_until(lambda: server.metric("trivium_loads_total", model="tiny", outcome="unloaded") == 2)
    assert wrong == []
    assert running.served("tiny") == "1"
    assert server.metric("trivium_loads_total", model="tiny", outcome="loaded") == 3


def test_every_kind_of_bad_bundle_is_refused_with_its_reason(
    models: Callable[..., Models], tiny_bundle: Path, build_bundle: Build, bad_disk: dict[str, str], tmp_path: Path
) -> None:
    good = build_bundle(tmp_path / "good", version="2")

    def cut_short(root: Path, name: str) -> None:
        os.truncate(root / name, (root / name).stat().st_size // 2)

    def rewrite(root: Path, **changes: object) -> None:
        document = json.loads((root / "manifest.json").read_text())
        (root / "manifest.json").write_text(json.dumps(document | changes))

    def swap_weights(root: Path) -> None:
        """Whole by its digests, but one weight tensor is another model's."""
        onnx = pytest.importorskip("onnx")
        model = onnx.load(root / "model.onnx")
        kernel = next(one for one in model.graph.initializer if one.name == "kernel")
        values = onnx.numpy_helper.to_array(kernel)[::-1]
        kernel.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), "kernel"))
        onnx.save(model, root / "model.onnx")
        seal(root, read_manifest(root))

    def leave(root: Path) -> None:
        """What its folder's name does to it is enough."""

    cases: list[tuple[str, Callable[[Path], Any], str, str]] = [
        ("a", with_wrong_digest, "DigestMismatch", "model.onnx: SHA-256 differs"),
        ("a", with_wrong_answers, "EngineError", "self-test: probabilities differs"),
        ("a", swap_weights, "EngineError", "self-test: probabilities differs"),
        ("a", lambda root: cut_short(root, "model.onnx"), "DigestMismatch", "bytes, the manifest says"),
        ("a", lambda root: cut_short(root, "manifest.json"), "ManifestError", "no valid JSON"),
        ("a", lambda root: (root / "golden.npz").unlink(), "MissingFile", "golden.npz: missing"),
        ("a", lambda root: (root / "more").touch(), "ExtraFile", "more: not listed"),
        ("a", lambda root: rewrite(root, schema_version=2), "UnknownSchema", "schema version 2"),
        ("a", lambda root: rewrite(root, name="other"), "ManifestError", "'other', expected 'tiny'"),
        ("a", lambda root: rewrite(root, version="9"), "ManifestError", "version 9, its folder 2"),
        ("disk-denies", leave, "MissingFile", "cannot be read: Permission denied"),
        ("disk-fails-1", leave, "MissingFile", "cannot be read: Input/output error"),
        # when it is searched for weights elsewhere, and when ONNX Runtime reads it
        ("disk-fails-2", leave, "UnsafePath", "Input/output error"),
        ("disk-fails-3", leave, "EngineError", "ONNX Runtime cannot load it"),
        ("disk-changes-3", leave, "DigestMismatch", "changed while it was loaded"),
    ]
    repository = tmp_path / "repository"
    publish(tiny_bundle, repository / "tiny" / "1")
    running = models("--repository", repository, environment=bad_disk)
    expected = {Predictor.load(tiny_bundle).infer(PICTURE).probabilities.tobytes()}
    counts: Counter[str] = Counter()
    with asking(running.server.url, "tiny", expected) as wrong:
        for number, (folder, spoil, kind, reason) in enumerate(cases):
            bundle = Path(shutil.copytree(good, tmp_path / str(number) / folder / "bundle"))
            spoil(bundle)
            (repository / "tiny" / "2").symlink_to(bundle)
            code, text = refused(lambda: running.load("tiny"))
            assert code == ("INTERNAL" if kind == "EngineError" else "FAILED_PRECONDITION"), text
            assert reason in text
            state, why = running.index()["tiny", "2"]
            assert (state, why) == ("UNAVAILABLE", text)
            assert running.index()["tiny", "1"] == ("READY", "")
            counts[kind] += 1
            metric = {"model": "tiny", "outcome": "refused", "reason": kind}
            assert running.server.metric("trivium_loads_total", **metric) == counts[kind]
            assert running.server.log.read_text().count(f"refused: {kind}: ") == counts[kind]
            (repository / "tiny" / "2").unlink()
            running.load("tiny")
        publish(good, repository / "tiny" / "2")
        running.load("tiny")
        assert running.served("tiny") == "2"
    assert wrong == []
    assert running.server.log.read_text().count("; version 1 serves on") == len(cases)


def test_a_named_bundle_is_followed_through_its_link(
    models: Callable[..., Models], tiny_bundle: Path, build_bundle: Build, tmp_path: Path
) -> None:
    current = tmp_path / "current"
    current.symlink_to(tiny_bundle)

    def turn_to(bundle: Path) -> None:
        (tmp_path / "next").symlink_to(bundle)
        (tmp_path / "next").replace(current)

    running = models(current, "--watch")
    expected = {Predictor.load(tiny_bundle).infer(PICTURE).probabilities.tobytes()}
    with asking(running.server.url, "tiny", expected) as wrong:
        turn_to(build_bundle(tmp_path / "b2", version="2"))
        running.wait_for("tiny", "2", "READY")
        turn_to(with_wrong_digest(build_bundle(tmp_path / "b3", version="3")))
        running.server.wait_until(lambda: "SHA-256" in running.index()["tiny", "2"][1])
        turn_to(build_bundle(tmp_path / "other", name="other"))
        running.server.wait_until(lambda: "'other', expected 'tiny'" in running.index()["tiny", "2"][1])
        current.unlink()
    assert wrong == []
    assert running.index() == {("tiny", "2"): ("READY", running.index()["tiny", "2"][1])}
    assert running.served("tiny") == "2"


def test_load_and_unload(models: Callable[..., Models], tiny_bundle: Path, build_bundle: Build, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish(tiny_bundle, repository / "tiny" / "1")
    running = models("--repository", repository, "--keep-versions", 2)
    for version in ("2", "3"):
        publish(build_bundle(tmp_path / version, version=version), repository / "tiny" / version)
    assert running.index() == {("tiny", "1"): ("READY", "")}
    running.load("tiny")
    assert {version: state for (_, version), (state, _) in running.index().items()} == {
        "1": "UNAVAILABLE", "2": "READY", "3": "READY",
    }  # fmt: skip
    assert set(running.index(ready=True)) == {("tiny", "2"), ("tiny", "3")}
    before = running.server.metric("trivium_loads_total", outcome="loaded")
    running.load("tiny")
    assert running.server.metric("trivium_loads_total", outcome="loaded") == before

    publish(with_wrong_answers(build_bundle(tmp_path / "4", version="4")), repository / "tiny" / "4")
    code, text = refused(lambda: running.load("tiny"))
    assert code == "INTERNAL"
    assert text.startswith("self-test: ")
    assert running.served("tiny") == "3"

    running.unload("tiny")
    assert refused(lambda: running.served("tiny"))[0] == "NOT_FOUND"
    assert set(running.index().values()) == {("UNAVAILABLE", "unloaded")}
    assert running.health("tiny") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert running.server.get("/readyz")[0] == 200
    running.server.wait_until(lambda: running.server.metric("trivium_loads_total", outcome="unloaded") == 3)
    assert running.server.metric("trivium_engine_info") == 0
    shutil.rmtree(repository / "tiny" / "4")
    running.load("tiny")
    assert running.served("tiny") == "3"
    assert running.health("tiny") == health_pb2.HealthCheckResponse.SERVING

    assert refused(lambda: running.load("nobody"))[0] == "NOT_FOUND"
    assert refused(lambda: running.unload("nobody"))[0] == "NOT_FOUND"
    assert refused(lambda: running.load("tiny", repository_name="x"))[0] == "INVALID_ARGUMENT"
    assert refused(lambda: running.index(repository_name="x"))[0] == "INVALID_ARGUMENT"
    override = {"config": service_pb2.ModelRepositoryParameter(string_param="{}")}
    assert refused(lambda: running.load("tiny", parameters=override))[0] == "INVALID_ARGUMENT"


def test_what_was_accepted_is_answered_after_unload(models: Callable[..., Models], slow_bundle: Path) -> None:
    running = models(slow_bundle)
    pictures = np.full((60, 32, 32, 3), 99, np.uint8)
    message = service_pb2.ModelInferRequest(model_name="slow", raw_input_contents=[pictures.tobytes()])
    message.inputs.add(name="image", datatype="UINT8", shape=pictures.shape)
    calls = [running.stub.ModelInfer.future(message) for _ in range(4)]
    running.server.wait_until(lambda: running.server.metric("trivium_in_flight_requests") == len(calls))
    running.unload("slow")
    assert refused(lambda: running.served("slow"))[0] == "NOT_FOUND"
    assert running.server.metric("trivium_loads_total", outcome="unloaded") == 0
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    running.server.wait_until(lambda: running.server.metric("trivium_loads_total", outcome="unloaded") == 1)


def test_reloads_all_the_time_lose_nothing(
    models: Callable[..., Models], tiny_bundle: Path, some_pictures: NDArray[np.uint8], tmp_path: Path
) -> None:
    served = tmp_path / "served"
    shutil.copytree(tiny_bundle, served)
    running = models(served)
    expected = {Predictor.load(tiny_bundle).infer(PICTURE).probabilities.tobytes()}
    with asking(running.server.url, "tiny", expected) as wrong:
        for _ in range(6):
            (served / "manifest.json").touch()
            running.load("tiny")
    assert wrong == []
    assert running.server.metric("trivium_loads_total", outcome="loaded") == 7
    running.server.wait_until(lambda: running.server.metric("trivium_loads_total", outcome="unloaded") == 6)
    # a reload is no reason for a counter to start again
    assert running.server.metric("trivium_requests_total", model="tiny", code="OK") > 6


def test_a_start_takes_the_newest_version_that_loads(
    models: Callable[..., Models], tiny_bundle: Path, build_bundle: Build, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    publish(tiny_bundle, repository / "tiny" / "1")
    publish(with_wrong_digest(build_bundle(tmp_path / "2", version="2")), repository / "tiny" / "2")
    publish(tiny_bundle, repository / "tiny" / "10")
    for junk in ("tiny/next", "lost+found/1", "single/1"):
        (repository / junk).mkdir(parents=True)
    running = models("--repository", repository)
    assert running.server.ready["models"] == ["tiny/1"]
    index = running.index()
    assert set(index) == set(itertools.product(["tiny"], ["1", "2", "10"]))
    assert "the manifest says version 1, its folder 10" in index["tiny", "10"][1]
