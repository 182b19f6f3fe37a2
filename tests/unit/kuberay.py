"""KubeRay's custom resources (ray.io/v1) as its API reference of v1.6.2 gives them, and what its operator refuses.

Its CRD files are generated from the types that reference lists; where a type is Kubernetes' own (pods, services), so
is the model here, by the Python client's name. Sources: docs/reference/api.md and the operator's validation.go.
"""

import re
from typing import Any

import yaml
from kubernetes import client

POD, LABELS = "V1PodTemplateSpec", "dict(str, str)"
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")

KUBERAY: dict[str, dict[str, Any]] = {
    "RayJob": {
        "apiVersion!": ("ray.io/v1",),
        "kind!": ("RayJob",),
        "metadata": "V1ObjectMeta",
        "spec": "RayJobSpec",
    },
    "RayService": {
        "apiVersion!": ("ray.io/v1",),
        "kind!": ("RayService",),
        "metadata": "V1ObjectMeta",
        "spec": "RayServiceSpec",
    },
    "RayJobSpec": {
        "activeDeadlineSeconds": "int>=1",
        "backoffLimit": "int>=0",
        "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": POD,
        "metadata": LABELS,
        "clusterSelector": LABELS,
        "submitterConfig": "SubmitterConfig",
        "managedBy": MANAGERS,
        "deletionStrategy": "DeletionStrategy",
        "entrypoint": "str",
        "runtimeEnvYAML": "str",
        "jobId": "str",
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "entrypointResources": "str",
        "entrypointNumCpus": "float",
        "entrypointNumGpus": "float",
        "ttlSecondsAfterFinished": "int>=0",
        "preRunningDeadlineSeconds": "int>=1",
        "shutdownAfterJobFinishes": "bool",
        "suspend": "bool",
    },
    "SubmitterConfig": {"backoffLimit": "int"},
    "DeletionStrategy": {"deletionRules!": "list[DeletionRule]"},  # its older style is deprecated
    "DeletionRule": {
        "policy!": ("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
        "condition!": "DeletionCondition",
    },
    "DeletionCondition": {"jobStatus": "str", "jobDeploymentStatus": "str", "ttlSeconds": "int>=0"},
    "RayServiceSpec": {
        "rayClusterDeletionDelaySeconds": "int>=0",
        "serveService": "V1Service",
        "upgradeStrategy": "RayServiceUpgradeStrategy",
        "managedBy": MANAGERS,
        "serveConfigV2": "str",
        "rayClusterConfig": "RayClusterSpec",
        "excludeHeadPodFromServeSvc": "bool",
    },
    "RayServiceUpgradeStrategy": {
        "type": ("NewClusterWithIncrementalUpgrade", "NewCluster", "None"),
        "clusterUpgradeOptions": "ClusterUpgradeOptions",
    },
    "ClusterUpgradeOptions": {
        "maxSurgePercent": "int",
        "stepSizePercent": "int",
        "intervalSeconds": "int",
        "gatewayClassName!": "str",
    },
    "RayClusterSpec": {
        "upgradeStrategy": "RayClusterUpgradeStrategy",
        "authOptions": "AuthOptions",
        "suspend": "bool",
        "managedBy": MANAGERS,
        "autoscalerOptions": "AutoscalerOptions",
        "headServiceAnnotations": LABELS,
        "enableInTreeAutoscaling": "bool",
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions",
        "headGroupSpec!": "HeadGroupSpec",
        "rayVersion": "str",
        "workerGroupSpecs": "list[WorkerGroupSpec]",
    },
    "RayClusterUpgradeStrategy": {"type": ("Recreate", "None")},
    "AuthOptions": {"enableK8sTokenAuth": "bool", "secretName": "str", "mode": ("disabled", "token")},
    "AutoscalerOptions": {
        "resources": "V1ResourceRequirements",
        "image": "str",
        "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
        "securityContext": "V1SecurityContext",
        "idleTimeoutSeconds": "int",
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "version": ("v1", "v2"),
        "env": "list[V1EnvVar]",
        "envFrom": "list[V1EnvFromSource]",
        "volumeMounts": "list[V1VolumeMount]",
    },
    "GcsFaultToleranceOptions": {
        "redisUsername": "RedisCredential",
        "redisPassword": "RedisCredential",
        "externalStorageNamespace": "str",
        "redisAddress!": "str",
    },
    "RedisCredential": {"valueFrom": "V1EnvVarSource", "value": "str"},
    "HeadGroupSpec": {
        "template!": POD,
        "headService": "V1Service",
        "enableIngress": "bool",
        "resources": LABELS,
        "labels": LABELS,
        "rayStartParams": LABELS,
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    },
    "WorkerGroupSpec": {
        "suspend": "bool",
        "groupName!": "str",
        "replicas": "int",
        "minReplicas": "int",
        "maxReplicas": "int",
        "idleTimeoutSeconds": "int",
        "resources": LABELS,
        "labels": LABELS,
        "rayStartParams": LABELS,
        "template!": POD,
        "scaleStrategy": "ScaleStrategy",
        "numOfHosts": "int",
    },
    "ScaleStrategy": {"workersToDelete": "list[str]"},
}
"""Type by field; `!` where it must stand. A tuple is what the field may say, `int>=0` has the least."""

SCALARS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def problems(value: Any, model: Any, where: str = "") -> list[str]:
    """Where `value` is not what `model` asks for: unknown or missing fields, other types, words, too small numbers.

    model: a type of KUBERAY, a type as Kubernetes' Python client names it, a list or dict of one, a scalar, a tuple.
    """
    if isinstance(model, tuple):
        return [] if value in model else [f"{where}: {value!r} is none of {', '.join(model)}"]
    if (inner := re.fullmatch(r"(?:[Ll]ist\[|[Dd]ict[(\[]str, ?)(.+)[\])]", model)) is not None:
        if not isinstance(value, dict if model[0] in "Dd" else list):
            return [f"{where}: {value!r} is no {model}"]
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, part in parts for found in problems(part, inner[1], f"{where}[{key}]")]
    scalar, _, least = model.partition(">=")
    if scalar in SCALARS:
        wrong = not isinstance(value, SCALARS[scalar]) or (isinstance(value, bool) and scalar != "bool")
        if wrong or (least and value < int(least)):
            return [f"{where}: {value!r} is no {model}"]
        return []
    fields, required = fields_of(model)
    if not fields:
        return []  # `object` and dates of Kubernetes' client
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no {model}"]
    found = [f"{where}.{key} is unknown" for key in value.keys() - fields.keys()]
    found += [f"{where}.{key} is missing" for key in required - value.keys()]
    for key in value.keys() & fields.keys():
        found += problems(value[key], fields[key], f"{where}.{key}")
    return sorted(found)


