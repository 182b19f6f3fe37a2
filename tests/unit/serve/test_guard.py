"""Keys, depth and the form of errors."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lvm.errors import InputError
from serve.guard import Guard, accepts, check_keys, depth_of, error_body, hash_key, read_keys
from serve.metrics import GatewayMetrics
from serve.settings import Limits

KEY = "a-key-of-sixteen-or-more"


@pytest.mark.parametrize(
    ("header", "good"),
    [
        (f"Bearer {KEY}", True),
        (f"bearer  {KEY} ", True),
        (f"Basic {KEY}", False),
        (KEY, False),
        ("Bearer", False),
        ("", False),
        (f"Bearer {KEY}x", False),
        (f"Bearer {hash_key(KEY)}", False),
    ],
)
def test_a_header_is_accepted_with_one_of_the_keys(header: str, good: bool) -> None:
    hashes = [hash_key("another-key-of-this-test"), hash_key(KEY)]
    assert accepts(header, hashes) is accepts(header, hashes[::-1]) is good


def test_without_keys_none_is_accepted() -> None:
    assert not accepts(f"Bearer {KEY}", [])


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n{KEY}\n\n  second-key-of-the-team \n")
    assert read_keys(path) == [hash_key(KEY), hash_key("second-key-of-the-team")]


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", f"{KEY} {KEY}\n", f"{KEY}ü\n"])
def test_a_file_without_good_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(InputError, match="API key"):
        read_keys(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing-here"):
        read_keys(tmp_path / "nothing-here")


def test_a_key_is_never_in_the_message_that_refuses_it() -> None:
    with pytest.raises(InputError) as error:
        check_keys(["hunter2"], "LATENT_API_KEYS")
    assert "hunter2" not in str(error.value)


nested = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def levels(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(levels, value), default=0)
    return 1 + max(map(levels, value.values()), default=0) if isinstance(value, dict) else 0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine draws slowly
@given(nested)
def test_depth_of_json_is_that_of_its_brackets_outside_strings(value: object) -> None:
    assert depth_of(json.dumps(value).encode()) == levels(value)
    assert depth_of(json.dumps(value, ensure_ascii=False, indent=1).encode()) == levels(value)


@given(st.binary(max_size=200))
def test_depth_of_any_bytes_is_a_number(body: bytes) -> None:
    assert depth_of(body) >= 0


@pytest.mark.parametrize(
    ("path", "code"),
    [("/v1/embeddings", "model_not_found"), ("/v1/models/x", "model_not_found"), ("/v1/encode", 404)],
)
def test_errors_have_the_form_of_openai(path: str, code: str | int) -> None:
    error = error_body(404, "no model 'x'", "r", path, "model")["error"]
    assert error == {
        "message": "no model 'x'",
        "type": "not_found_error",
        "param": "model",
        "code": code,
        "request_id": "r",
    }
    assert error_body(422, "too long", "r", "/v1/embeddings")["error"]["code"] is None


@pytest.mark.parametrize(("method", "body"), [("GET", b"whole body"), ("HEAD", b"")])
def test_a_head_has_the_headers_of_a_get_and_no_body(method: str, body: bytes) -> None:
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    app = FastAPI()
    app.add_api_route("/there", lambda: PlainTextResponse("whole body"))
    guard = Guard(app, Limits(), [], GatewayMetrics())
    sent: list[Any] = []

    async def ask() -> None:
        scope = {"type": "http", "method": method, "path": "/there", "headers": [], "query_string": b""}

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await guard(scope, receive, send)
        assert scope["method"] == method  # the server that wrote it decides by it what it sends

    asyncio.run(ask())
    assert sent[0]["status"] == 200
    assert (b"content-length", b"10") in sent[0]["headers"]
    assert b"".join(m.get("body", b"") for m in sent[1:]) == body
