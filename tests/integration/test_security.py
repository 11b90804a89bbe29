"""TLS, mutual TLS, tokens and who may use the repository API: for every rpc, right, wrong, expired and missing."""

from __future__ import annotations

import hashlib
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.integration.fire import http2
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trivium.runtime.client import Client
from trivium.runtime.errors import ConfigError, TriviumError, Unauthenticated, Unavailable
from trivium.runtime.security import RULES, Guard, Rule, Tokens, loopback

if TYPE_CHECKING:
    from tests.integration.conftest import Serve, ServerProcess

METHODS = {
    f"/{service.full_name}/{method.name}": (method, getattr(module, method.input_type.name))
    for module, name in (
        (service_pb2, "GRPCInferenceService"), (health_pb2, "Health"), (reflection_pb2, "ServerReflection")
    )
    for service in [module.DESCRIPTOR.services_by_name[name]]
    for method in service.methods
}  # fmt: skip
DENIED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
PICTURE = np.zeros((32, 32, 3), np.uint8)


def code(channel: grpc.Channel, path: str, token: str | None = None) -> str:
    """The status of an rpc with an empty request; of a stream, of its first answer."""
    method, message = METHODS[path]
    request = message()
    kind = "_".join("stream" if one else "unary" for one in (method.client_streaming, method.server_streaming))
    call: Any = getattr(channel, kind)(path, message.SerializeToString)
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    try:
        answer = call(iter([request]) if method.client_streaming else request, timeout=10, metadata=metadata)
        if method.server_streaming:
            next(answer)
            answer.cancel()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def refused(*arguments: object) -> str:
    """The last line of a server that does not start, without a traceback."""
    command = [sys.executable, "-m", "trivium", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def line(token: str, name: str, *words: str) -> str:
    return " ".join([hashlib.sha256(token.encode()).hexdigest(), name, *words]) + "\n"


def test_every_rpc_has_a_rule(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.url) as channel:
        call: Any = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        (answer,) = call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    served = {service.name for service in answer.list_services_response.service}
    assert served == {path.split("/")[1] for path in METHODS}
    assert set(METHODS) == set(RULES)


def test_a_service_with_an_rpc_without_a_rule_is_not_served() -> None:
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    with pytest.raises(KeyError, match="GRPCInferenceService/New"):
        Guard(None, {}).handlers("inference.GRPCInferenceService", {"New": handler})


@pytest.fixture(scope="module")
def guarded(
    tiny_bundle: Path, server_process: type[ServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, Path]]:
    root = tmp_path_factory.mktemp("guarded")
    tokens = root / "tokens"
    tokens.write_text("# who may call\n" + line("right", "alice") + line("chief", "bob", "admin"))
    running = server_process(root, tiny_bundle, "--tokens", tokens, "--log-level", "debug", "--access-log")
    yield running, tokens
    assert running.stop() == 0


@pytest.mark.parametrize("path", sorted(METHODS))
def test_tokens(guarded: tuple[ServerProcess, Path], path: str) -> None:
    with grpc.insecure_channel(guarded[0].url) as channel:
        right, chief, wrong, missing = (code(channel, path, token) for token in ("right", "chief", "wrong", None))
    assert chief not in DENIED
    if RULES[path] is Rule.PROBE:
        assert not {right, wrong, missing} & DENIED
    else:
        assert wrong == missing == "UNAUTHENTICATED"
        assert (right == "PERMISSION_DENIED") == (RULES[path] is Rule.ADMIN)


def test_tokens_of_the_client_and_their_reload(guarded: tuple[ServerProcess, Path]) -> None:
    server, tokens = guarded
    with Client(server.url, "tiny", token="right") as client:
        assert len(client.predict([PICTURE])) == 1
    # who may list the models need not name one
    with Client(server.url, token="chief") as client:
        assert len(client.predict([PICTURE])) == 1
    with Client(server.url, token="right") as client, pytest.raises(ConfigError, match="name one"):
        client.predict([PICTURE])
    denied = server.metric("trivium_denied_total", code="UNAUTHENTICATED")
    with Client(server.url, "tiny") as client:
        assert client.ready()
        with pytest.raises(Unauthenticated, match="needs a token"):
            client.predict([PICTURE])
    assert server.metric("trivium_denied_total", code="UNAUTHENTICATED") == denied + 1

    before = tokens.read_text()
    tokens.write_text(before + line("later", "carol"))
    time.sleep(1.1)
    with Client(server.url, "tiny", token="later") as client:
        assert len(client.predict([PICTURE])) == 1
        tokens.write_text(before + "a secret that was not hashed\n")
        time.sleep(1.1)
        # a file that cannot be used changes nothing
        assert len(client.predict([PICTURE])) == 1
        tokens.write_text(before)
        time.sleep(1.1)
        with pytest.raises(Unauthenticated, match="not known"):
            client.predict([PICTURE])
    log = server.log.read_text()
    assert "line 4: expected a SHA-256" in log
    assert "RepositoryIndex called by bob" in log
    for secret in ("right", "chief", "wrong", "later", "a secret"):
        assert secret not in log


def test_token_files(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("\n" + line("one", "alice") + line("two", "bob", "admin"))
    tokens = Tokens(file)
    found = [tokens.find(token) for token in (b"one", b"two", b"three", b"")]
    assert [holder and (holder.name, holder.admin) for holder in found] == [
        ("alice", False), ("bob", True), None, None,
    ]  # fmt: skip
    for content, text in (("", "no token"), ("secret alice\n", "line 1"), (line("a", "b", "root"), "line 1")):
        file.write_text(content)
        with pytest.raises(ConfigError, match=text) as caught:
            Tokens(file)
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        Tokens(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("peer", "here"),
    [
        ("ipv4:127.0.0.1:4711", True),
        ("ipv4:127.9.9.9:1", True),
        ("ipv6:[::1]:4711", True),
        ("ipv6:%5B::1%5D:4711", True),
        ("ipv6:[::ffff:127.0.0.1]:1", True),
        ("unix:", True),
        ("ipv4:10.0.0.1:127", False),
        ("ipv6:[::ffff:10.0.0.1]:1", False),
        ("ipv6:[fe80::1%25eth0]:1", False),
        ("ipv4:localhost:1", False),
        ("", False),
    ],
)
def test_loopback(peer: str, here: bool) -> None:
    assert loopback(peer) is here


def test_the_repository_is_closed_to_other_machines(serve: Serve, tiny_bundle: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    server = serve(tiny_bundle, "--host", "0.0.0.0")
    port = server.url.rpartition(":")[2]
    with grpc.insecure_channel(f"{address}:{port}") as far, grpc.insecure_channel(f"127.0.0.1:{port}") as near:
        for path, rule in RULES.items():
            if path in METHODS:
                assert (code(far, path) == "PERMISSION_DENIED") == (rule is Rule.ADMIN), path
                assert code(near, path) not in DENIED, path
    with Client(f"{address}:{port}") as client, pytest.raises(ConfigError, match="name one"):
        client.predict([PICTURE])
    with Client(f"{address}:{port}", "tiny") as client:
        assert len(client.predict([PICTURE])) == 1


class Authority:
    """A certificate authority of the openssl command line; each certificate is for localhost and 127.0.0.1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        (root / "index").touch()
        (root / "serial").write_text("01\n")
        (root / "ca.cnf").write_text(
            f"[ca]\ndefault_ca = own\n[own]\ndir = {root}\ndatabase = {root}/index\nserial = {root}/serial\n"
            f"new_certs_dir = {root}\ndefault_md = sha256\npolicy = any\nunique_subject = no\n"
            "x509_extensions = leaf\n[any]\ncommonName = supplied\n"
            "[leaf]\nsubjectAltName = DNS:localhost, IP:127.0.0.1\n"
        )
        self.ca, self._key = root / "ca.pem", root / "ca.key"
        self._openssl("req", "-x509", *self._fresh(self._key), "-out", self.ca, "-subj", "/CN=authority", "-days", "2")

    def issue(self, name: str, start: str, end: str) -> tuple[Path, Path]:
        """Certificate and key, valid between two UTC times YYYYMMDDHHMMSSZ."""
        cert, key, request = (self.root / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        self._openssl("req", *self._fresh(key), "-out", request, "-subj", f"/CN={name}")
        self._openssl(
            "ca", "-batch", "-notext", "-config", self.root / "ca.cnf", "-cert", self.ca, "-keyfile", self._key,
            "-in", request, "-out", cert, "-startdate", start, "-enddate", end,
        )  # fmt: skip
        return cert, key

    def valid(self, name: str) -> tuple[Path, Path]:
        day = 86400
        return self.issue(name, *(time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + d)) for d in (-day, day)))

    def expired(self, name: str) -> tuple[Path, Path]:
        return self.issue(name, "20200101000000Z", "20200102000000Z")

    @staticmethod
    def _fresh(key: Path) -> list[object]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key]

    @staticmethod
    def _openssl(*arguments: object) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """The right one and a stranger's."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made with the openssl command line")
    root = tmp_path_factory.mktemp("authorities")
    return Authority(root / "own"), Authority(root / "strange")


def channel(url: str, ca: Path, pair: tuple[Path, Path] | None = None) -> grpc.Channel:
    cert, key = (file.read_bytes() for file in pair) if pair else (None, None)
    return grpc.secure_channel(url, grpc.ssl_channel_credentials(ca.read_bytes(), key, cert))


def test_mutual_tls_for_every_rpc(serve: Serve, tiny_bundle: Path, authorities: tuple[Authority, Authority]) -> None:
    own, strange = authorities
    cert, key = own.valid("server")
    server = serve(tiny_bundle, "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", own.ca)
    right, expired, wrong = own.valid("client"), own.expired("old"), strange.valid("client")
    with channel(server.url, own.ca, right) as good:
        assert {path for path in METHODS if code(good, path) in {"UNAVAILABLE", *DENIED}} == set()
    for ca, pair in ((own.ca, None), (own.ca, expired), (own.ca, wrong), (strange.ca, right)):
        with channel(server.url, ca, pair) as bad:
            assert {code(bad, path) for path in METHODS} == {"UNAVAILABLE"}
    with grpc.insecure_channel(server.url) as plain:
        assert {code(plain, path) for path in METHODS} == {"UNAVAILABLE"}
    with Client(server.url, tls_ca=own.ca, tls_cert=right[0], tls_key=right[1]) as client:
        assert len(client.predict([PICTURE])) == 1
    with Client(server.url, "tiny", tls_ca=own.ca, retries=False) as client, pytest.raises(Unavailable):
        client.predict([PICTURE])


def test_tls_with_tokens_and_an_expired_server(
    serve: Serve, tiny_bundle: Path, authorities: tuple[Authority, Authority], tmp_path: Path
) -> None:
    own, _ = authorities
    tokens = tmp_path / "tokens"
    tokens.write_text(line("right", "alice"))
    cert, key = own.valid("server")
    server = serve(tiny_bundle, "--tls-cert", cert, "--tls-key", key, "--tokens", tokens)
    with Client(server.url, "tiny", tls_ca=own.ca, token="right") as client:
        assert len(client.predict([PICTURE])) == 1
    with Client(server.url, "tiny", tls_ca=own.ca, token="wrong") as client, pytest.raises(Unauthenticated):
        client.predict([PICTURE])
    with Client(server.url, "tiny", tls=True, token="right", retries=False) as client, pytest.raises(Unavailable):
        client.predict([PICTURE])
    cert, key = own.expired("late")
    late = serve(tiny_bundle, "--tls-cert", cert, "--tls-key", key)
    with channel(late.url, own.ca) as connection:
        assert {code(connection, path) for path in METHODS} == {"UNAVAILABLE"}


def test_tls_files_that_do_not_fit_are_one_line(
    tiny_bundle: Path, authorities: tuple[Authority, Authority], tmp_path: Path
) -> None:
    own, strange = authorities
    cert, _ = own.valid("one")
    _, key = strange.valid("other")
    assert "KEY_VALUES_MISMATCH" in refused(tiny_bundle, "--tls-cert", cert, "--tls-key", key)
    assert "No such file" in refused(tiny_bundle, "--tls-cert", cert, "--tls-key", tmp_path / "nowhere")
    assert "No such file" in refused(tiny_bundle, "--tokens", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="No such file"):
        Client("localhost:1", tls_ca=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="belong together"):
        Client("localhost:1", tls_cert=cert)


def test_who_is_refused_is_refused_before_the_message_comes(guarded: tuple[ServerProcess, Path]) -> None:
    server, _ = guarded
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    connections = [http2.connect(server.url) for _ in range(20)]
    for connection in connections:
        # a token that is wrong, and the start of a message that is said to have 60 MB
        head = http2.headers(1, "/inference.GRPCInferenceService/ModelInfer", [("authorization", "Bearer wrong")])
        connection.sendall(http2.hello(65535) + head + http2.message(1, bytes(16_000), announced=60 << 20))
    for connection in connections:
        said = b""
        while b"the token is not known" not in said:
            more = connection.recv(4096)
            assert more, f"hung up after {said!r}"
            said += more
        connection.close()
    assert process.memory_info().rss - before < 20 << 20


def test_a_connection_that_never_reads_is_closed_and_others_are_not(serve: Serve, slow_bundle: Path) -> None:
    server = serve(slow_bundle, "--keepalive-seconds", "1")
    process = psutil.Process(server.process.pid)
    deaf = http2.connect(server.url)
    deaf.sendall(http2.hello(65535))

    def connected() -> int:
        time.sleep(0.1)
        port = int(server.url.rpartition(":")[2])
        ours = [one for one in process.net_connections("tcp") if one.laddr.port == port]
        return sum(one.status == psutil.CONN_ESTABLISHED for one in ours)

    with Client(server.url, retries=False) as client:
        client.predict([PICTURE])
        assert connected() == 2
        server.wait_until(lambda: connected() == 1)
        # a request longer than the time after which a silent connection is closed
        assert len(client.predict([PICTURE] * 60)) == 60
    deaf.close()


def test_calls_beyond_a_connections_share_wait_at_the_client(serve: Serve, slow_bundle: Path) -> None:
    server = serve(slow_bundle, "--max-streams", "2", "--instances", "1")
    message = service_pb2.ModelInferRequest(model_name="slow", raw_input_contents=[PICTURE.tobytes()])
    message.inputs.add(name="image", datatype="UINT8", shape=[1, *PICTURE.shape])
    most = 0.0
    with grpc.insecure_channel(server.url) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        stub.ModelInfer(message)
        calls = [stub.ModelInfer.future(message) for _ in range(16)]
        while not all(call.done() for call in calls):
            most = max(most, server.metric("trivium_in_flight_requests"))
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    assert most <= 2


def test_connections_are_renewed_without_a_failed_request(serve: Serve, tiny_bundle: Path) -> None:
    server = serve(tiny_bundle, "--connection-age-seconds", "0.5")
    with Client(server.url, retries=False) as client:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert len(client.predict([PICTURE])) == 1


def seen_certificate(url: str) -> str:
    host, _, port = url.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10)


def test_certificates_are_renewed_under_load(
    serve: Serve, tiny_bundle: Path, authorities: tuple[Authority, Authority], tmp_path: Path
) -> None:
    own, strange = authorities
    cert, key, trusted, both = (tmp_path / name for name in ("cert.pem", "key.pem", "trusted.pem", "both.pem"))
    both.write_text(own.ca.read_text() + strange.ca.read_text())
    old, new = own.valid("before"), strange.valid("after")
    shutil.copy(old[0], cert)
    shutil.copy(old[1], key)
    shutil.copy(both, trusted)
    server = serve(tiny_bundle, "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", trusted)
    end = threading.Event()
    failed: list[TriviumError] = []
    asked: list[bool] = []

    def ask(stay: bool) -> None:
        def connect() -> Client:
            return Client(server.url, "tiny", tls_ca=both, tls_cert=old[0], tls_key=old[1], retries=False)

        with connect() as lasting:
            while not end.wait(0.01):
                try:
                    if stay:
                        lasting.predict([PICTURE])
                    else:
                        with connect() as fresh:
                            fresh.predict([PICTURE])
                except TriviumError as error:
                    failed.append(error)
                asked.append(stay)

    def replace(file: Path, by: Path) -> None:
        shutil.copy(by, tmp_path / "part")
        (tmp_path / "part").replace(file)

    threads = [threading.Thread(target=ask, args=(stay,)) for stay in (True, False)]
    for thread in threads:
        thread.start()
    replace(cert, new[0])
    # half of the new pair: the old one stays
    server.wait_until(lambda: "the certificates stay as they were" in server.log.read_text())
    assert seen_certificate(server.url) == old[0].read_text()
    replace(key, new[1])
    server.wait_until(lambda: "certificates read again" in server.log.read_text())
    assert seen_certificate(server.url) == new[0].read_text()
    count = len(asked)
    server.wait_until(lambda: len(asked) > count + 10)
    end.set()
    for thread in threads:
        thread.join(30)
    assert failed == []
    # an authority in which the server trusts no longer
    replace(trusted, strange.ca)
    with Client(server.url, "tiny", tls_ca=both, tls_cert=old[0], tls_key=old[1], retries=False) as client:
        server.wait_until(lambda: not client.ready())
    with Client(server.url, "tiny", tls_ca=both, tls_cert=new[0], tls_key=new[1], retries=False) as client:
        assert len(client.predict([PICTURE])) == 1