def fields_of(model: str) -> tuple[dict[str, Any], set[str]]:
    """A type's fields with their types, and those that must stand; none for what is no type with fields."""
    if model in KUBERAY:
        fields = {name.removesuffix("!"): kind for name, kind in KUBERAY[model].items()}
        return fields, {name[:-1] for name in KUBERAY[model] if name.endswith("!")}
    kind = getattr(client, model, None)
    if kind is None:
        return {}, set()
    required = set()
    blank = kind.__new__(kind)
    blank.local_vars_configuration = client.Configuration()
    for attribute, name in kind.attribute_map.items():
        try:
            setattr(blank, attribute, None)
        except ValueError:  # the client's own check of what must not be absent
            required.add(name)
    return {name: kind.openapi_types[a] for a, name in kind.attribute_map.items()}, required


def refused(record: dict[str, Any]) -> list[str]:
    """What KubeRay's operator refuses in a RayJob or RayService whose fields are right, as far as it concerns what the
    manifests here use."""
    spec, is_job = record["spec"], record["kind"] == "RayJob"
    cluster = spec["rayClusterSpec" if is_job else "rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]}
    groups |= {g["groupName"]: g for g in cluster.get("workerGroupSpecs", [])}
    found = []
    # 63 letters of a label, less "-serve-svc" and the six letters a cluster's name gets.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", record["metadata"]["name"]):
        found.append("name: a DNS label that begins with a letter, of 47 letters at most")
    if is_job and spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished asks for shutdownAfterJobFinishes")
    if is_job and not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        found.append("runtimeEnvYAML is no YAML mapping")
    version = tuple(int(n) for n in cluster.get("rayVersion", "0").split(".")[:2])
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        found.append("a token asks for rayVersion 2.52 or later")
    options = cluster.get("autoscalerOptions", {})
    scaled_by_v2 = cluster.get("enableInTreeAutoscaling") and options.get("version") == "v2"
    for name, group in groups.items():
        parameters, pod = group.get("rayStartParams", {}), group["template"]["spec"]
        if not pod["containers"]:
            found.append(f"{name}: no container")
        if group.get("resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            found.append(f"{name}: resources both in rayStartParams and in resources")
        if "labels" in parameters:
            found.append(f"{name}: labels in rayStartParams")
        if scaled_by_v2 and pod.get("restartPolicy", "Never") != "Never":
            found.append(f"{name}: restartPolicy other than Never with autoscaler v2")
        environment = {e["name"] for c in pod["containers"] for e in c.get("env", [])}
        if "RAY_enable_autoscaler_v2" in environment and "version" in options:
            found.append(f"{name}: autoscalerOptions.version and RAY_enable_autoscaler_v2")
    return found
