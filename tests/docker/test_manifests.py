"""Manifests of docker/: schemas, typos, and that they agree with the images, the server's settings and its metrics."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trivium.runtime.config import Settings
from trivium.runtime.config import load as load_settings
from trivium.runtime.probes import HttpServer

from .conftest import Check
from .dockerfile import parse, variables
from .kustomize import Document, load, program, real, render
from .manifests import KUBERNETES, faults, text, values_faults, walk

DOCKER = Path(__file__).parents[2] / "docker"
FOLDERS = [DOCKER / name for name in ("kubernetes/overlays/cpu", "kubernetes/overlays/gpu", "envoy")]
FILES = sorted(path for name in ("kubernetes", "training", "envoy") for path in (DOCKER / name).rglob("*.yaml"))
VALUES = DOCKER / "kubernetes/prometheus-adapter/values.yaml"
ENVOY = DOCKER / "envoy/envoy.yaml"
PATCHES = {
    path.parent / patch["path"]
    for path in FILES
    if path.name == "kustomization.yaml"
    for patch in load(path)[0].get("patches", ())
}
OBJECTS = [path for path in FILES if path not in {*PATCHES, VALUES, ENVOY}]
SERVER_IMAGES = {"cpu": "Dockerfile.cpu", "gpu": "Dockerfile.gpu", "triton": "Dockerfile.triton"}

folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def key(one: Document) -> tuple[str, str]:
    return one["kind"], one["metadata"]["name"]


def only(objects: list[Document], kind: str) -> Document:
    (found,) = (one for one in objects if one["kind"] == kind)
    return found


def container(pod: Document) -> Document:
    (found,) = pod["containers"]
    return dict(found)


def with_volume(folder: Path, into: Path) -> Path:
    """An overlay with the component that its comment offers."""
    shutil.copytree(DOCKER / "kubernetes", into / "kubernetes")
    copy_ = into / "kubernetes" / folder.relative_to(DOCKER / "kubernetes")
    file = copy_ / "kustomization.yaml"
    changed = file.read_text(encoding="utf-8").replace("# components:", "components:")
    file.write_text(changed, encoding="utf-8")
    return copy_


@folders
def test_our_rendering_is_kustomize_s(folder: Path, tmp_path: Path) -> None:
    words = program()
    if words is None:
        pytest.skip("neither kustomize nor kubectl is on PATH")
    trials = [folder] if folder.name == "envoy" else [folder, with_volume(folder, tmp_path)]
    for trial in trials:
        assert sorted(render(trial), key=key) == sorted(real(words, trial), key=key)


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: str(path.relative_to(DOCKER)))
def test_every_object_follows_its_schema(path: Path) -> None:
    documents = load(path)
    assert documents
    for document in documents:
        assert not list(faults(document))


@folders
def test_every_rendered_object_follows_its_schema(folder: Path, tmp_path: Path) -> None:
    trials = [folder] if folder.name == "envoy" else [folder, with_volume(folder, tmp_path)]
    for trial in trials:
        for document in render(trial):
            assert not list(faults(document))


@pytest.mark.parametrize("release", [KUBERNETES, "1.37"])
def test_kubernetes_validate(release: str, tool: Callable[[str], Check], tmp_path: Path) -> None:
    objects = [one for folder in FOLDERS for one in render(folder)]
    objects += [one for path in OBJECTS for one in load(path) if "kustomize" not in one["apiVersion"]]
    file = tmp_path / "all.yaml"
    file.write_text("---\n".join(map(text, objects)), encoding="utf-8")
    tool("kubernetes-validate")("--strict", "--kubernetes-version", release, file)


def test_a_kind_that_nobody_knows_is_a_fault() -> None:
    """kubernetes-validate passes it with a warning."""
    assert list(faults({"apiVersion": "serving.kserve.io/v1", "kind": "InferenceService", "metadata": {"name": "a"}}))
    assert list(faults({"apiVersion": "apps/v1", "kind": "Deploymnet", "metadata": {"name": "a"}}))


def typos(documents: list[Document]) -> Iterator[list[Document]]:
    """The documents with one key misspelt, for every key; and with kind and apiVersion misspelt."""
    for number, document in enumerate(documents):
        for path, _ in walk(document):
            if path and isinstance(path[-1], str):
                changed = copy.deepcopy(documents)
                node: Any = changed[number]
                for step in path[:-1]:
                    node = node[step]
                node[path[-1] + "x"] = node.pop(path[-1])
                yield changed
        for word in {"kind", "apiVersion"} & set(document):
            changed = copy.deepcopy(documents)
            changed[number][word] += "x"
            yield changed


def passes(path: Path, documents: list[Document]) -> bool:
    """Whether anything objects where a file's documents are these."""
    if path == VALUES:
        return not any(fault for one in documents for fault in values_faults(one))
    if path not in PATCHES:
        return not any(fault for one in documents for fault in faults(one))

    def read(asked: Path) -> list[Document]:
        if asked == path:
            return documents
        found = load(asked)
        if asked.parent in FOLDERS and asked.name == "kustomization.yaml" and "bundle-volume" in str(path):
            found[0]["components"] = ["../../components/bundle-volume"]
        return found

    users = [folder for folder in FOLDERS[:2] if folder == path.parent or "bundle-volume" in str(path)]
    assert users
    try:
        return not any(fault for folder in users for one in render(folder, read) for fault in faults(one))
    except (ValueError, KeyError):
        return False


