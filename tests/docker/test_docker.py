"""docker/: what linters and schemas say of it, and that images, compose file, alerts and settings agree."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trivium.export.triton import requirements
from trivium.runtime.config import Settings, load

from .conftest import Check
from .dockerfile import Stage, context, parse, variables

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
ALERTS = (DOCKER / "prometheus/alerts.yml").read_text(encoding="utf-8")
YAML_RULES = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
PINNED = re.compile(r"[\w./-]+:(?!latest)[\w.-]*\d+[.]?\d+[\w.-]*")
"""With a tag that holds a release."""
LOCKS = {"cpu": ("cpu", "3.11"), "gpu": ("gpu", "3.12"), "triton": ("cpu", "3.10")}
"""The extra that a file of exact versions stands for, and the Python of its image."""

dockerfiles = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def images() -> Iterator[tuple[Path, Stage]]:
    """The last stage of each Dockerfile."""
    yield from ((path, parse(path)[-1]) for path in DOCKERFILES)


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(source, target, whether it may only be read) of a service's volumes."""
    for volume in service["volumes"]:
        if isinstance(volume, dict):
            yield volume["source"], volume["target"], volume["read_only"]
        else:
            source, target, *options = volume.split(":")
            yield source, target, options == ["ro"]


def settings(stage: Stage, **environment: str) -> Settings:
    """What trivium serve makes of an image's variables and those of a service."""
    found = {k: v for word, text in stage.instructions if word == "ENV" for k, v in variables(text).items()}
    return load([], {k: v for k, v in (found | environment).items() if k.startswith("TRIVIUM_")}, "trivium serve")[0]


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


@dockerfiles
def test_hadolint(path: Path, tool: Callable[[str], Check]) -> None:
    tool("hadolint")("--no-color", path)


def test_yamllint(tool: Callable[[str], Check]) -> None:
    tool("yamllint")("--strict", "--config-data", YAML_RULES, DOCKER, ROOT / "tests/docker")


