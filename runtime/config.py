"""Settings of the server: flags > TRIVIUM_* environment > YAML file > defaults, one typed model behind all four."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from .bundle import printable
from .engines import EngineChoice
from .errors import ConfigError
from .values import Strict

PREFIX = "TRIVIUM_"
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1, le=65536)]
Bytes = Annotated[int, Field(ge=1024, le=2**31 - 1)]
Seconds = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]


class Settings(Strict):
    """Everything `trivium serve` can be told."""

    bundles: Annotated[tuple[Path, ...], Field(description="bundle directories to serve")] = ()
    repository: Annotated[
        Path | None, Field(description="directory of bundles as MODEL/VERSION, served beside those named")
    ] = None
    keep_versions: Annotated[
        Count, Field(description="of each model in the repository, how many of its newest versions to serve")
    ] = 1
    watch: Annotated[
        bool, Field(description="load bundles that appear or change on the disk; those that fail change nothing")
    ] = False
    host: Annotated[str, Field(min_length=1, description="address to listen on")] = "127.0.0.1"
    grpc_port: Annotated[Port, Field(description="gRPC; 0 lets the system choose")] = 8001
    http_port: Annotated[Port, Field(description="/metrics, /healthz, /readyz; 0 lets the system choose")] = 8002
    instances: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None,
        Field(description="worker threads; default: the CPUs this process may use, each with a picture; 1 on a GPU"),
    ] = None
    kernels: Annotated[
        Literal["auto", "on", "off"], Field(description="fused kernels: auto falls back to the graph's own function")
    ] = "auto"
    device: Annotated[Literal["cpu", "cuda"], Field(description="where the backbone runs")] = "cpu"
    engine: Annotated[
        EngineChoice,
        Field(
            description="what runs the model on a card: onnx is ONNX Runtime, tensorrt the bundle's plan (trust its "
            "maker) or else ONNX Runtime, auto likewise if it has a plan, tensorrt-ep ONNX Runtime's TensorRT provider"
        ),
    ] = "onnx"
    engine_cache: Annotated[
        Path | None, Field(description="directory where the TensorRT provider keeps what it compiled")
    ] = None
    transport: Annotated[
        Literal["auto", "http2", "grpc"],
        Field(description="what carries gRPC: this server's own HTTP/2, or gRPC's; auto takes gRPC's for TLS"),
    ] = "auto"
    inline_ms: Annotated[
        Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)],
        Field(
            description="requests that take the engine no longer are answered on the event loop itself, for handing "
            "them to a worker would cost more; all else on the loop waits meanwhile; 0 for none"
        ),
    ] = 0.05
    max_batch: Annotated[Count, Field(description="most pictures in one request")] = 64
    batch: Annotated[
        Annotated[int, Field(ge=1, le=1024)] | None,
        Field(description="most pictures that run together; default: 1 on CPUs, where more are slower, 16 on a GPU"),
    ] = None
    max_delay_ms: Annotated[
        Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None,
        Field(description="longest that a picture waits for others to run with it; default: 0 on CPUs, 1 on a GPU"),
    ] = None
    preferred_batches: Annotated[
        tuple[Count, ...],
        BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value),
        Field(description="sizes that batches have rather than others, such as 4,8,16"),
    ] = ()
    shed_late: Annotated[
        bool, Field(description="refuse at once, RESOURCE_EXHAUSTED, what would wait beyond its own deadline")
    ] = False
    max_queue: Annotated[Count, Field(description="most pictures waiting; beyond it RESOURCE_EXHAUSTED")] = 256
    max_message_bytes: Annotated[Bytes, Field(description="longest request message")] = 64 << 20
    # gRPC and the message's parser hold a copy each, so the process may need three times as much
    max_queue_bytes: Annotated[Bytes, Field(description="most bytes of messages waiting or running")] = 256 << 20
    max_picture_bytes: Annotated[Bytes, Field(description="longest encoded picture")] = 32 << 20
    max_picture_pixels: Annotated[int, Field(ge=1, description="most pixels of an encoded picture")] = 64_000_000
    max_streams: Annotated[
        Count, Field(description="most calls at once of one connection; more wait at the client")
    ] = 1024
    keepalive_seconds: Annotated[
        Seconds,
        Field(description="after so long a silence a connection is asked for a sign of life, or closed; 0 never asks"),
    ] = 60.0
    connection_age_seconds: Annotated[
        Seconds,
        Field(description="clients connect anew after about so long, say to be spread over servers; 0 lets them stay"),
    ] = 0.0
    tls_cert: Annotated[
        Path | None, Field(description="PEM file of the server's certificate and those it was signed with; gRPC alone")
    ] = None
    tls_key: Annotated[Path | None, Field(description="PEM file of the certificate's key")] = None
    tls_client_ca: Annotated[
        Path | None, Field(description="PEM file of who may sign clients' certificates; each client then needs one")
    ] = None
    tokens: Annotated[
        Path | None,
        Field(description="file of tokens: lines of SHA-256, name and perhaps 'admin'; calls then need one"),
    ] = None
    grace_seconds: Annotated[
        Seconds, Field(description="after SIGTERM, seconds of serving on while load balancers notice")
    ] = 5.0
    drain_seconds: Annotated[Seconds, Field(description="then, seconds that accepted requests have to finish")] = 30.0
    ready_file: Annotated[
        Path | None, Field(description="file to write the ready line to, a JSON object with the ports")
    ] = None
    drift_window: Annotated[
        int,
        Field(ge=0, le=1_000_000, description="last pictures compared with the calibration's; 0: do not watch drift"),
    ] = 1000
    drift_run_length: Annotated[
        int,
        Field(ge=10_000, le=10**15, description="mean number of pictures until a false alarm of drift, at least"),
    ] = 10_000_000
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="least level of the lines on stderr")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], Field(description="lines for people, or one JSON object a line")] = (
        "text"
    )
    access_log: Annotated[bool, Field(description="a line for each request and its answers, at level info")] = False
    trace_endpoint: Annotated[
        Annotated[str, Field(pattern=r"^https?://[^\s/@]+/?$")] | None,
        Field(description="OpenTelemetry collector's gRPC, http://HOST:PORT or https://HOST:PORT; default: no traces"),
    ] = None
    trace_ratio: Annotated[
        float, Field(ge=0, le=1, description="share of requests to trace where the caller has not decided")
    ] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.max_queue < self.max_batch:
            raise ValueError(f"max_queue ({self.max_queue}) must hold one request of max_batch ({self.max_batch})")
        if self.engine.startswith("tensorrt") and self.device == "cpu":
            raise ValueError(f"engine {self.engine} needs device cuda")
        if self.engine_cache is not None and self.engine != "tensorrt-ep":
            raise ValueError("engine_cache goes with engine tensorrt-ep")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.access_log and self.log_level in ("warning", "error"):
            raise ValueError(f"access_log writes at level info, which log_level {self.log_level} hides")
        return self

    def yaml(self) -> str:
        """The settings as the YAML file that would give them."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def load(arguments: Sequence[str], environment: Mapping[str, str], prog: str) -> tuple[Settings, bool]:
    """Settings from command line, environment and file, and whether --print-config was given.

    Raises: ConfigError that names the setting and where it came from.
    """
    namespace, rest = _parser(prog).parse_known_args(arguments)
    flags = vars(namespace)
    if unknown := next((word for word in rest if word.startswith("-")), None):
        known = ["--" + name.replace("_", "-") for name in Settings.model_fields if name != "bundles"]
        raise ConfigError(f"unknown flag {unknown}{nearest(unknown.split('=')[0], known)}")
    print_config = flags.pop("print_config")
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    config = flags.pop("config") or environment.get(PREFIX + "CONFIG")
    layers: list[tuple[dict[str, Any], str]] = []
    if config is not None:
        layers.append((_file(Path(config)), config))
    layers.append((_environment(environment), "the environment"))
    layers.append(({key: value for key, value in flags.items() if value not in (None, [])}, "the command line"))
    for layer, source in layers:
        values |= layer
        origin |= dict.fromkeys(layer, source)
    try:
        return Settings.model_validate(values), print_config
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        text = first["msg"].removeprefix("Value error, ")
        if not name:
            raise ConfigError(text) from None
        raise ConfigError(f"{name}: {text}, got {repr(first['input'])[:100]} from {origin[name]}") from None


