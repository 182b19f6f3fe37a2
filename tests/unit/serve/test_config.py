"""The settings a person writes: config.yaml parses as the application will, and mistakes are named."""

import socket
from pathlib import Path

import pytest
import yaml
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve._private.http_util import set_socket_reuse_port
from ray.serve.schema import ServeDeploySchema

from lvm.errors import InputError
from serve.gateway import require_key_unless_loopback
from serve.launch import claim, parse, put
from serve.release import ReleaseArgs
from serve.settings import Scale, ServeArgs

CONFIG = Path(__file__).resolve().parents[3] / "serve" / "config.yaml"


def test_the_shipped_config_is_one_ray_and_build_accept() -> None:
    record = yaml.safe_load(CONFIG.read_text())
    ServeDeploySchema.model_validate(record)
    (application,) = record["applications"]
    args = ServeArgs.model_validate(application["args"])
    assert application["import_path"] == "serve.app:build"
    assert args.decoder.max_replicas > args.decoder.min_replicas
    assert record["http_options"]["request_timeout_s"] > args.limits.max_deadline_s


def test_another_release_and_nothing_less_makes_ray_build_again() -> None:
    record = yaml.safe_load(CONFIG.read_text())
    args = record["applications"][0]["args"]

    def version(**changed: str) -> str:
        record["applications"][0]["args"] = {**args, **changed}
        return get_app_code_version(ServeDeploySchema.model_validate(record).applications[0])

    assert version() == version()
    assert version(release="2") != version()
    assert ServeArgs.model_validate({**args, "release": "2"}).release == "2"


def test_another_run_in_user_config_is_taken_up_without_a_build_or_a_restart() -> None:
    record = yaml.safe_load(CONFIG.read_text())
    (application,) = record["applications"]
    asked = [d["user_config"] for d in application["deployments"]]
    assert [d["name"] for d in application["deployments"]] == ["Gateway", "Predictor", "Retriever"]
    assert asked[0] == asked[1] == asked[2]
    assert ReleaseArgs.model_validate(asked[0]).run == application["args"]["run"]
    before = ServeDeploySchema.model_validate(record).applications[0]
    asked[0]["run"] = "s3://corpus/runs/wiki-2"
    after = ServeDeploySchema.model_validate(record).applications[0]
    assert before.deployments != after.deployments
    assert get_app_code_version(before) == get_app_code_version(after)


def test_the_shipped_config_is_open_to_a_network_only_with_keys() -> None:
    record = yaml.safe_load(CONFIG.read_text())
    assert record["http_options"]["host"] == "0.0.0.0"
    assert record["applications"][0]["args"]["api_keys_file"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("limits.max_text=8", "limits.max_text"),
        ("limits.max_texts=0", "limits.max_texts"),
        ("limits.max_texts=many", "got 'many'"),
        ("decoder.max_replicas=0", "decoder.max_replicas"),
        ("limits=8", "limits"),
        ("limits.=8", "NAME=VALUE"),
        ("limits.max_texts", "NAME=VALUE"),
        ("run.x=1", "not a group of settings"),
    ],
)
def test_a_wrong_setting_is_named(entry: str, message: str) -> None:
    record: dict[str, object] = {"run": "somewhere"}
    with pytest.raises(InputError) as error:  # noqa: PT012 - either of the two may say it
        put(record, entry)
        parse(record)
    assert message in str(error.value)


def test_settings_of_the_command_line_arrive() -> None:
    record: dict[str, object] = {"run": "somewhere"}
    for entry in ("limits.max_texts=8", "decoder.max_replicas=3", "breaker.enabled=false"):
        put(record, entry)
    args = parse(record)
    assert (args.limits.max_texts, args.decoder.max_replicas, args.breaker.enabled) == (8, 3, False)


def test_replicas_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="below min_replicas 3"):
        Scale(min_replicas=3, max_replicas=2)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_network_needs_a_key(host: str) -> None:
    with pytest.raises(InputError, match="without an API key"):
        require_key_unless_loopback([], host)
    require_key_unless_loopback(["00" * 32], host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_none(host: str) -> None:
    require_key_unless_loopback([], host)


@pytest.mark.parametrize(
    "origin", ["https://app.example.org", "http://localhost:3000", "http://[::1]:80", "*"]
)
def test_origins_are_taken(origin: str) -> None:
    assert parse({"run": "somewhere", "cors_origins": [origin]}).cors_origins == [origin]


@pytest.mark.parametrize(
    "origin", ["app.example.org", "https://app.example.org/", "https://a.org/page", "https://*.org", ""]
)
def test_what_no_browser_sends_as_origin_is_refused(origin: str) -> None:
    with pytest.raises(InputError, match=r"cors_origins: .*https://app.example.org"):
        parse({"run": "somewhere", "cors_origins": [origin]})


def test_a_port_is_kept_for_the_proxy_alone_and_a_taken_one_refused() -> None:
    with claim("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with socket.socket() as proxy:  # binds as Ray Serve's does
            assert set_socket_reuse_port(proxy)
            proxy.bind(("127.0.0.1", port))
            proxy.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                proxy.accept()[0].close()
            with pytest.raises(InputError, match=f"port {port} .*choose another --port"):
                claim("127.0.0.1", port)


def test_settings_that_do_not_fit_each_other_are_named_without_all_the_others() -> None:
    given = {"run": "somewhere", "searchers": 2, "inline": ["retriever"]}
    with pytest.raises(
        InputError, match=r"^settings: searchers need a run .* leave retriever out of inline; serve/"
    ):
        parse(given)
