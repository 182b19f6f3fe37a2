"""cluster.yaml and its twins for other clouds against Ray's own schema, scheduler and providers, and their promises."""

import copy
import inspect
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import hash_runtime_conf, prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

from jobs._ray import bundles

CHECKOUT = Path(__file__).parents[2]
DEPLOY = CHECKOUT / "deploy"
FILES = ("cluster.yaml", "deploy/gcp/cluster.yaml", "deploy/azure/cluster.yaml")
RAY = Path(ray.__file__).parent


def load(file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHECKOUT / file).read_text())
    return loaded


@pytest.fixture(params=FILES)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


@pytest.fixture
def aws() -> dict[str, Any]:
    return load("cluster.yaml")


def launched(
    cluster: dict[str, Any],
    demand: Sequence[dict[str, float]],
    refused: Sequence[str] = (),
    as_wish: bool = False,
) -> Counter[str]:
    """Nodes by type that Ray's scheduler (v2, that of `ray up`) starts on an empty cluster for tasks or actors that
    wait for these resources. refused: types the cloud has none of. as_wish: by `request_resources` instead."""
    config = AutoscalingConfig(copy.deepcopy(cluster), skip_content_hash=True)
    by_count = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(d) for d in demand])
    wish = ClusterResourceConstraint(resource_requests=by_count)
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_worker_nodes(),  # the head is there already
            recoverable_resource_availabilities=dict.fromkeys(refused, 0.0),
            **({"cluster_resource_constraints": [wish]} if as_wish else {"resource_requests": by_count}),
        )
    )
    return Counter({r.instance_type: r.count for r in reply.to_launch if r.instance_type != "head"})


