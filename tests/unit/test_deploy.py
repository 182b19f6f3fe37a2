"""deploy/ against KubeRay's and Kubernetes' types, the operator's own checks, and the promises its comments make.

KubeRay's CRD files are in no package: with a copy of them (helm-chart/kuberay-operator/crds) in the folder
LATENT_KUBERAY_CRDS names, the manifests are held against those too.
"""

import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.commands import options_of
from tests.unit.kuberay import problems, refused

CHECKOUT = Path(__file__).parents[2]
DEPLOY = CHECKOUT / "deploy"
RAY_FILES = ("backfill.yaml", "train.yaml", "serve.yaml")
SECRET = "latent-ray-token"


def load(file: str) -> dict[str, Any]:
    record: dict[str, Any] = yaml.safe_load((DEPLOY / file).read_text())
    return record


def cluster_of(record: dict[str, Any]) -> dict[str, Any]:
    spec = record["spec"]
    cluster: dict[str, Any] = spec["rayClusterSpec" if record["kind"] == "RayJob" else "rayClusterConfig"]
    return cluster


def pods_of(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates by name of their group."""
    groups = {g["groupName"]: g["template"] for g in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


# ---- schemas


@pytest.mark.parametrize("file", RAY_FILES)
def test_kuberay_knows_every_field_and_its_operator_refuses_none(file: str) -> None:
    record = load(file)
    assert problems(record, record["kind"]) == []
    assert refused(record) == []
    # What KubeRay would fill in by itself, and differently from one release to the next.
    cluster = cluster_of(record)
    assert {"version", "upscalingMode"} <= cluster["autoscalerOptions"].keys()
    assert all("rayStartParams" in g for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))


def test_kubernetes_knows_the_network_policy() -> None:
    assert problems(load("network-policy.yaml"), "V1NetworkPolicy") == []


CONTAINER = "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0"


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("apiVersion", "ray.io/v2", ".apiVersion: 'ray.io/v2' is none of ray.io/v1"),
        ("spec.backofLimit", 3, ".spec.backofLimit is unknown"),
        ("spec.backoffLimit", -1, ".spec.backoffLimit: -1 is no int>=0"),
        ("spec.shutdownAfterJobFinishes", "yes", ".spec.shutdownAfterJobFinishes: 'yes' is no bool"),
        ("spec.entrypointNumCpus", "1", ".spec.entrypointNumCpus: '1' is no float"),
        ("spec.rayClusterSpec.authOptions.mode", "basic", "'basic' is none of disabled, token"),
        ("spec.rayClusterSpec.autoscalerOptions.version", 2, "2 is none of v1, v2"),
        ("spec.rayClusterSpec.headGroupSpec", None, ".spec.rayClusterSpec.headGroupSpec is missing"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "[num-cpus]: 0 is no str"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.groupName", None, "[0].groupName is missing"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", True, ".maxReplicas: True is no int"),
        (f"{CONTAINER}.readinesProbe", {}, ".readinesProbe is unknown"),
        (f"{CONTAINER}.name", None, ".containers[0].name is missing"),
        (f"{CONTAINER}.ports.0.containerPort", "6379", ".containerPort: '6379' is no int"),
        (f"{CONTAINER}.ports.0", 6379, ".ports[0]: 6379 is no V1ContainerPort"),
        ("metadata.name", "l" * 48, "47 letters"),
        ("metadata.name", "1st", "begins with a letter"),
        ("spec.shutdownAfterJobFinishes", False, "asks for shutdownAfterJobFinishes"),
        ("spec.runtimeEnvYAML", "- a list", "no YAML mapping"),
        ("spec.rayClusterSpec.rayVersion", "2.51.0", "2.52 or later"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers", [], "head: no container"),
        ("spec.rayClusterSpec.headGroupSpec.resources", {"CPU": "0"}, "resources both"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams.labels", "a=b", "cpu: labels"),
        (
            "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.restartPolicy",
            "Always",
            "cpu: restartPolicy",
        ),
        (
            f"{CONTAINER}.env",
            [{"name": "RAY_enable_autoscaler_v2", "value": "1"}],
            "autoscalerOptions.version",
        ),
    ],
)
def test_a_wrong_manifest_is_found_out(path: str, value: Any, problem: str) -> None:
    """value: None takes the field away."""
    record = load("backfill.yaml")
    *parents, last = (int(step) if step.isdigit() else step for step in path.split("."))
    place: Any = record
    for step in parents:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    (found,) = problems(record, "RayJob") or refused(record)
    assert problem in found


@pytest.mark.parametrize("file", RAY_FILES)
def test_kuberays_own_schema_takes_it(file: str) -> None:
    folder = os.environ.get("LATENT_KUBERAY_CRDS")
    if folder is None:
        pytest.skip(
            "LATENT_KUBERAY_CRDS names no folder with KubeRay's CRDs (ray.io_rayjobs.yaml, ray.io_rayservices.yaml)"
        )
    record = load(file)
    definition = yaml.safe_load((Path(folder) / f"ray.io_{record['kind'].lower()}s.yaml").read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    errors = [f"{e.json_path}: {e.message}" for e in Draft202012Validator(schema).iter_errors(record)]
    assert errors == []


def closed(schema: Any) -> Any:
    """The schema as the API server applies it: fields it does not name are refused; quantities are text or numbers."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
    free = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if made.get("type") == "object" and isinstance(made.get("properties"), dict) and not free:
        made["additionalProperties"] = False
    return made


# ---- what the comments promise


@pytest.mark.parametrize("file", RAY_FILES)
def test_the_token_is_asked_for_and_never_written_down(file: str) -> None:
    text = (DEPLOY / file).read_text()
    assert cluster_of(load(file))["authOptions"] == {"mode": "token", "secretName": SECRET}
    assert f"kubectl create secret generic {SECRET} --from-literal=auth_token=" in text
    for line in text.splitlines():
        if "RAY_AUTH_TOKEN" in line:
            assert "secretKeyRef" in line
            assert f"name: {SECRET}, key: auth_token" in line
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)
    assert "stringData" not in text
    if load(file)["kind"] == "RayJob":
        (submitter,) = load(file)["spec"]["submitterPodTemplate"]["spec"]["containers"]
        assert {e["name"] for e in submitter["env"]} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


