"""deploy/ as Kustomize renders it, against KubeRay's and Kubernetes' types, the operator's own checks, Pod Security,
and the promises its comments make.

KubeRay's CRD files are in no package: with a copy of them (helm-chart/kuberay-operator/crds) in the folder
LATENT_KUBERAY_CRDS names, the manifests are held against those too.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
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
SECRET = "latent-ray-token"
OVERLAYS = sorted(str(f.parent.relative_to(DEPLOY)) for f in DEPLOY.glob("overlays/*/*/kustomization.yaml"))
COMPONENTS = sorted(f.parent.name for f in DEPLOY.glob("components/*/kustomization.yaml"))


def render(folder: Path) -> list[dict[str, Any]]:
    """The manifests of a Kustomize folder, by the real Kustomize."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]) is not None:
            done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return list(yaml.safe_load_all(done.stdout))
    pytest.skip("needs kustomize or kubectl in PATH")


@functools.cache
def _rendered(overlay: str) -> str:
    return json.dumps(render(DEPLOY / overlay))


def rendered(overlay: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(_rendered(overlay))
    return records


def one(records: list[dict[str, Any]], *kinds: str) -> dict[str, Any]:
    (record,) = [r for r in records if r["kind"] in kinds]
    return record


def ray_of(overlay: str) -> dict[str, Any]:
    return one(rendered(overlay), "RayJob", "RayService")


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cluster_of(record: dict[str, Any]) -> dict[str, Any]:
    spec = record["spec"]
    cluster: dict[str, Any] = spec["rayClusterSpec" if record["kind"] == "RayJob" else "rayClusterConfig"]
    return cluster


def pods_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates by name of their group, the job's submitter among them."""
    cluster = cluster_of(record)
    groups = {g["groupName"]: g["template"] for g in cluster["workerGroupSpecs"]}
    if record["kind"] == "RayJob":
        groups["submitter"] = record["spec"]["submitterPodTemplate"]
    return {"head": cluster["headGroupSpec"]["template"], **groups}


# ---- schemas


def test_every_cloud_has_its_overlay_of_every_work() -> None:
    works = {(o.split("/")[1], o.split("/")[2]) for o in OVERLAYS}
    assert works >= {(c, w) for c in ("cpu", "eks", "gke") for w in ("backfill", "train", "serve")}
    assert ("gpu", "train") in works


def test_kuberay_knows_every_field_and_its_operator_refuses_none(overlay: str) -> None:
    record = ray_of(overlay)
    assert problems(record, record["kind"]) == []
    assert refused(record) == []
    # What KubeRay would fill in by itself, and differently from one release to the next.
    cluster = cluster_of(record)
    assert {"version", "upscalingMode"} <= cluster["autoscalerOptions"].keys()
    assert all("rayStartParams" in g for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))


TYPES = {
    "Namespace": "V1Namespace",
    "ServiceAccount": "V1ServiceAccount",
    "NetworkPolicy": "V1NetworkPolicy",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
}
OPERATORS = {"PodMonitor": "monitoring.coreos.com/v1", "PrometheusRule": "monitoring.coreos.com/v1"}


@pytest.fixture
def with_component(tmp_path: Path) -> Any:
    def make(overlay: str, *components: str) -> list[dict[str, Any]]:
        """The overlay with components beside those it has, as docs/operations.md adds them."""
        shutil.copytree(DEPLOY, tmp_path / "deploy")
        file = tmp_path / "deploy" / overlay / "kustomization.yaml"
        settings = yaml.safe_load(file.read_text())
        settings.setdefault("components", []).extend(f"../../../components/{c}" for c in components)
        file.write_text(yaml.safe_dump(settings))
        return render(file.parent)

    return make