def nearest(name: str, known: Sequence[str]) -> str:
    """'; did you mean X?' where a known name is near, else the list of all."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; known: {', '.join(known)}"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Serve bundles over gRPC (Open Inference Protocol v2), with metrics and health over HTTP.",
        epilog=f"Each flag is also a key of the YAML file and an environment variable {PREFIX}NAME; "
        "flags win over the environment, the environment over the file.",
    )
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help=Settings.model_fields["bundles"].description)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--print-config", action="store_true", help="print the settings in force as YAML and exit")
    for name, field in Settings.model_fields.items():
        if name == "bundles":
            continue
        default = "" if field.default is None else f" (default {field.default})"
        if field.annotation is bool:
            parser.add_argument(
                "--" + name.replace("_", "-"), action="store_const", const="true", help=field.description
            )
            continue
        annotation = field.annotation
        choices = get_args(annotation) if str(annotation).startswith("typing.Literal") else ()
        parser.add_argument(
            "--" + name.replace("_", "-"),
            metavar="{" + ",".join(choices) + "}" if choices else name.split("_")[-1].upper(),
            help=f"{field.description}{default}".replace("%", "%%"),
        )
    return parser


def _environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """TRIVIUM_* variables that are settings; one that nearly is, is an error, any other belongs to another stage."""
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable == PREFIX + "CONFIG":
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name == "bundles":
            values[name] = [part for part in text.split(os.pathsep) if part]
        elif name in Settings.model_fields:
            values[name] = text
        elif found := difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.8):
            raise ConfigError(f"unknown environment variable {variable}; did you mean {PREFIX}{found[0].upper()}?")
    return values


class _Loader(yaml.SafeLoader):
    """Without aliases: a file of settings needs none, and a few lines of them can stand for any amount of memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)


def _file(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_bytes(), _Loader)
        # what cannot be shown, a number of a million digits, cannot be complained of either
        repr(document)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except Exception as error:  # PyYAML fails in many ways on what looks like a date or a number and is none
        raise ConfigError(f"{path}: no valid YAML ({printable(' '.join(str(error).split())[:300])})") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected settings as 'key: value' lines")
    for key in document:
        if key not in Settings.model_fields:
            known = list(Settings.model_fields)
            raise ConfigError(f"{path}: unknown key {str(key)[:100]!r}{nearest(str(key)[:100], known)}")
        value = document[key]
        if any(isinstance(part, str) and "\0" in part for part in (value if isinstance(value, list) else [value])):
            raise ConfigError(f"{path}: {key}: a NUL in it")
    return document