def test_rays_schema_takes_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_rays_schema_would_have_refused_a_wrong_key(aws: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(prepare_config({**copy.deepcopy(aws), "idle_minutes": 5}))


def test_the_head_takes_no_work_and_workers_start_at_none(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert "priority" not in types["head"]
    workers = {name: kind for name, kind in types.items() if name != cluster["head_node_type"]}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert any(kind["resources"].get("GPU") for kind in workers.values())


def test_spot_is_taken_first_and_on_demand_where_there_is_none(cluster: dict[str, Any]) -> None:
    cpus = bundles(None) * 192
    assert launched(cluster, cpus) == {"cpu_spot": 24}
    assert launched(cluster, cpus, refused=["cpu_spot"]) == {"cpu_on_demand": 24}
    assert launched(cluster, bundles(2)) == {"gpu_spot": 2}
    assert launched(cluster, bundles(2), refused=["gpu_spot"]) == {"gpu_on_demand": 2}


def test_without_priorities_the_scheduler_would_mix_spot_and_on_demand(aws: dict[str, Any]) -> None:
    for kind in aws["available_node_types"].values():
        kind.pop("priority", None)
    assert launched(aws, bundles(None) * 192)["cpu_on_demand"] > 0


def test_a_cpu_backfill_buys_no_gpu_node_however_large(cluster: dict[str, Any]) -> None:
    found = launched(cluster, bundles(None) * 900)
    assert found == {"cpu_spot": cluster["max_workers"]}


def test_a_gpu_of_amount_0_would_buy_a_gpu_node(aws: dict[str, Any]) -> None:
    """Why `bundles` leaves it out: three CPUs fill a GPU node better, and Ray, sparing GPUs, looks for the name."""
    for kind in aws["available_node_types"].values():
        kind["resources"]["memory"] = 4 << 30  # as `ray up` fills in from the instance type
    assert launched(aws, bundles(None) * 3) == {"cpu_spot": 1}
    assert launched(aws, [{"CPU": 1.0, "GPU": 0.0}] * 3) == {"gpu_spot": 1}
    assert all(value > 0 for gpus in (None, 1, 4) for bundle in bundles(gpus) for value in bundle.values())


def test_a_wish_that_cannot_be_met_in_full_buys_nothing(aws: dict[str, Any]) -> None:
    """Why a backfill's actors wait for room, and nothing is asked by `request_resources`."""
    assert launched(aws, bundles(None) * 900, as_wish=True) == {}


def test_each_spot_type_has_a_fallback_of_the_same_size(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    market = {"InstanceMarketOptions", "scheduling", "priority", "billingProfile"}

    def plain(node: dict[str, Any]) -> dict[str, Any]:
        node = node.get("azure_arm_parameters", node)
        return {k: v for k, v in node.items() if k not in market}

    for kind in ("cpu", "gpu"):
        spot, other = types[f"{kind}_spot"], types[f"{kind}_on_demand"]
        assert spot["node_config"] != other["node_config"]
        assert plain(spot["node_config"]) == plain(other["node_config"])
        assert (spot["resources"], spot["max_workers"]) == (other["resources"], other["max_workers"])
        assert spot["priority"] > other.get("priority", 0)


def test_azures_template_knows_every_parameter() -> None:
    template = json.loads((RAY / "autoscaler/_private/_azure/azure-vm-template.json").read_text())
    for kind in load("deploy/azure/cluster.yaml")["available_node_types"].values():
        assert kind["node_config"]["azure_arm_parameters"].keys() <= template["parameters"].keys()


def test_every_node_asks_for_the_token_and_the_dashboard_stays_on_loopback(cluster: dict[str, Any]) -> None:
    starts = [
        command
        for which in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in cluster[which]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_three_files_differ_in_what_the_cloud_is_alone() -> None:
    def common(cluster: dict[str, Any]) -> dict[str, Any]:
        own = ("provider", "available_node_types", "initialization_commands")
        return {k: v for k, v in cluster.items() if k not in own}

    for file, cloud in zip(FILES, ("aws", "gcp", "azure"), strict=True):
        cluster = load(file)
        assert cluster["provider"]["type"] == cloud
        assert cluster.pop("setup_commands") == [f"bash ~/latent/deploy/node.sh {cloud}"]
        wanted = load("cluster.yaml")
        del wanted["setup_commands"]
        assert common(cluster) == common(wanted)


# ---- what `ray up` reads and copies


def test_ray_up_hashes_the_code_and_no_environment_or_output(
    aws: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = {k: v for k, v in aws["file_mounts"].items() if "auth_token" not in k}
    for source in mounts.values():
        assert (CHECKOUT / source).exists(), source
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        if (CHECKOUT / source).is_file():
            shutil.copy(CHECKOUT / source, tmp_path / source)
        else:
            (tmp_path / source).mkdir()
            (tmp_path / source / "file").write_text("as it was")
    monkeypatch.chdir(tmp_path)

    def contents() -> str:
        _, found = hash_runtime_conf(mounts, None, None, generate_file_mounts_contents_hash=True)
        return str(found)

    before = contents()
    for folder in (".venv", "out", ".git"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "large").write_text("changes every day")
    assert contents() == before
    (tmp_path / "jobs" / "file").write_text("changed")
    assert contents() != before


def test_nodes_get_what_their_setup_reads(aws: dict[str, Any]) -> None:
    """deploy/node.sh, and through it deploy/install.sh with the lock files and the project itself."""
    mounts = aws["file_mounts"]
    assert {"~/latent/deploy", "~/latent/lvm", "~/latent/pyproject.toml"} <= mounts.keys()
    project = (CHECKOUT / "pyproject.toml").read_text()
    assert 'readme = "README.md"' in project
    assert {"~/latent/README.md", "~/latent/LICENSE"} <= mounts.keys()
    for script in ("node.sh", "install.sh"):
        subprocess.run(["bash", "-n", str(DEPLOY / script)], check=True)
        for named in re.findall(
            r"requirements/[\w$.]+txt|[\w-]+\.service|spot\.py", (DEPLOY / script).read_text()
        ):
            for device in ("cpu", "gpu"):
                name = named.replace("$device", device)
                assert (DEPLOY / name).exists() or name.startswith("latent-spot"), name
    assert "@HOME@/latent/deploy/spot.py @CLOUD@" in (DEPLOY / "latent-spot.service").read_text()


# ---- AWS' rights


def test_every_worker_has_the_role_that_reaches_the_bucket(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]
    assert types["head"]["node_config"]["IamInstanceProfile"] == {"Name": "latent-head"}
    for name, kind in types.items():
        if name != "head":
            assert kind["node_config"]["IamInstanceProfile"] == {"Name": "latent-worker"}, name


def allowed(file: str) -> set[str]:
    statements = json.loads((DEPLOY / "aws" / file).read_text())["Statement"]
    assert all(s["Effect"] == "Allow" for s in statements)
    actions = [
        a for s in statements for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])
    ]
    assert not [a for a in actions if "*" in a]
    return set(actions)


def test_the_heads_policy_has_what_rays_provider_calls() -> None:
    from ray.autoscaler._private.aws import node_provider

    source = inspect.getsource(node_provider)
    called = set(re.findall(r"(?:meta\.client|self\.ec2_fail_fast)\.([a-z_]+)\(", source))
    called |= set(re.findall(r"= self\.ec2\.meta\.client\.([a-z_]+)$", source, re.MULTILINE))
    # Only nodes that are stopped and kept are stopped and started, which the file turns off.
    assert load("cluster.yaml")["provider"]["cache_stopped_nodes"] is False
    called -= {"start_instances", "stop_instances"}
    names = {"create_instances": "RunInstances"}
    wanted = {"ec2:" + names.get(c, c.title().replace("_", "")) for c in called}
    assert {"ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances"} <= wanted
    assert wanted <= allowed("head-policy.json")


def test_the_head_may_hand_on_the_workers_role_and_resolve_the_images(aws: dict[str, Any]) -> None:
    statements = {
        s["Sid"]: s for s in json.loads((DEPLOY / "aws" / "head-policy.json").read_text())["Statement"]
    }
    assert statements["GiveWorkersTheirRole"]["Action"] == "iam:PassRole"
    assert statements["GiveWorkersTheirRole"]["Resource"].endswith(":role/latent-worker")
    images = {k["node_config"]["ImageId"] for k in aws["available_node_types"].values()}
    parameters = [image.removeprefix("resolve:ssm:") for image in images]
    rights = [r.split(":parameter", 1)[1].rstrip("*") for r in statements["FindTheImages"]["Resource"]]
    assert statements["FindTheImages"]["Action"] == "ssm:GetParameters"
    assert all(any(p.startswith(r) for r in rights) for p in parameters)
    tags = statements["EndAndRenameItsOwn"]["Condition"]["StringEquals"]
    assert tags == {"aws:ResourceTag/ray-cluster-name": aws["cluster_name"]}
    assert statements["StartWorkers"]["Condition"]["StringEquals"] == {
        "aws:RequestedRegion": aws["provider"]["region"]
    }


def test_the_workers_policy_is_what_jobs_do_to_a_bucket_and_no_more() -> None:
    assert {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"} <= allowed(
        "worker-policy.json"
    )
    assert all(action.startswith("s3:") for action in allowed("worker-policy.json"))
