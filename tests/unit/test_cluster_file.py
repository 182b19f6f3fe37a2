"""cluster.yaml against Ray's own schema, and the promises its comments make."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHECKOUT / "cluster.yaml").read_text())
    return loaded


def test_rays_schema_takes_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_rays_schema_would_have_refused_a_wrong_key(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(prepare_config({**copy.deepcopy(cluster), "idle_minutes": 5}))


def test_the_head_takes_no_work_and_workers_start_at_none(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: kind for name, kind in types.items() if name != cluster["head_node_type"]}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert any(kind["resources"].get("GPU") for kind in workers.values())
    assert cluster["max_workers"] >= max(kind["max_workers"] for kind in workers.values())


def test_each_spot_type_has_a_fallback_of_the_same_size(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    spot = {n: k for n, k in types.items() if "InstanceMarketOptions" in k["node_config"]}
    assert set(spot) == {"cpu_spot", "gpu_spot"}
    for name, kind in spot.items():
        other = types[name.replace("_spot", "_on_demand")]
        assert other["resources"] == kind["resources"]
        plain = {k: v for k, v in kind["node_config"].items() if k != "InstanceMarketOptions"}
        assert other["node_config"] == plain


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


def test_nodes_install_this_projects_requirements(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/latent"] == "."
    assert any("pip install" in command and "-e ~/latent" in command for command in cluster["setup_commands"])