@pytest.mark.parametrize("file", RAY_FILES)
def test_versions_are_those_the_project_asks_for(file: str) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    (ray,) = [d for d in project["dependencies"] if d.startswith("ray[")]
    least = re.search(r">=([\d.]+)", ray)
    assert least is not None
    version = cluster_of(load(file))["rayVersion"]
    assert version.startswith(least[1])
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"ARG RAY_TAG={version}-py311\n" in dockerfile
    assert project["requires-python"] == ">=3.11"
    images = {c["image"] for t in pods_of(cluster_of(load(file))).values() for c in t["spec"]["containers"]}
    assert len(images) == 1
    assert images.pop().endswith("/latent:" + project["version"].removesuffix(".dev0"))


@pytest.mark.parametrize("file", RAY_FILES)
def test_every_container_has_requests_limits_probes_and_no_privileges(file: str) -> None:
    cluster = cluster_of(load(file))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group, template in pods_of(cluster).items():
        assert template["metadata"]["labels"] == {"app.kubernetes.io/part-of": "latent"}
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), group
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            probes = [container["livenessProbe"], container["readinessProbe"]]
            for probe in probes:
                port = re.search(r"localhost:(\d+)/", probe["exec"]["command"][-1])
                assert port is not None
                assert port[1] in ("8265", "52365", "8000")
    ports = {
        p["name"]: p["containerPort"] for p in pods_of(cluster)["head"]["spec"]["containers"][0]["ports"]
    }
    assert {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}.items() <= ports.items()
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("file", ["backfill.yaml", "train.yaml"])
def test_the_entrypoints_options_exist(file: str) -> None:
    words = shlex.split(load(file)["spec"]["entrypoint"])
    assert words[:2] == ["python", "-m"]
    used = {w for w in words[3:] if w.startswith("--")}
    assert used
    assert used <= options_of(words[2])


def test_the_service_runs_the_shipped_serve_config() -> None:
    record = load("serve.yaml")
    shipped = yaml.safe_load((CHECKOUT / "serve" / "config.yaml").read_text())
    assert "ENV PYTHONPATH=" in (DEPLOY / "Dockerfile").read_text()  # what the configuration counts on
    assert yaml.safe_load(record["spec"]["serveConfigV2"]) == shipped
    arguments = shipped["applications"][0]["args"]
    for template in pods_of(cluster_of(record)).values():
        (container,) = template["spec"]["containers"]
        mounts = [m["mountPath"] for m in container["volumeMounts"]]
        for path in (arguments["run"], arguments["api_keys_file"]):
            assert any(path.startswith(mount + "/") for mount in mounts), path
        assert shipped["http_options"]["port"] in {p["containerPort"] for p in container["ports"]}


def test_the_network_policy_covers_every_pod_and_opens_nothing_to_all() -> None:
    policy = load("network-policy.yaml")["spec"]
    label = policy["podSelector"]["matchLabels"]
    templates = [t for f in RAY_FILES for t in pods_of(cluster_of(load(f))).values()]
    templates += [load(f)["spec"]["submitterPodTemplate"] for f in ("backfill.yaml", "train.yaml")]
    assert all(t["metadata"]["labels"].items() >= label.items() for t in templates)
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule.get("from") for rule in policy["ingress"])
    outside = [
        rule
        for rule in policy["ingress"]
        if label != rule["from"][0].get("podSelector", {}).get("matchLabels")
    ]
    assert sorted(p["port"] for rule in outside for p in rule["ports"]) == [8000, 8080, 8265]


def test_the_image_holds_what_the_jobs_import() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    assert {"pyproject.toml", "README.md", "LICENSE", "lvm", "jobs", "serve", "data/sample"} == copied
    assert all((CHECKOUT / part).exists() for part in copied)
    assert any("RAY_AUTH_MODE=token" in line and "PYTHONPATH=/opt/latent" in line for line in lines)


def test_the_proxies_of_the_service_ask_for_its_keys() -> None:
    from serve.front import CALLBACK, VARIABLE, FrontArgs, environment

    record = load("serve.yaml")
    keys = yaml.safe_load(record["spec"]["serveConfigV2"])["applications"][0]["args"]["api_keys_file"]
    cluster = record["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        given = {entry["name"]: entry["value"] for entry in container["env"]}
        assert given[CALLBACK] == environment(FrontArgs())[CALLBACK]
        assert FrontArgs.model_validate_json(given[VARIABLE]).api_keys_file == keys
