"""Settings: which source wins, and what a mistake says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trivium.runtime.config import Settings, load, nearest
from trivium.runtime.cpus import usable_cpus
from trivium.runtime.errors import ConfigError


def settings(*arguments: str, **environment: str) -> Settings:
    return load(arguments, environment, "trivium serve")[0]


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("bundles: [from-file]\nmax_batch: 3\nmax_queue: 30\ninstances: 7\n")
    found = settings("--config", str(file), "--max-batch", "5", TRIVIUM_MAX_BATCH="4", TRIVIUM_MAX_QUEUE="40")
    assert (found.max_batch, found.max_queue, found.instances) == (5, 40, 7)
    assert found.bundles == (Path("from-file"),)
    assert found.grpc_port == Settings().grpc_port == 8001
    assert settings("a", "b", TRIVIUM_CONFIG=str(file)).bundles == (Path("a"), Path("b"))
    assert settings(TRIVIUM_BUNDLES="a:b").bundles == (Path("a"), Path("b"))


def test_every_setting_is_a_flag_a_variable_and_a_key(tmp_path: Path) -> None:
    values = {
        "host": "::1", "grpc_port": 1, "http_port": 2, "instances": 3, "kernels": "off", "device": "cuda",
        "engine": "tensorrt-ep", "engine_cache": "e",
        "transport": "grpc", "max_streams": 10, "keepalive_seconds": 11.0, "connection_age_seconds": 12.0,
        "batch": 2, "max_delay_ms": 3.0, "preferred_batches": "1,2", "shed_late": True,
        "inline_ms": 0.5, "max_batch": 4, "max_queue": 5, "max_message_bytes": 6000, "max_queue_bytes": 7000,
        "max_picture_bytes": 8000, "max_picture_pixels": 9, "grace_seconds": 1.5, "drain_seconds": 2.5,
        "ready_file": "r", "drift_window": 5, "drift_run_length": 10_000,
        "log_level": "debug", "repository": "d", "keep_versions": 2, "watch": True,
        "tls_cert": "c", "tls_key": "k", "tls_client_ca": "a", "tokens": "t",
        "log_format": "json", "access_log": True, "trace_endpoint": "http://c:4317", "trace_ratio": 0.5,
    }  # fmt: skip
    assert set(values) | {"bundles"} == set(Settings.model_fields)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(values))
    flags = [
        part
        for key, value in values.items()
        for part in ("--" + key.replace("_", "-"), *([] if value is True else [str(value)]))
    ]
    environment = {"TRIVIUM_" + key.upper(): str(value) for key, value in values.items()}
    expected = Settings.model_validate(values)
    assert settings(*flags) == settings(**environment) == settings("--config", str(file)) == expected
    assert expected != Settings()


def test_printed_settings_read_back(tmp_path: Path) -> None:
    found, wanted = load(["x", "--print-config", "--drain-seconds", "3"], {}, "trivium serve")
    assert wanted
    file = tmp_path / "c.yaml"
    file.write_text(found.yaml())
    assert settings("--config", str(file)) == found


@pytest.mark.parametrize(
    ("arguments", "environment", "text"),
    [
        (["--grpc-port", "70000"], {}, "grpc_port: .*65535, got '70000' from the command line"),
        ([], {"TRIVIUM_INSTANCES": "none"}, "instances: .*'none' from the environment"),
        ([], {"TRIVIUM_GRPC_PROT": "1"}, "TRIVIUM_GRPC_PROT; did you mean TRIVIUM_GRPC_PORT"),
        (["--max-queue", "10"], {}, r"max_queue \(10\) must hold one request of max_batch \(64\)"),
        (["--drain-seconds", "nan"], {}, "drain_seconds"),
        (["--tls-cert", "c"], {}, "tls_cert and tls_key belong together"),
        (["--access-log", "--log-level", "error"], {}, "access_log writes at level info, which log_level error hides"),
        (["--trace-endpoint", "collector:4317"], {}, "trace_endpoint: .*'collector:4317' from the command line"),
        (["--trace-ratio", "2"], {}, "trace_ratio: "),
        (["--tls-client-ca", "c"], {}, "tls_client_ca needs tls_cert and tls_key"),
        (["--kernels", "maybe"], {}, "kernels: .*'auto', 'on' or 'off'"),
        (["--engine", "tensorrt"], {}, "engine tensorrt needs device cuda"),
        (["--engine-cache", "e"], {}, "engine_cache goes with engine tensorrt-ep"),
        (["--max-batches", "1"], {}, "unknown flag --max-batches; did you mean '--max-batch'"),
        (["--max-batches=1"], {}, "unknown flag --max-batches=1; did you mean '--max-batch'"),
    ],
)
def test_mistakes_name_setting_and_source(arguments: list[str], environment: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        settings(*arguments, **environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("max_bach: 3\n", "unknown key 'max_bach'; did you mean 'max_batch'"),
        ("zzz: 3\n", "unknown key 'zzz'; known: bundles, repository"),
        ("- a\n", "expected settings"),
        ("a: [\n", "no valid YAML"),
        ("max_batch: many\n", "max_batch: .*'many' from .*c.yaml"),
        ("!!python/object/apply:os.system [id]\n", "no valid YAML"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=text) as caught:
        settings("--config", str(file))
    assert "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing_and_a_missing_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# nothing\n")
    assert settings("--config", str(file)) == Settings()
    with pytest.raises(ConfigError, match="No such file"):
        settings("--config", str(tmp_path / "none.yaml"))


def test_variables_of_other_stages_are_let_alone() -> None:
    assert settings(TRIVIUM_CACHE="/somewhere", HOME="/") == Settings()


def test_nearest() -> None:
    assert nearest("prot", ["port", "host"]) == "; did you mean 'port'?"
    assert nearest("xyz", ["port", "host"]) == "; known: port, host"


def test_cpus_obey_every_quota_above(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    inner = tmp_path / "cgroup" / "outer" / "inner"
    inner.mkdir(parents=True)

    def count() -> int:
        return usable_cpus(tmp_path / "cgroup", membership)

    free = count()
    assert free >= 1
    (inner / "cpu.max").write_text("max 100000\n")
    assert count() == free
    (inner.parent / "cpu.max").write_text("50000 100000\n")
    assert count() == 1
    (inner.parent / "cpu.max").write_text("junk\n")
    assert count() == free
    legacy = tmp_path / "cgroup" / "cpu"
    legacy.mkdir()
    (legacy / "cpu.cfs_quota_us").write_text("-1\n")
    assert count() == free
    (legacy / "cpu.cfs_quota_us").write_text("100000\n")
    (legacy / "cpu.cfs_period_us").write_text("100000\n")
    assert count() == 1