def test_the_compose_file_follows_its_schema(tool: Callable[[str], Check]) -> None:
    tool("check-jsonschema")("--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


def test_prometheus_takes_its_configuration(promtool: Check) -> None:
    promtool("check", "config", DOCKER / "prometheus/prometheus.yml")


def test_alerts_fire_when_they_should(promtool: Check, tmp_path: Path) -> None:
    for path in (DOCKER / "prometheus/alerts.yml", ROOT / "tests/docker/alerts.test.yml"):
        shutil.copy(path, tmp_path)
    promtool("test", "rules", tmp_path / "alerts.test.yml")


def test_every_alert_is_tried_for_silence_and_for_alarm() -> None:
    names = {rule["alert"] for group in yaml.safe_load(ALERTS)["groups"] for rule in group["rules"]}
    trials = yaml.safe_load((ROOT / "tests/docker/alerts.test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for trial in trials for case in trial["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_alerts_use_metrics_that_the_runtime_has() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime").glob("*.py"))
    known = set(re.findall(r'"(trivium_\w+)"', sources))
    used = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in re.findall(r"\btrivium_\w+", ALERTS)}
    assert len(used) > 5
    assert not {name for name in used if name not in known and f"{name}_total" not in known}


@dockerfiles
def test_bases_are_pinned(path: Path) -> None:
    stages = parse(path)
    assert len(stages) > 1, "what builds the wheel does not belong into the image"
    assert all(PINNED.fullmatch(stage.image) for stage in stages), [stage.image for stage in stages]


def test_services_run_pinned_images_or_ours() -> None:
    built = {service["image"]: service["build"] for service in SERVICES.values() if "build" in service}
    assert {str((DOCKER / build["context"] / build["dockerfile"]).resolve()) for build in built.values()} == {
        str(path) for path in DOCKERFILES
    }
    others = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert all(PINNED.fullmatch(image) for image in others), others


@dockerfiles
def test_the_process_is_nobody_and_ends_by_signal(path: Path) -> None:
    image = parse(path)[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.last("USER"))
    after = [word for word, _ in image.instructions[[word for word, _ in image.instructions].index("USER") :]]
    assert not {"RUN", "COPY"} & set(after), "nothing in the image may belong to the user that serves"
    assert image.last("STOPSIGNAL") == "SIGTERM"
    assert image.command("ENTRYPOINT")[0] in ("trivium", "tritonserver")
    assert image.command("HEALTHCHECK")[0] == "python3"


@dockerfiles
def test_nothing_secret_is_in_an_image(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?i)password|secret|token|credential|api.?key", text)


def test_every_service_is_confined() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert all(only_read or source in COMPOSE["volumes"] for source, _, only_read in mounts(service)), name
        assert "build" in service or service["user"].split(":")[0] != "0", name


def test_servers_are_given_the_time_to_drain() -> None:
    for path, image in images():
        service = next(s for s in SERVICES.values() if s.get("build", {}).get("dockerfile") == f"docker/{path.name}")
        if image.command("ENTRYPOINT")[0] == "trivium":
            chosen = settings(image, **service["environment"])
            needed = chosen.grace_seconds + chosen.drain_seconds
        else:
            needed = float(re.search(r"--exit-timeout-secs=(\d+)", " ".join(image.command("ENTRYPOINT")))[1])  # type: ignore[index]
        assert seconds(service["stop_grace_period"]) > needed + 5


def test_ports_and_bundles_are_where_others_look() -> None:
    for path, image in images():
        service = next(s for s in SERVICES.values() if s.get("build", {}).get("dockerfile") == f"docker/{path.name}")
        exposed = set(image.last("EXPOSE").split())
        assert {port.split(":")[-1] for port in service["ports"]} <= exposed
        assert "8002" in exposed, "Prometheus asks there"
        ((_, target, _),) = mounts(service)
        if image.command("ENTRYPOINT")[0] == "trivium":
            chosen = settings(image, **service["environment"])
            assert {str(chosen.grpc_port), str(chosen.http_port)} == exposed
            assert [str(bundle) for bundle in chosen.bundles] == [target]
            assert chosen.host == "0.0.0.0"
        else:
            assert f"--model-repository={target}" in image.command("ENTRYPOINT")


def test_prometheus_scrapes_the_services() -> None:
    scraped = {
        name
        for job in PROMETHEUS["scrape_configs"]
        for found in job.get("dns_sd_configs", ())
        for name in found["names"]
    }
    assert scraped == {name for name, service in SERVICES.items() if "build" in service}
    assert {found["port"] for job in PROMETHEUS["scrape_configs"] for found in job.get("dns_sd_configs", ())} == {8002}


def test_grafana_finds_source_and_dashboard() -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in SERVICES
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/trivium.yaml").read_text())["providers"]
    path = provider["options"]["path"]
    folder = DOCKER / next(source for source, target, _ in mounts(SERVICES["grafana"]) if target == path)
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.name).is_file()
    assert str(home.parent) == path


def lock(name: str) -> dict[str, str]:
    """Distribution -> exact version, each with a SHA-256."""
    text = (DOCKER / f"requirements/{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, str] = {}
    for line in text.splitlines():
        pinned = re.match(r"([\w.-]+)==(\S+)\s+(--hash=sha256:[0-9a-f]{64}\s*)+$", line)
        assert pinned, f"{name}.txt: {line[:80]} is not one version with its hashes"
        found[canonicalize_name(pinned[1])] = pinned[2]
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_exact_versions_are_those_that_the_project_allows(name: str) -> None:
    extra, python = LOCKS[name]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"][extra])]
    if name == "triton":
        wanted += [Requirement(line) for line in requirements().splitlines() if not line.startswith(("#", "trivium"))]
    assert any(need.name.startswith("onnxruntime") for need in wanted)
    pinned = lock(name)
    for need in wanted:
        if need.marker is None or need.marker.evaluate({"python_version": python}):
            assert need.specifier.contains(pinned[canonicalize_name(need.name)]), need
    assert "torch" not in pinned


def test_the_wheel_is_built_by_what_it_asks_for() -> None:
    system = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    pinned = lock("build")
    for need in map(Requirement, system["requires"]):
        assert need.specifier.contains(pinned[canonicalize_name(need.name)]), need


def test_a_build_sees_the_sources_alone() -> None:
    files = {str(path) for path in context(ROOT)}
    assert {"pyproject.toml", "README.md", "LICENSE", "runtime/serve.py", "kernels/CMakeLists.txt"} <= files
    assert "docker/requirements/cpu.txt" in files
    assert not [name for name in files if "__pycache__" in name or name.startswith((".", "tests/", "build/"))]
    assert {name.split("/")[0] for name in files if "/" in name} == {"docker", "export", "kernels", "runtime", "train"}
