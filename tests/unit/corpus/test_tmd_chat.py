"""Codes by a chat endpoint: a real HTTP server on a free port that answers as it is told."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lvm.corpus.tmd import Tmd
from lvm.corpus.tmd_chat import ChatCoder, ChatSettings, UnusableAnswer, parse_answer
from lvm.errors import InputError

GOOD = '{"domain": "Law", "task": "Summarization", "modifier": "legal", "confidence": 0.75}'
Answer = Callable[[dict[str, Any], int], tuple[int, str]]


class Endpoint:
    """Answers with what `answer(request, how many before)` says."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(body)
                    endpoint.keys.add(self.headers.get("Authorization"))
                status, content = answer(body, number)
                reply = {"choices": [{"message": {"content": content}}]}
                data = json.dumps(reply).encode() if status == 200 else content.encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Callable[[Answer], Endpoint]]:
    made: list[Endpoint] = []

    def make(answer: Answer) -> Endpoint:
        made.append(Endpoint(answer))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def settings(url: str, **others: Any) -> ChatSettings:
    return ChatSettings(url, "m", "key", pause_s=0.0, **others)


def test_answers_are_asked_for_once_and_remembered(
    endpoint: Callable[[Answer], Endpoint], tmp_path: Path
) -> None:
    there = endpoint(lambda *_: (200, GOOD))
    with ChatCoder(settings(there.url), tmp_path / "a" / "answers.db") as coder:
        first, second, third = coder.code(["one", "two", "one"])
        assert first == third
        assert first is not None
        assert first.tmd == Tmd(11, 8, 6)
        assert first.confidence == pytest.approx(0.75)
        assert second == first
    assert len(there.requests) == 2
    assert there.keys == {"Bearer key"}
    assert "Software" in there.requests[0]["messages"][0]["content"]
    with ChatCoder(settings(there.url), tmp_path / "a" / "answers.db") as coder:
        again = coder.code(["two", "three"])
        assert [a and a.tmd for a in again] == [Tmd(11, 8, 6)] * 2
    assert len(there.requests) == 3
    with ChatCoder(ChatSettings(there.url, "other"), tmp_path / "a" / "answers.db") as coder:
        coder.code(["two"])  # another model, another answer
    assert len(there.requests) == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_and_an_unusable_answer_are_asked_again(
    endpoint: Callable[[Answer], Endpoint], tmp_path: Path, status: int
) -> None:
    answers = [(status, "busy"), (200, "Sure! " + GOOD), (200, GOOD)]
    there = endpoint(lambda _, number: answers[number])
    with ChatCoder(settings(there.url), tmp_path / "answers.db") as coder:
        (found,) = coder.code(["one"])
    assert found is not None
    assert found.tmd == Tmd(11, 8, 6)
    assert "not usable: expected one JSON object" in there.requests[2]["messages"][-1]["content"]


def test_a_text_without_a_usable_answer_has_no_code_and_the_others_have(
    endpoint: Callable[[Answer], Endpoint], tmp_path: Path
) -> None:
    there = endpoint(lambda body, _: (200, "no" if "bad" in body["messages"][1]["content"] else GOOD))
    with ChatCoder(settings(there.url), tmp_path / "answers.db") as coder:
        # The second attempt of the bad text still holds it.
        found = coder.code(["good", "bad", "good too"])
        assert [f is None for f in found] == [False, True, False]
        assert len(coder.failures) == 1
        assert "expected one JSON object" in coder.failures[0]
    assert len(there.requests) == 2 + 3


def test_a_refusal_for_good_ends_it_and_says_what_to_check(
    endpoint: Callable[[Answer], Endpoint], tmp_path: Path
) -> None:
    there = endpoint(lambda *_: (401, "invalid key"))
    said = r"HTTP 401 .*invalid key; check --llm-url, --llm-model"
    with (
        ChatCoder(settings(there.url), tmp_path / "answers.db") as coder,
        pytest.raises(InputError, match=said),
    ):
        coder.code([str(i) for i in range(50)])
    assert len(there.requests) < 20


def test_an_endpoint_that_is_not_there_leaves_texts_without_codes(tmp_path: Path) -> None:
    with ChatCoder(settings("http://127.0.0.1:1/v1", timeout_s=2.0), tmp_path / "answers.db") as coder:
        assert coder.code(["one"]) == [None]
        assert "refused" in coder.failures[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected one JSON object"),
        ("[]", "got list"),
        ("null", "got NoneType"),
        ('{"domain": "Law"}', r"got \['domain'\]"),
        (GOOD.replace("Law", "Lore"), "no domain 'Lore'"),
        (GOOD.replace('"Law"', "11"), "has no attribute"),
        (GOOD.replace("0.75", "75"), "expected confidence to be a number from 0 to 1, got 75"),
        (GOOD.replace("0.75", "true"), "got True"),
        (GOOD.replace("0.75", "NaN"), "got nan"),
        (GOOD.replace("}", ', "why": "because"}'), "got .*'why'"),
        (f"```json\n{GOOD}\n```", "expected one JSON object"),
    ],
)
def test_only_what_was_asked_for_is_taken(content: str, message: str) -> None:
    with pytest.raises(UnusableAnswer, match=message):
        parse_answer(content)


def test_settings_and_cache_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for url in ("", "file:///etc/passwd", "ftp://a", "http://"):
        with pytest.raises(InputError, match="--llm-url"):
            ChatSettings(url, "m")
    with pytest.raises(InputError, match="--llm-model"):
        ChatSettings("http://a", "")
    assert "secret" not in repr(ChatSettings("http://a", "m", "secret"))
    (tmp_path / "no.db").write_text("this is no database, and long enough to be seen as none " * 20)
    with pytest.raises(InputError, match="is not a cache of TMD answers"):
        ChatCoder(settings("http://a"), tmp_path / "no.db")
