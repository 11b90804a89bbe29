"""The Grafana dashboard shows what a running server exports, all of it, under the names it has."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from trivium.runtime.client import Client
from trivium.runtime.drift import BLOCK

GRAFANA = Path(__file__).parents[2] / "docker" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "trivium.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
LEFT_OUT = {
    "process_virtual_memory_bytes": "address space says nothing of use; the resident set is shown",
    "process_max_fds": "a constant of the environment",
}
KERNEL_ONLY = {"trivium_kernel_pictures_total", "trivium_kernel_poisoned_total"}
"""Exported where the fused kernel runs."""


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:trivium|process)_\w+", expression))


@pytest.fixture(scope="module")
def exported(
    guaranteed_bundle: Path, server_process: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, set[str]]:
    """Sample names of a server that has answered, each with its labels' names."""
    server = server_process(tmp_path_factory.mktemp("dashboard"), guaranteed_bundle, "--drift-window", BLOCK)
    try:
        with Client(server.url) as client:
            for _ in range(BLOCK // 50):
                client.predict([np.zeros((32, 32, 3), np.uint8)] * 50)
        server.wait_until(lambda: server.metric("trivium_drift_window_pictures") == BLOCK)
        found: dict[str, set[str]] = {}
        for name, labels in server.metrics():
            found.setdefault(name, set()).update(label for label, _ in labels)
        return found
    finally:
        server.stop()


def test_every_metric_on_a_panel_is_exported(exported: dict[str, set[str]]) -> None:
    shown = set().union(*map(names, EXPRESSIONS))
    assert len(shown) > 20
    missing = shown - set(exported)
    if "trivium_kernel_pictures_total" not in exported:
        missing -= KERNEL_ONLY
    assert not missing


def test_every_exported_metric_is_on_a_panel(exported: dict[str, set[str]]) -> None:
    def family(name: str) -> str:
        return re.sub(r"_(bucket|sum|count)$", "", name)

    shown = {family(name) for expression in EXPRESSIONS for name in names(expression)}
    assert {family(name) for name in exported} - shown == set(LEFT_OUT)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_labels_are_those_of_the_metrics(expression: str, exported: dict[str, set[str]]) -> None:
    for name, matchers in re.findall(r"\b((?:trivium|process)_\w+)\{([^}]*)\}", expression):
        if name in exported or name not in KERNEL_ONLY:
            # instance is what Prometheus adds
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= exported[name] | {"instance"}
    known = set().union(*(exported.get(name, set()) for name in names(expression))) | {"instance", "le"}
    for by in re.findall(r"by \(([^)]*)\)", expression):
        assert set(by.replace(" ", "").split(",")) <= known


def test_each_legend_names_labels_that_are_left() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert any(label in by for by in re.findall(r"by \(([^)]*)\)", target["expr"])), panel["title"]


def test_panels_lie_side_by_side_and_ask_the_chosen_source() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) - {"__rate_interval"}
    assert used == variables


def test_provisioning_finds_dashboard_and_source() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/trivium.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).name == "dashboards"
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["isDefault"] is True