@pytest.mark.parametrize("work", ["backfill", "train", "serve"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_kubernetes_knows_all_else_with_every_component(
    with_component: Any, component: str, work: str
) -> None:
    records = with_component(f"overlays/cpu/{work}", component)
    for record in records:
        if record["kind"] in TYPES:
            assert problems(record, TYPES[record["kind"]]) == []
        elif record["kind"] in OPERATORS:
            assert record["apiVersion"] == OPERATORS[record["kind"]]
        else:
            assert problems(record, record["kind"]) == []
            assert refused(record) == []
    assert {r["metadata"].get("namespace", r["metadata"]["name"]) for r in records} == {"latent"}


def test_the_service_account_of_every_pod_is_among_the_manifests(overlay: str) -> None:
    accounts = {r["metadata"]["name"] for r in rendered(overlay) if r["kind"] == "ServiceAccount"}
    pods = pods_of(ray_of(overlay))
    used = {t["spec"]["serviceAccountName"] for name, t in pods.items() if name != "submitter"}
    assert used == accounts == {"latent"}
    notes = one(rendered(overlay), "ServiceAccount")["metadata"].get("annotations", {})
    wanted = {"eks": {"eks.amazonaws.com/role-arn"}, "gke": {"iam.gke.io/gcp-service-account"}}
    assert notes.keys() == wanted.get(overlay.split("/")[1], set())


def restricted(pod: dict[str, Any]) -> list[str]:
    """What the profile "restricted" of Kubernetes' Pod Security Standards (v1.30) refuses in a pod's spec."""
    own, found = pod.get("securityContext", {}), []
    if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        found.append("host namespaces")
    kinds = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    found += [v["name"] for v in pod.get("volumes", []) if not (v.keys() - {"name"}) <= kinds]
    for container in pod["containers"]:
        context = {**own, **container.get("securityContext", {})}
        if context.get("allowPrivilegeEscalation") is not False:
            found.append("allowPrivilegeEscalation")
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
            found.append("runAsNonRoot")
        if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append("seccompProfile")
        capabilities = context.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append("capabilities")
    return found


def test_pod_security_restricted_takes_every_pod(overlay: str) -> None:
    for name, template in pods_of(ray_of(overlay)).items():
        assert restricted(template["spec"]) == [], name
    # The autoscaler's container, which the operator adds to the head's pod.
    head = cluster_of(ray_of(overlay))["headGroupSpec"]["template"]["spec"]
    beside = {
        "containers": [
            {"securityContext": cluster_of(ray_of(overlay))["autoscalerOptions"]["securityContext"]}
        ]
    }
    assert restricted({**head, **beside}) == []
    labels = one(rendered(overlay), "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_pod_security_would_refuse_the_pods_of_before() -> None:
    plain = {"securityContext": {"runAsNonRoot": True, "runAsUser": 1000}, "containers": [{}]}
    assert restricted(plain) == ["allowPrivilegeEscalation", "seccompProfile", "capabilities"]


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
        ("spec.runtimeEnvYAML", "- a list", "no YAML mapping"),
        ("spec.rayClusterSpec.rayVersion", "2.51.0", "2.52 or later"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers", [], "head: no container"),
        ("spec.rayClusterSpec.headGroupSpec.resources", {"CPU": "0"}, "resources both"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams.labels", "a=b", "workers: labels"),
        (
            "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.restartPolicy",
            "Always",
            "workers: restartPolicy",
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
    record = ray_of("overlays/cpu/backfill")
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


def test_a_cluster_that_would_stay_for_ever_is_found_out() -> None:
    record = ray_of("overlays/cpu/backfill")
    record["spec"] |= {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 60}
    assert refused(record) == ["ttlSecondsAfterFinished asks for shutdownAfterJobFinishes"]


def test_kuberays_own_schema_takes_it(overlay: str) -> None:
    folder = os.environ.get("LATENT_KUBERAY_CRDS")
    if folder is None:
        pytest.skip(
            "LATENT_KUBERAY_CRDS names no folder with KubeRay's CRDs (ray.io_rayjobs.yaml, ray.io_rayservices.yaml)"
        )
    record = ray_of(overlay)
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


def test_the_token_is_asked_for_and_never_written_down(overlay: str) -> None:
    record = ray_of(overlay)
    assert cluster_of(record)["authOptions"] == {"mode": "token", "secretName": SECRET}
    if record["kind"] == "RayJob":
        (submitter,) = record["spec"]["submitterPodTemplate"]["spec"]["containers"]
        given = {e["name"]: e for e in submitter["env"]}
        assert given.keys() == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
        reference = given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": SECRET, "key": "auth_token"}
    text = json.dumps(rendered(overlay))
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)
    assert "stringData" not in text


def test_versions_are_those_the_project_asks_for(overlay: str) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    record = ray_of(overlay)
    version = cluster_of(record)["rayVersion"]
    for file in ("cpu", "gpu", "dev"):
        assert f"\nray=={version} " in (DEPLOY / "requirements" / f"{file}.txt").read_text()
    for file in ("Dockerfile", "Dockerfile.gpu"):
        assert f"FROM rayproject/ray:{version}-py311\n" in (DEPLOY / file).read_text()
    assert project["requires-python"] == ">=3.11"
    wanted = "registry.example.com/latent:" + project["version"].removesuffix(".dev0")
    for name, template in pods_of(record).items():
        (container,) = template["spec"]["containers"]
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"] == wanted + "-gpu" * gpu, name


def test_every_container_has_requests_limits_probes_and_no_privileges(overlay: str) -> None:
    record = ray_of(overlay)
    cluster = cluster_of(record)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group, template in pods_of(record).items():
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "latent"
        for container in template["spec"]["containers"]:
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), group
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
            if group == "submitter":
                continue
            for probe in (container["livenessProbe"], container["readinessProbe"]):
                port = re.search(r"localhost:(\d+)/", probe["exec"]["command"][-1])
                assert port is not None
                assert port[1] in ("8265", "52365", "8000")
    (head,) = pods_of(record)["head"]["spec"]["containers"]
    ports = {p["name"]: p["containerPort"] for p in head["ports"]}
    assert {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}.items() <= ports.items()
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


def cpus_of(template: dict[str, Any]) -> float:
    (container,) = template["spec"]["containers"]
    return float(container["resources"]["limits"]["cpu"])


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if not o.endswith("serve")])
def test_the_entrypoints_options_exist_and_the_cluster_goes_with_the_job(overlay: str) -> None:
    spec = ray_of(overlay)["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["python", "-m"]
    used = {w for w in words[3:] if w.startswith("--")}
    assert used
    assert used <= options_of(words[2])
    assert spec["shutdownAfterJobFinishes"] is True
    assert (
        spec.get("ttlSecondsAfterFinished", 0) == 0
    )  # seconds that KubeRay keeps the whole cluster, GPUs and all


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o.endswith("train")])
def test_four_runs_fit_at_once_beside_the_driver(overlay: str) -> None:
    from jobs._training import plan_resources

    spec = ray_of(overlay)["spec"]
    # The driver takes none of the worker's CPUs: without a wish of its own Ray puts it on the head.
    assert not spec.keys() & {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"}
    worker = pods_of(ray_of(overlay))["workers"]
    gpus = float(worker["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
    node = {"CPU": cpus_of(worker), **({"GPU": gpus} if gpus else {})}
    resources, _, _ = plan_resources([{"CPU": 0.0}, node], 4)
    assert all(4 * part <= node[kind] for kind, part in resources.items())
    assert shlex.split(spec["entrypoint"])[-3] == "original"


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o.endswith("backfill")])
def test_a_backfill_uses_every_replica_it_may_have(overlay: str) -> None:
    from jobs.encode import MOST_WORKERS

    record = ray_of(overlay)
    assert "--max-workers" not in record["spec"]["entrypoint"]
    (group,) = cluster_of(record)["workerGroupSpecs"]
    assert group["maxReplicas"] * cpus_of(group["template"]) <= MOST_WORKERS


def test_only_a_backfills_workers_run_where_the_cloud_may_take_the_node(overlay: str) -> None:
    cloud, work = overlay.split("/")[1:]
    spot = {"eks": {"eks.amazonaws.com/capacityType": "SPOT"}, "gke": {"cloud.google.com/gke-spot": "true"}}
    for group, template in pods_of(ray_of(overlay)).items():
        wanted = spot.get(cloud) if (work, group) == ("backfill", "workers") else None
        assert template["spec"].get("nodeSelector") == wanted, group
        taints = {t["key"] for t in template["spec"].get("tolerations", [])}
        # Both names are the clouds' own; kubernetes.io/spot is nobody's.
        assert taints <= {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
        assert ("nvidia.com/gpu" in taints) == (
            "nvidia.com/gpu" in json.dumps(template["spec"]["containers"])
        )


def test_the_service_runs_the_shipped_serve_config() -> None:
    record = ray_of("overlays/cpu/serve")
    shipped = yaml.safe_load((CHECKOUT / "serve" / "config.yaml").read_text())
    assert "ENV PYTHONPATH=" in (DEPLOY / "Dockerfile").read_text()  # what the configuration counts on
    assert yaml.safe_load(record["spec"]["serveConfigV2"]) == shipped
    arguments = shipped["applications"][0]["args"]
    for template in pods_of(record).values():
        (container,) = template["spec"]["containers"]
        mounts = [m["mountPath"] for m in container["volumeMounts"]]
        assert any(arguments["api_keys_file"].startswith(mount + "/") for mount in mounts)
        assert shipped["http_options"]["port"] in {p["containerPort"] for p in container["ports"]}
        cache = {e["name"]: e["value"] for e in container["env"]}["LATENT_CACHE"]
        assert cache in mounts
    assert arguments["run"].startswith("s3://")


def test_a_drained_node_takes_one_worker_and_never_the_head() -> None:
    records = rendered("overlays/cpu/serve")
    budgets = {r["metadata"]["name"]: r["spec"] for r in records if r["kind"] == "PodDisruptionBudget"}
    pods = pods_of(one(records, "RayService"))
    for name, group, most in (("latent-workers", "workers", 1), ("latent-heads", "head", 0)):
        labels = budgets[name]["selector"]["matchLabels"]
        assert labels.items() <= pods[group]["metadata"]["labels"].items()
        others = [t["metadata"]["labels"] for g, t in pods.items() if g != group]
        assert not any(labels.items() <= other.items() for other in others)
        assert budgets[name]["maxUnavailable"] == most
    spread = pods["workers"]["spec"]["topologySpreadConstraints"]
    assert [c["topologyKey"] for c in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    for constraint in spread:
        assert (
            constraint["labelSelector"]["matchLabels"].items()
            <= pods["workers"]["metadata"]["labels"].items()
        )


def allows(policy: dict[str, Any], direction: str, port: int, **peer: Any) -> bool:
    """Whether a rule of the network policy has this port and this peer."""
    key = {"ingress": "from", "egress": "to"}[direction]
    for rule in policy[direction]:
        ports = [p["port"] for p in rule.get("ports", [])]
        if (not ports or port in ports) and (key not in rule or peer in rule[key]):
            return True
    return False


def test_the_network_policy_covers_every_pod_and_opens_nothing_to_all(overlay: str) -> None:
    policy = one(rendered(overlay), "NetworkPolicy")["spec"]
    label = policy["podSelector"]["matchLabels"]
    templates = pods_of(ray_of(overlay)).values()
    assert all(t["metadata"]["labels"].items() >= label.items() for t in templates)
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule.get("from") for rule in policy["ingress"])
    outside = [
        r for r in policy["ingress"] if label != r["from"][0].get("podSelector", {}).get("matchLabels")
    ]
    assert {p["port"] for rule in outside for p in rule["ports"]} == {8000, 8080, 8265}
    assert all(peer.get("podSelector", {}).get("matchLabels") for r in outside for peer in r["from"])


def test_the_operator_names_and_credentials_get_through_wherever_they_are() -> None:
    policy = one(rendered("overlays/eks/serve"), "NetworkPolicy")["spec"]
    # Helm's chart puts this label on the operator, in whatever namespace it is installed.
    operator = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    for port in (8265, 8000):
        assert allows(policy, "ingress", port, namespaceSelector={}, podSelector=operator)
    dns = {"matchLabels": {"k8s-app": "kube-dns"}}
    assert allows(policy, "egress", 53, namespaceSelector={}, podSelector=dns)
    assert allows(policy, "egress", 53, ipBlock={"cidr": "169.254.20.10/32"})
    for address, port in (("169.254.169.254", 80), ("169.254.170.23", 80), ("169.254.169.252", 988)):
        assert allows(policy, "egress", port, ipBlock={"cidr": f"{address}/32"})
    assert not allows(policy, "egress", 80, ipBlock={"cidr": "0.0.0.0/0"})


def test_alerts_and_monitor_name_what_the_service_measures() -> None:
    folder = DEPLOY / "components" / "monitoring"
    rules = yaml.safe_load((folder / "alerts.yaml").read_text())["spec"]["groups"][0]["rules"]
    measured = set(re.findall(r'"(latent_\w+)"', (CHECKOUT / "serve" / "metrics.py").read_text()))
    used = {name for rule in rules for name in re.findall(r"ray_(latent_\w+)", rule["expr"])}
    assert len(used) >= 4
    assert used <= measured | {f"{name}_total" for name in measured}
    monitor = yaml.safe_load((folder / "pod-monitor.yaml").read_text())["spec"]
    for template in pods_of(ray_of("overlays/cpu/serve")).values():
        assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["port"] in {p.get("name") for p in template["spec"]["containers"][0]["ports"]}


@pytest.mark.parametrize(("file", "device"), [("Dockerfile", "cpu"), ("Dockerfile.gpu", "gpu")])
def test_the_image_holds_what_the_jobs_import_and_installs_from_the_lock(file: str, device: str) -> None:
    lines = (DEPLOY / file).read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    parts = {"pyproject.toml", "README.md", "LICENSE", "lvm", "jobs", "serve", "data/sample"}
    assert parts | {"deploy/install.sh", "deploy/requirements"} == copied
    assert all((CHECKOUT / part).exists() for part in copied)
    assert f"RUN bash deploy/install.sh {device} python" in lines
    assert any("RAY_AUTH_MODE=token" in line and "PYTHONPATH=/opt/latent" in line for line in lines)


def test_the_proxies_of_the_service_ask_for_its_keys() -> None:
    from serve.front import CALLBACK, VARIABLE, FrontArgs, environment

    record = ray_of("overlays/cpu/serve")
    keys = yaml.safe_load(record["spec"]["serveConfigV2"])["applications"][0]["args"]["api_keys_file"]
    for template in pods_of(record).values():
        (container,) = template["spec"]["containers"]
        given = {entry["name"]: entry["value"] for entry in container["env"]}
        assert given[CALLBACK] == environment(FrontArgs())[CALLBACK]
        assert FrontArgs.model_validate_json(given[VARIABLE]).api_keys_file == keys