@pytest.mark.parametrize(
    "path", [path for path in FILES if path != ENVOY], ids=lambda path: str(path.relative_to(DOCKER))
)
def test_every_misspelt_key_is_found(path: Path) -> None:
    documents = load(path)
    assert passes(path, documents)
    trials = list(typos(documents))
    assert len(trials) >= 3
    for trial in trials:
        assert not passes(path, trial), text(trial[0])


def served(pod: Document, image: str, **more: str) -> Settings:
    """The settings of trivium serve in a container, from its image's variables and its own."""
    stage = parse(DOCKER / image)[-1]
    found = {k: v for word, line in stage.instructions if word == "ENV" for k, v in variables(line).items()}
    found |= {one["name"]: one["value"] for one in container(pod)["env"]} | more
    own = {name: value for name, value in found.items() if name.startswith("TRIVIUM_")}
    return load_settings(list(container(pod).get("args", ())), own, "trivium serve")[0]


def runtimes() -> Iterator[tuple[Document, Document, Settings]]:
    """(pod, its containers' owner, settings) of everything that runs trivium serve."""
    for folder in FOLDERS[:2]:
        pod = only(render(folder), "Deployment")["spec"]["template"]["spec"]
        yield pod, pod, served(pod, SERVER_IMAGES[folder.name])
    (runtime,), (service,) = (
        load(DOCKER / f"kubernetes/kserve/{name}.yaml") for name in ("runtime", "inferenceservice")
    )
    yield service["spec"]["predictor"], runtime["spec"], served(runtime["spec"], "Dockerfile.cpu")


def test_ports_probes_and_bundles_are_the_server_s() -> None:
    routes = HttpServer(lambda accept: ("", b""), lambda: True)
    for _, pod, settings in runtimes():
        one = container(pod)
        assert settings.host == "0.0.0.0"
        ports = {port["name"]: port["containerPort"] for port in one["ports"]}
        assert set(ports.values()) <= {settings.grpc_port, settings.http_port}
        for name in ("startupProbe", "readinessProbe"):
            assert one[name]["grpc"] == {"port": settings.grpc_port}
        asked = one["livenessProbe"]["httpGet"]
        assert ports.get(asked["port"], asked["port"]) == settings.http_port
        # neither /readyz nor grpc.health.v1: a server that drains is not to be killed
        assert asked["path"] == "/healthz"
        assert routes.answer("GET", asked["path"])[0] == 200
        assert len(settings.bundles) == 1
        written = {mount["mountPath"] for mount in one["volumeMounts"] if not mount.get("readOnly")}
        assert written == {"/tmp"}


def test_the_volume_is_where_the_server_looks(tmp_path: Path) -> None:
    for folder in FOLDERS[:2]:
        objects = render(with_volume(folder, tmp_path / folder.name))
        pod = only(objects, "Deployment")["spec"]["template"]["spec"]
        (mount,) = (each for each in container(pod)["volumeMounts"] if each["name"] == "bundle")
        assert [Path(mount["mountPath"])] == list(served(pod, SERVER_IMAGES[folder.name]).bundles)
        assert mount["readOnly"]
        (volume,) = (each for each in pod["volumes"] if each["name"] == "bundle")
        claim = only(objects, "PersistentVolumeClaim")
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def pause(one: Document) -> float:
    """Seconds before a container is sent SIGTERM."""
    return float(one.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0))


def test_servers_are_given_the_time_to_drain() -> None:
    for owner, pod, settings in runtimes():
        needed = pause(container(pod)) + settings.grace_seconds + settings.drain_seconds
        assert owner["terminationGracePeriodSeconds"] >= needed + 10
        probe = container(pod)["readinessProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"] < settings.grace_seconds
    (runtime,) = load(DOCKER / "kubernetes/kserve/triton-runtime.yaml")
    (service,) = load(DOCKER / "kubernetes/kserve/triton-inferenceservice.yaml")
    (waits,) = re.findall(r"--exit-timeout-secs=(\d+)", " ".join(container(runtime["spec"])["args"]))
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] >= int(waits) + 10


def test_pods_are_as_confined_as_their_images() -> None:
    owners = [pod for _, pod, _ in runtimes()]
    owners += [load(DOCKER / "kubernetes/kserve/triton-runtime.yaml")[0]["spec"]]
    owners += [only(render(DOCKER / "envoy"), "Deployment")["spec"]["template"]["spec"]]
    for pod in owners:
        security = pod.get("securityContext", {}) | container(pod)["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == 65532
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
    for name in SERVER_IMAGES.values():
        assert parse(DOCKER / name)[-1].last("USER").startswith("65532:")


def test_images_are_of_this_release_and_made_here() -> None:
    release = re.search(r'^version = "(.+)"', (DOCKER.parent / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    found = {
        value
        for objects in [*map(render, FOLDERS[:2]), *map(load, OBJECTS)]
        for one in objects
        for path, value in walk(one)
        if path and path[-1] == "image" and str(value).startswith("registry.example.com/")
    }
    kinds = {*SERVER_IMAGES, "train", "train-ray"}
    assert found == {f"registry.example.com/trivium:{release}-{kind}" for kind in kinds}


def test_workers_get_whole_cpus() -> None:
    """A fraction of a CPU is a worker thread that is throttled."""
    for _, pod, _ in runtimes():
        resources = container(pod)["resources"]
        assert resources["limits"]["cpu"] == resources["requests"]["cpu"]
        assert resources["limits"]["cpu"].isdecimal()
    gpu = only(render(FOLDERS[1]), "Deployment")["spec"]["template"]["spec"]
    assert container(gpu)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert served(gpu, "Dockerfile.gpu").device == "cuda"


@folders
def test_names_ports_and_labels_lead_somewhere(folder: Path) -> None:
    objects = render(folder)
    deployment, service = only(objects, "Deployment"), only(objects, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"] for port in container(deployment["spec"]["template"]["spec"])["ports"]}
    selectors = [deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    selectors += [only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]]
    spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    selectors += [each["labelSelector"]["matchLabels"] for each in spread]
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports
    if folder.name != "envoy":
        network, monitor = only(objects, "NetworkPolicy"), only(objects, "ServiceMonitor")
        selectors += [network["spec"]["podSelector"]["matchLabels"]]
        assert {port["port"] for rule in network["spec"]["ingress"] for port in rule["ports"]} == ports
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        scaled = only(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
        assert (scaled["apiVersion"], scaled["kind"], scaled["name"]) == ("apps/v1", *key(deployment))
        assert "replicas" not in deployment["spec"], "each rollout would undo the autoscaler's number"
        assert service["spec"]["clusterIP"] == "None"
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_envoy_may_reach_the_replicas_and_knows_where() -> None:
    replicas, proxy = render(FOLDERS[0]), render(DOCKER / "envoy")
    allowed = [
        peer["podSelector"]["matchLabels"]
        for rule in only(replicas, "NetworkPolicy")["spec"]["ingress"]
        for peer in rule["from"]
        if "podSelector" in peer
    ]
    labels = only(proxy, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert any(wanted.items() <= labels.items() for wanted in allowed)
    cluster = configuration()["static_resources"]["clusters"][0]
    ((endpoint,),) = (each["lb_endpoints"] for each in cluster["load_assignment"]["endpoints"])
    address = endpoint["endpoint"]["address"]["socket_address"]
    service = only(replicas, "Service")
    assert address["address"] == service["metadata"]["name"]
    assert address["port_value"] in {port["port"] for port in service["spec"]["ports"] if port["name"] == "grpc"}


def test_alerts_and_monitor_mean_the_same_job() -> None:
    objects = render(FOLDERS[0])
    label = only(objects, "ServiceMonitor")["spec"]["jobLabel"]
    job = only(objects, "Service")["metadata"]["labels"][label]
    assert f'job="{job}"' in (DOCKER / "prometheus/alerts.yml").read_text(encoding="utf-8")


def rules() -> list[Document]:
    found: list[Document] = load(VALUES)[0]["rules"]["custom"]
    return found


def expression(rule: Document) -> str:
    """What prometheus-adapter asks Prometheus about two pods."""
    query: str = rule["metricsQuery"]
    return query.replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="here",pod=~"busy|idle"')


def test_the_autoscaler_s_metrics_are_made_and_no_others() -> None:
    metrics = only(render(FOLDERS[0]), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert {each["pods"]["metric"]["name"] for each in metrics} == {rule["name"]["as"] for rule in rules()}
    sources = "".join(path.read_text(encoding="utf-8") for path in (DOCKER.parent / "runtime").glob("*.py"))
    known = set(re.findall(r'"(trivium_\w+)"', sources))
    for rule in rules():
        used = re.findall(r"\btrivium_\w+", rule["seriesQuery"] + rule["metricsQuery"])
        assert {re.sub(r"_(sum|count)$", "", name) for name in used} <= known
    stages = set(re.findall(r'stage=~?"([\w|]+)"', "".join(rule["metricsQuery"] for rule in rules())))
    from trivium.runtime.metrics import STAGES

    assert {stage for found in stages for stage in found.split("|")} <= set(STAGES)


def test_the_autoscaler_s_metrics_have_the_right_values(promtool: Check, tmp_path: Path) -> None:
    """A busy pod of 4 workers: 10 requests a second that wait 30 ms each, 2 CPU-seconds a second; and an idle one."""
    rates = {
        'trivium_stage_seconds_sum{stage="queue",%s}': 0.3,
        'trivium_stage_seconds_count{stage="queue",%s}': 10,
        'trivium_stage_seconds_sum{stage="decode",%s}': 0.5,
        'trivium_stage_seconds_sum{stage="compute",%s}': 1.5,
        'trivium_stage_seconds_sum{stage="total",%s}': 9,
    }
    series = []
    for pod in ("busy", "idle", "stranger"):
        where = f'namespace="here",pod="{pod}"'
        for name, rate in rates.items():
            step = 0 if pod == "idle" else 5 * rate
            series.append({"series": name % where, "values": f"0+{step}x120"})
        series.append({"series": f"trivium_instances{{{where}}}", "values": "4+0x120"})
    wanted = {"trivium_queue_seconds": 0.03, "trivium_busy_ratio": 0.5}
    tests = [
        {
            "expr": f"round({expression(rule)}, 0.0001)",
            "eval_time": "9m",
            "exp_samples": [
                {"labels": '{pod="busy"}', "value": wanted[rule["name"]["as"]]},
                {"labels": '{pod="idle"}', "value": 0},
            ],
        }
        for rule in rules()
    ]
    file = tmp_path / "test.yml"
    trial = {"interval": "5s", "input_series": series, "promql_expr_test": tests}
    file.write_text(yaml.safe_dump({"evaluation_interval": "5s", "tests": [trial]}), encoding="utf-8")
    promtool("test", "rules", file)


def configuration() -> Document:
    """envoy.yaml."""
    return load(ENVOY)[0]


def found(name: str) -> list[Any]:
    """The values of every field of this name in envoy.yaml."""
    return [value for path, value in walk(configuration()) if path and path[-1] == name]


def seconds(value: str) -> float:
    return float(value.removesuffix("s"))


def test_envoy_takes_its_configuration(tool: Callable[[str], Check]) -> None:
    tool("envoy")("--mode", "validate", "--log-level", "warning", "--config-path", ENVOY)


@pytest.mark.parametrize("word", ["max_retries", "grpc_health_check", "retry_on", "max_stream_duration", "clusters"])
def test_envoy_refuses_a_typo(word: str, tool: Callable[[str], Check], tmp_path: Path) -> None:
    file = tmp_path / "envoy.yaml"
    file.write_text(re.sub(rf"\b{word}:", f"{word}x:", ENVOY.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    with pytest.raises(AssertionError, match=f"{word}x"):
        tool("envoy")("--mode", "validate", "--log-level", "warning", "--config-path", file)


def test_envoy_keeps_what_trials_found() -> None:
    assert found("max_retries") == [1000]
    assert "unavailable" in found("retry_on")[0].split(",")
    assert found("lb_policy") == ["ROUND_ROBIN"]
    assert found("outlier_detection")
    # envoy's own bound of 15 s would lose what waits in a queue
    assert found("timeout").count("0s") == 1
    assert found("request_body_buffer_limit") == [Settings().max_message_bytes]
    (check,) = found("health_checks")[0]
    noticed = (seconds(check["interval"]) + seconds(check["timeout"])) * check["unhealthy_threshold"]
    for _, _, settings in runtimes():
        assert noticed < settings.grace_seconds


def test_clients_have_left_an_envoy_before_it_ends() -> None:
    pod = only(render(DOCKER / "envoy"), "Deployment")["spec"]["template"]["spec"]
    leaving = seconds(found("max_connection_duration")[0]) + seconds(found("drain_timeout")[0])
    assert pause(container(pod)) >= leaving + 10
    assert pod["terminationGracePeriodSeconds"] > pause(container(pod))
    ports = {each["containerPort"] for each in container(pod)["ports"]}
    listening = {
        one["address"]["socket_address"]["port_value"] for one in configuration()["static_resources"]["listeners"]
    }
    assert ports == listening
    assert container(pod)["readinessProbe"]["httpGet"]["path"] in found("path")


def test_triton_is_started_as_its_image_is() -> None:
    image = parse(DOCKER / "Dockerfile.triton")[-1]
    one = container(load(DOCKER / "kubernetes/kserve/triton-runtime.yaml")[0]["spec"])
    words = [*one["command"], *one["args"]]
    for word in image.command("ENTRYPOINT"):
        assert word.replace("/models", "/mnt/models") in words
    exposed = {int(port) for port in image.last("EXPOSE").split()}
    assert {int(port) for port in re.findall(r"-port=(\d+)", " ".join(words))} == exposed
    assert {one[name]["httpGet"]["port"] for name in ("startupProbe", "readinessProbe", "livenessProbe")} <= exposed


def test_kserve_s_services_find_their_runtimes() -> None:
    for name in ("", "triton-"):
        (runtime,) = load(DOCKER / f"kubernetes/kserve/{name}runtime.yaml")
        (service,) = load(DOCKER / f"kubernetes/kserve/{name}inferenceservice.yaml")
        model = service["spec"]["predictor"]["model"]
        assert model["runtime"] == runtime["metadata"]["name"]
        assert model["modelFormat"].items() <= runtime["spec"]["supportedModelFormats"][0].items()
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
        assert int(runtime["spec"]["annotations"]["prometheus.kserve.io/port"]) == Settings().http_port
        one = container(runtime["spec"])
        assert one["ports"][0]["name"] == "h2c", "KServe takes the first port, and this name for HTTP/2 without TLS"
        assert "/mnt/models" in str(one), "there KServe puts the model"


def trainings() -> list[list[str]]:
    """The words after `trivium train` in each training manifest."""
    (job,) = load(DOCKER / "training/pytorchjob.yaml")
    one = container(job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"])
    assert one["command"] == ["torchrun", "-m", "trivium", "train"]
    (ray,) = load(DOCKER / "training/rayjob.yaml")
    words = shlex.split(ray["spec"]["entrypoint"])
    return [one["args"], words[words.index("--") + 1 :]]


def test_trainings_name_recipes_and_settings_that_exist() -> None:
    pytest.importorskip("torch", reason="recipes come with the extra train")
    from trivium.train.recipe import load_recipe

    for recipe, *words in trainings():
        load_recipe(recipe, [word.removeprefix("--set=") for word in words if word.startswith("--set=")])
        assert [word for word in words if not word.startswith("--set=")] == ["--out=/runs/student"]


def test_hosts_that_train_share_their_run() -> None:
    (job,) = load(DOCKER / "training/pytorchjob.yaml")
    (ray,) = load(DOCKER / "training/rayjob.yaml")
    cluster = ray["spec"]["rayClusterSpec"]
    pods = [job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]]
    pods += [cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]]
    for pod in pods:
        (mount,) = (each for each in container(pod)["volumeMounts"] if each["mountPath"] == "/runs")
        (volume,) = (each for each in pod["volumes"] if each["name"] == mount["name"])
        assert volume["persistentVolumeClaim"]["claimName"] == "trivium-runs"
    words = shlex.split(ray["spec"]["entrypoint"])
    assert cluster["workerGroupSpecs"][0]["replicas"] == int(words[words.index("--workers") + 1])
    script = Path(words[1])
    (copied,) = re.findall(r"^COPY (\S+\.py) (\S+)$", (DOCKER / "training/Dockerfile").read_text(), re.MULTILINE)
    assert str(script) == copied[1] + copied[0]
    assert (DOCKER / "training" / copied[0]).is_file()
    (base,) = re.findall(r"rayproject/ray:([\d.]+)-", (DOCKER / "training/Dockerfile").read_text())
    assert base == cluster["rayVersion"]


def test_the_training_image_passes_hadolint(tool: Callable[[str], Check]) -> None:
    tool("hadolint")("--no-color", DOCKER / "training/Dockerfile")
