"""The service over real HTTP: real Ray Serve, the shipped codec, a real index. One service for the module."""

import base64
import json
import os
import random
import re
import socket
import string
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest

from lvm.corpus.chunker import Chunker
from lvm.corpus.readers import read_articles
from lvm.corpus.tmd import Prototypes, phrases, unpack
from lvm.predict.generate import Generator
from lvm.predict.predictor import load_predictor
from tests.integration import browser
from tests.integration.serving import CHECKOUT, Service, make_run, running, shipped_codec, vectors_of

ORIGIN = "https://app.example.org"
KEYS = ("the-first-key-of-this-test", "another-key-of-this-test")

FIVE = [
    "The steam engine was first used to pump water out of mines.",
    "Thomas Newcomen built one in 1712 at a colliery near Dudley.",
    "James Watt saw that most of its heat was wasted in the cylinder.",
    "In 1769 he patented a separate condenser that stayed cold.",
    "With Matthew Boulton he then sold engines to mills and mines.",
]


class Chat(BaseHTTPRequestHandler):
    """A chat endpoint of OpenAI's protocol that shouts the draft back, or fails where the passage says so."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Chat.seen.append({"path": self.path, "body": body})
        prompt = body["messages"][-1]["content"]
        if "refuse this" in prompt:
            self.send_error(500)
            return
        draft = prompt.rpartition("Draft: ")[2]
        reply = json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": draft.upper()}}]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def chat() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inbox")


@pytest.fixture(scope="module")
def service(run: Path, chat: str, inbox: Path) -> Iterator[Service]:
    options = [
        *("--inbox", str(inbox)),
        *("--smoothing-url", chat, "--smoothing-model", "shouter"),
        *("--cors-origin", ORIGIN),
        *("--set", "limits.max_texts=12", "--set", "limits.max_characters=5000"),
        *("--set", "limits.max_body_bytes=1000000", "--set", "limits.max_pending=24"),
        *("--set", "breaker.max_refused_share=1"),  # untrained models: any text may be refused
    ]
    environment = {"LATENT_API_KEYS": ",".join(KEYS), "RAY_metrics_report_interval_ms": "1000"}
    with running(run, *options, environment=environment, key=KEYS[0]) as service:
        yield service


def generate(service: Service, **body: Any) -> dict[str, Any]:
    reply = service.post("/v1/generate", body)
    assert reply.status == 200, reply.body
    return reply.json


def test_a_text_becomes_the_next_text_and_the_reply_says_how(service: Service) -> None:
    reply = service.post("/v1/generate", {"chunks": FIVE, "model": "lstm", "neighbours": 3, "snap": True})
    assert reply.status == 200, reply.body
    answer = reply.json
    assert answer["model"]["name"] == "lstm"
    assert answer["model"]["folder"].startswith("lstm-")
    assert answer["codec"]["digest"] == shipped_codec().identity.digest
    (result,) = answer["results"]
    (step,) = result["generated"]
    assert result["chunks"] == FIVE
    assert step["text"]
    assert step["text"] == result["text"]
    assert step["context"] == {"mode": "seq", "texts": FIVE, "origins": ["text"] * 5}
    assert step["source"] in ("writer", "corpus")
    assert (step["log_prob"] is None) == (step["source"] == "corpus")
    assert all(attempt["refusals"] for attempt in step["attempts"])
    assert step["emergency"] is None
    assert -1 <= step["cosine"] <= 1
    assert [n["cosine"] for n in step["neighbours"]] == sorted(
        (n["cosine"] for n in step["neighbours"]), reverse=True
    )
    assert len(step["neighbours"]) == 3
    assert reply.headers["x-request-id"] == answer["request_id"]


def test_answers_equal_those_of_the_library(service: Service, run: Path) -> None:
    codec = shipped_codec()
    for model in ("lstm", "amn", "passthrough"):
        expected = Generator.load(run, model, codec).next_chunks([FIVE])[0]
        (step,) = generate(service, chunks=FIVE, model=model, cache=False)["results"][0]["generated"]
        assert step["source"] == expected.answer.source
        if model != "passthrough":
            # One thread there and two here round otherwise in the last place, and where two words are as likely the
            # writer goes another way: the vectors are compared, and that what is written lies as near.
            vectors = vectors_of(service, FIVE)
            reply = service.post("/v1/predict", {"contexts": [[v.tolist() for v in vectors]], "model": model})
            assert reply.status == 200, reply.body
            np.testing.assert_allclose(reply.json["vectors"][0], expected.vector, atol=2e-3)
            assert abs(step["cosine"] - expected.answer.cosine) < 0.3
            continue
        assert step["text"] == expected.answer.text
        assert step["cosine"] == pytest.approx(
            expected.answer.cosine, abs=0.01
        )  # bfloat16 over other batches
        assert step["snapped_cosine"] == pytest.approx(expected.snapped_cosine, abs=0.01)


def test_passthrough_reads_the_last_chunk_back(service: Service) -> None:
    (step,) = generate(service, chunks=FIVE, model="passthrough")["results"][0]["generated"]
    assert len(set(step["text"].split()) & set(FIVE[-1].split())) >= 5
    assert (step["source"], step["steps"], step["refusals"]) == ("exact", 1, [])


@pytest.mark.parametrize(
    ("chunks", "fill", "mode"),
    [
        (FIVE[:1], "retrieve", "ann"),
        (FIVE[:3], "retrieve", "mixed"),
        (FIVE[:3], "repeat", "repeat_pad"),
        (FIVE[:3], "none", "passthrough"),
        ([*FIVE, *FIVE], "retrieve", "seq"),
    ],
)
def test_a_short_context_is_filled_as_asked(
    service: Service, chunks: list[str], fill: str, mode: str
) -> None:
    (step,) = generate(service, chunks=chunks, fill=fill)["results"][0]["generated"]
    context = step["context"]
    assert context["mode"] == mode
    assert len(context["texts"]) == (1 if fill == "none" else 5)
    own = [t for t, origin in zip(context["texts"], context["origins"], strict=True) if origin == "text"]
    assert own == chunks[-len(own) :]


def test_many_inputs_in_one_call_equal_one_at_a_time(service: Service) -> None:
    inputs = [FIVE, FIVE[::-1], FIVE[1:], ["Penicillin was found by chance in a London hospital."]]
    together = generate(service, chunks=inputs, model="amn", cache=False)["results"]
    for chunks, result in zip(inputs, together, strict=True):
        alone = generate(service, chunks=chunks, model="amn", cache=False)["results"][0]
        assert result["chunks"] == alone["chunks"]
        assert result["generated"][0]["snapped_cosine"] == pytest.approx(
            alone["generated"][0]["snapped_cosine"], abs=0.01
        )
        assert result["generated"][0]["context"] == alone["generated"][0]["context"]


def test_a_long_text_is_cut_within_the_limit(service: Service) -> None:
    text = " ".join(FIVE * 3)
    reply = service.post("/v1/chunk", {"text": [text, FIVE[0]]})
    assert reply.status == 200, reply.body
    first, second = reply.json["results"]
    assert " ".join(c["text"] for c in first) == text
    assert all(0 < c["num_tokens"] <= reply.json["codec"]["max_tokens"] for c in first)
    assert [c["text"] for c in second] == FIVE[:1]
    (result,) = generate(service, text=text)["results"]
    assert result["chunks"] == [c["text"] for c in first]


def test_a_rollout_equals_asking_again_with_each_answer(service: Service) -> None:
    chunks = list(FIVE)
    rolled = generate(service, chunks=chunks, model="amn", length=3)["results"][0]["generated"]
    for step in rolled:
        (single,) = generate(service, chunks=chunks, model="amn")["results"][0]["generated"]
        assert single["text"] == step["text"]
        chunks.append(single["text"])
    read = list(FIVE)
    for step in rolled:  # what the corpus answers is never what was just read
        assert step["source"] != "corpus" or step["text"] not in read
        read.append(step["text"])


def events_of(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    blocks = body.decode().strip().split("\n\n")
    pattern = re.compile(r"event: (\w+)\ndata: (.*)", re.DOTALL)
    return [(m[1], json.loads(m[2])) for block in blocks if (m := pattern.fullmatch(block))]


def test_a_rollout_streams_each_chunk_when_it_is_ready(service: Service) -> None:
    reply = service.post("/v1/generate", {"chunks": [FIVE, FIVE[:2]], "length": 3, "stream": True})
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.body)
    assert [name for name, _ in events] == ["start", *["chunk"] * 6, "done"]
    for number in (0, 1):
        steps = [data for name, data in events if name == "chunk" and data["input"] == number]
        assert [s["place"] for s in steps] == [0, 1, 2]
    whole = generate(service, chunks=FIVE, length=3)["results"][0]["generated"]
    assert [d["text"] for n, d in events if n == "chunk" and d["input"] == 0] == [g["text"] for g in whole]


def test_vectors_decode_to_their_text(service: Service) -> None:
    vectors = vectors_of(service, FIVE)
    packed = [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors]
    reply = service.post("/v1/decode", {"vectors": packed, "codec": "mini"})
    assert reply.status == 200, reply.body
    expected = shipped_codec().decode(vectors, steps=1)
    for text, result, written in zip(FIVE, reply.json["results"], expected.texts, strict=True):
        assert result["text"] == written
        assert len(set(result["text"].split()) & set(text.split())) >= len(text.split()) // 2
    exactly = service.post("/v1/decode", {"vectors": packed, "steps": 0, "subscribers": "mini"}).json[
        "results"
    ]
    assert [(r["source"], r["steps"]) for r in exactly] == [("exact", 0)] * 5
    for first, corrected in zip(
        exactly, reply.json["results"], strict=True
    ):  # a step brings it no further off
        assert 0.5 < first["cosine"] <= corrected["cosine"] + 1e-6


def test_vectors_predict_a_vector(service: Service, run: Path) -> None:
    vectors = vectors_of(service, FIVE)
    expected = load_predictor("amn", run / "models")(vectors[None])[0]
    reply = service.post("/v1/predict", {"vectors": vectors.tolist(), "model": "amn"})
    assert reply.status == 200, reply.body
    np.testing.assert_allclose(np.array(reply.json["vectors"][0]), expected, atol=1e-5)
    many = service.post("/v1/predict", {"contexts": [vectors.tolist(), vectors[:3].tolist()], "model": "amn"})
    np.testing.assert_allclose(np.array(many.json["vectors"][0]), expected, atol=1e-5)
    assert len(many.json["vectors"]) == 2


def test_search_finds_a_chunk_by_its_own_words(service: Service, run: Path) -> None:
    from lvm.vectors.array import open_vectors

    array = open_vectors(run / "vectors")
    texts = array.texts([3, 77])
    reply = service.post("/v1/search", {"query": texts, "k": 4})
    assert reply.status == 200, reply.body
    for text, found in zip(texts, reply.json["results"], strict=True):
        assert len(found) == 4
        assert found[0]["text"] == text
        assert found[0]["cosine"] == pytest.approx(1, abs=0.01)
    by_vector = service.post("/v1/search", {"vectors": vectors_of(service, texts).tolist(), "k": 4})
    assert [[f["chunk_id"] for f in r] for r in by_vector.json["results"]] == [
        [f["chunk_id"] for f in r] for r in reply.json["results"]
    ]


def test_the_official_openai_client_gets_embeddings(service: Service) -> None:
    openai = pytest.importorskip("openai", reason="pip install -e '.[dev]' brings openai")
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEYS[1], max_retries=0)
    expected = vectors_of(service, FIVE)
    reply = client.embeddings.create(model="mini", input=FIVE)
    assert reply.usage.prompt_tokens > 5 * 10
    np.testing.assert_allclose(np.array([d.embedding for d in reply.data]), expected, atol=1e-6)
    assert reply.codec["digest"] == shipped_codec().identity.digest  # beside OpenAI's own fields
    as_floats = client.embeddings.create(model="mini", input=FIVE[0], encoding_format="float")
    np.testing.assert_allclose(np.array(as_floats.data[0].embedding), expected[0], atol=1e-6)
    assert "lstm" in {m.id for m in client.models.list().data}
    assert client.models.retrieve("lstm").created > 1_700_000_000
    assert client.models.retrieve("mini").id == "mini"
    with pytest.raises(openai.NotFoundError, match="available: lstm, amn, passthrough, mini") as missing:
        client.models.retrieve("gpt-4/turbo")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="available: mini") as missing:
        client.embeddings.create(model="text-embedding-3-small", input="x")
    assert missing.value.type == "not_found_error"
    with pytest.raises(openai.UnprocessableEntityError, match="leave dimensions out") as refused:
        client.embeddings.create(model="mini", input="x", dimensions=256)
    assert refused.value.param == "dimensions"
    assert client.embeddings.create(model="mini", input="x", dimensions=768).data[0].index == 0
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0).embeddings.create(
            model="mini", input="x"
        )


@pytest.mark.filterwarnings("ignore")
def test_langchain_gets_embeddings_or_is_told_what_to_set(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    langchain = pytest.importorskip(
        "langchain_openai", reason="pip install -e '.[dev]' brings langchain-openai"
    )
    import litellm
    import openai

    expected = vectors_of(service, FIVE)
    with_texts = langchain.OpenAIEmbeddings(
        model="mini", base_url=f"{service.url}/v1", api_key=KEYS[0], check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(np.array(with_texts.embed_documents(FIVE)), expected, atol=1e-6)
    np.testing.assert_allclose(np.array(with_texts.embed_query(FIVE[0])), expected[0], atol=1e-6)
    # By default it sends the ids of a vocabulary that it downloads; LiteLLM ships the file.
    vocabularies = Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabularies))
    with_ids = langchain.OpenAIEmbeddings(model="mini", base_url=f"{service.url}/v1", api_key=KEYS[0])
    with pytest.raises(openai.UnprocessableEntityError, match="check_embedding_ctx_length=False"):
        with_ids.embed_documents(FIVE)


@pytest.mark.filterwarnings("ignore")
def test_llama_index_gets_embeddings_in_batches_of_a_hundred(service: Service) -> None:
    llama_index = pytest.importorskip(
        "llama_index.embeddings.openai", reason="pip install -e '.[dev]' brings llama-index-embeddings-openai"
    )
    model = llama_index.OpenAIEmbedding(model_name="mini", api_base=f"{service.url}/v1", api_key=KEYS[0])
    assert model.embed_batch_size == 100  # and max_texts of this service is 12
    texts = [f"Sentence number {i} of a list." for i in range(103)]
    found = model.get_text_embedding_batch(texts)
    assert len(found) == 103
    for part in (slice(0, 12), slice(91, 103)):
        np.testing.assert_allclose(np.array(found[part]), vectors_of(service, texts[part]), atol=0.01)


@pytest.mark.filterwarnings("ignore")
def test_litellm_gets_embeddings(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    litellm = pytest.importorskip("litellm", reason="pip install -e '.[dev]' brings litellm")
    for provider in ("openai", "hosted_vllm"):
        given = {"model": f"{provider}/mini", "api_base": f"{service.url}/v1", "api_key": KEYS[0]}
        reply = litellm.embedding(input=FIVE, **given)
        found = np.array([d["embedding"] for d in reply.data])
        np.testing.assert_allclose(found, vectors_of(service, FIVE), atol=1e-6)
        assert reply.usage.prompt_tokens > 5 * 10
    with pytest.raises(litellm.exceptions.AuthenticationError):
        litellm.embedding(input=FIVE, **{**given, "api_key": "wrong"})


def test_embeddings_take_null_unknown_fields_and_as_many_texts_as_openai(service: Service) -> None:
    body = {"model": "mini", "input": FIVE[0], "encoding_format": None, "dimensions": None, "user": None}
    plain = service.post("/v1/embeddings", body)
    assert plain.status == 200, plain.body
    more = service.post(
        "/v1/embeddings", {"input": FIVE[0], "input_type": "query", "truncate_prompt_tokens": -1}
    )
    assert more.json["data"] == plain.json["data"]
    texts = [f"Number {i} of two thousand." for i in range(2048)]
    reply = service.post("/v1/embeddings", {"input": texts, "model": "mini", "encoding_format": "base64"})
    assert reply.status == 200, reply.body[:500]
    assert [d["index"] for d in reply.json["data"]] == list(range(2048))
    alone = service.post("/v1/embeddings", {"input": texts[-1], "encoding_format": "base64"}).json["data"][0]
    last, single = (
        np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in (reply.json["data"][-1], alone)
    )
    np.testing.assert_allclose(last, single, atol=0.01)
    beyond = service.post("/v1/embeddings", {"input": [*texts, "One too many."]})
    assert (beyond.status, beyond.json["error"]["param"]) == (422, "input")
    assert "2049 texts, limit max_embeddings is 2048" in beyond.message


def test_embeddings_say_which_texts_were_cut_and_count_all_tokens(service: Service) -> None:
    head = " ".join(f"word{i}" for i in range(60))
    texts = [f"{head} The mill burned.", FIVE[0], f"{head} A bridge was built across the narrow river."]
    reply = service.post("/v1/embeddings", {"input": texts, "model": "mini"}).json
    assert reply["truncated"] == [True, False, True]
    encoded = service.post("/v1/encode", {"texts": texts}).json
    assert reply["usage"]["total_tokens"] == sum(encoded["num_tokens"]) > 3 * reply["codec"]["max_tokens"]


def test_a_head_is_answered_where_a_get_is(service: Service) -> None:
    for path in ("/health", "/", "/v1/models", "/v1/models/mini"):
        got, head = service.get(path), service.ask("HEAD", path)
        assert (head.status, head.body) == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        if path != "/health":  # its figures change
            assert int(head.headers["content-length"]) == len(got.body)
    assert service.ask("HEAD", "/v1/nothing").status == 404
    assert Service(service.port).ask("HEAD", "/v1/models").status == 401


def test_pages_of_an_allowed_origin_may_call_and_others_may_not(service: Service) -> None:
    asking = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,content-type,x-stainless-os",
    }
    without = Service(service.port)
    allowed = without.ask("OPTIONS", "/v1/embeddings", Origin=ORIGIN, **asking)
    assert allowed.status in (200, 204)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in allowed.headers["access-control-allow-methods"]
    for name in ("authorization", "content-type", "x-stainless-os"):
        assert name in allowed.headers["access-control-allow-headers"]
    other = without.ask("OPTIONS", "/v1/embeddings", Origin="https://elsewhere.example", **asking)
    assert "access-control-allow-origin" not in other.headers
    assert service.get("/v1/models", Origin=ORIGIN).headers["access-control-allow-origin"] == ORIGIN
    assert (
        "access-control-allow-origin"
        not in service.get("/v1/models", Origin="https://elsewhere.example").headers
    )
    refused = without.get("/v1/models", Origin=ORIGIN)  # a page must be able to read why
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


def test_no_event_holds_a_line_end_of_unicode(service: Service) -> None:
    chunks = ["The ferry ran daily\u2028except on feast days.", "It carried\x85carts\u2029and horses."]
    reply = service.post("/v1/generate", {"chunks": chunks, "stream": True, "neighbours": 1})
    assert reply.status == 200, reply.body
    lines = reply.body.decode().splitlines()
    assert {line.partition(":")[0] for line in lines} == {"event", "data", ""}
    name, opening = events_of(reply.body)[0]
    assert (name, opening["inputs"]) == ("start", [{"chunks": chunks}])


def test_control_tokens_in_a_text_are_characters(service: Service) -> None:
    plain, odd = "The mill stood empty.", "The mill </s> stood <pad> empty."
    reply = service.post("/v1/embeddings", {"input": [plain, odd]}).json
    first, second = (np.array(d["embedding"]) for d in reply["data"])
    expected = shipped_codec().encode_chunks([plain, odd])
    assert reply["usage"]["total_tokens"] == expected.num_tokens.sum()
    np.testing.assert_allclose(second, expected.vectors[1], atol=0.01)
    assert first @ second < 0.999


def test_smoothing_rewords_by_the_configured_endpoint_and_its_failure_changes_nothing(
    service: Service,
) -> None:
    (plain,) = generate(service, chunks=FIVE, model="amn")["results"][0]["generated"]
    (step,) = generate(service, chunks=FIVE, model="amn", smooth=True)["results"][0]["generated"]
    assert step["smoothed_from"] == plain["text"]
    assert step["text"] == " ".join(plain["text"].upper().split())
    assert Chat.seen[-1]["path"] == "/v1/chat/completions"
    assert Chat.seen[-1]["body"]["model"] == "shouter"
    chunks = [*FIVE[:4], "Please refuse this."]
    (left,) = generate(service, chunks=chunks, smooth=True)["results"][0]["generated"]
    assert left["smoothed_from"] is None
    assert "500" in left["smoothing_error"]
    assert left["text"]


def test_texts_get_the_codes_of_their_nearest_labels(service: Service) -> None:
    reply = service.post("/v1/tmd", {"texts": [FIVE[0], "Mathematics"]})
    assert reply.status == 200, reply.body
    for result in reply.json["results"]:
        tmd = unpack(result["code"])
        assert tmd.names == (result["domain"], result["task"], result["modifier"])
        assert result["features"] == tmd.features().tolist()
    vectors = vectors_of(service, ["Mathematics"])
    prototypes = Prototypes(shipped_codec().encode_chunks([phrase for phrase, _ in phrases()]).vectors)
    (expected,) = prototypes.nearest(vectors)
    assert reply.json["results"][1]["code"] == expected.tmd.code
    assert reply.json["results"][1]["domain"] == "Mathematics"
    assert reply.json["results"][1]["cosines"] == pytest.approx(expected.cosines, abs=0.01)
    assert reply.json["results"][1]["confidence"] == pytest.approx(expected.confidence, abs=0.05)


def test_ingested_articles_lie_in_the_inbox_with_the_chunks_the_next_run_will_make(
    service: Service, inbox: Path
) -> None:
    articles = [
        {"id": f"a{i}", "title": "Steam", "text": " ".join(FIVE[i:]), "source": "notes"} for i in (0, 2)
    ]
    reply = service.post("/v1/ingest", {"articles": articles})
    assert reply.status == 200, reply.body
    again = service.post("/v1/ingest", {"articles": articles})
    assert again.json["file"] == reply.json["file"]
    assert [p.name for p in inbox.iterdir()] == [reply.json["file"]]
    read = list(read_articles(inbox))
    chunks = Chunker(shipped_codec().tokenizer).chunk(read)
    assert [[c.chunk_id for c in cs] for cs in chunks] == [
        [c["chunk_id"] for c in cs] for cs in reply.json["results"]
    ]
    assert [[c.text for c in cs] for cs in chunks] == [
        [c["text"] for c in cs] for cs in reply.json["results"]
    ]


# ------------------------------------------------------------------------------------------------ what is refused

BIG = 3.5e38  # beyond float32
REFUSED: list[tuple[str, Any, int, str]] = [
    ("/v1/generate", {}, 422, "expected either text or chunks, got neither"),
    ("/v1/generate", {"text": "a", "chunks": ["a"]}, 422, "got both"),
    ("/v1/generate", {"text": "  \n "}, 422, "only white space"),
    ("/v1/generate", {"chunks": []}, 422, "chunks is empty"),
    ("/v1/generate", {"chunks": [[]]}, 422, "chunks[0] is empty"),
    ("/v1/generate", {"chunks": ["a", ["b"]]}, 422, "chunks"),
    ("/v1/generate", {"chunks": [1, 2]}, 422, "chunks"),
    (
        "/v1/generate",
        {"text": "a", "model": "transformer-optimized"},
        404,
        "available: lstm, amn, passthrough",
    ),
    ("/v1/generate", {"text": "a", "model": "../../etc"}, 404, "available"),
    (
        "/v1/generate",
        {"text": "a", "modle": "lstm"},
        422,
        "modle: no such field; expected text, chunks, model",
    ),
    ("/v1/generate", {"text": "a", "length": 1000}, 422, "limit max_rollout is 32"),
    ("/v1/generate", {"text": "a", "length": 0}, 422, "length"),
    ("/v1/generate", {"text": "a", "length": "2"}, 422, "length"),
    ("/v1/generate", {"text": "a", "neighbours": 10**6}, 422, "max_neighbours"),
    ("/v1/generate", {"text": "a", "deadline_s": 1e9}, 422, "max_deadline_s"),
    ("/v1/generate", {"text": "a", "deadline_s": -1}, 422, "deadline_s"),
    ("/v1/generate", {"text": "a", "steps": 9}, 422, "supports steps 0, 1, 2, 3, 4, 5, got 9"),
    ("/v1/generate", {"text": "x" * 5001}, 422, "5001 characters, limit max_characters is 5000"),
    ("/v1/generate", {"text": ["a"] * 13}, 422, "13 texts, limit max_texts is 12"),
    (
        "/v1/generate",
        {"text": "lone \ud800 surrogate"},
        422,
        "text[0] holds half a surrogate pair at character 5",
    ),
    ("/v1/generate", {"text": "a", "model": "\ud800"}, 422, "model: Input should be a valid string"),
    ("/v1/generate", {"text": "a", "\ud800": 1}, 422, "unicode"),
    ("/v1/embeddings", {"input": "a", "model": "\udfff"}, 422, "model: Input should be a valid string"),
    ("/v1/encode", {"texts": []}, 422, "texts is empty"),
    ("/v1/encode", {"texts": {"a": 1}}, 422, "texts"),
    ("/v1/encode", [], 422, "body"),
    ("/v1/encode", "text", 422, "body"),
    ("/v1/embeddings", {"input": "a", "model": "mini", "dimensions": 12}, 422, "dimensions is 12"),
    ("/v1/embeddings", {"input": [[1, 2], [3]], "model": "mini"}, 422, "check_embedding_ctx_length=False"),
    ("/v1/embeddings", {"input": [], "model": "mini"}, 422, "input is empty"),
    ("/v1/embeddings", {"input": ["a", " "]}, 422, "input[1] holds only white space"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, 422, "encoding_format"),
    ("/v1/predict", {}, 422, "got neither"),
    ("/v1/predict", {"vectors": [[1.0, 2.0]]}, 422, "vectors[0] has 2 numbers, expected 768"),
    ("/v1/predict", {"vectors": []}, 422, "vectors is empty"),
    ("/v1/predict", {"vectors": [["a"] * 768]}, 422, "vectors"),
    ("/v1/predict", {"contexts": []}, 422, "contexts is empty"),
    ("/v1/decode", {"vectors": [[0.0] * 768]}, 422, "vectors[0] is all zero"),
    ("/v1/decode", {"vectors": [[float("nan")] * 768]}, 422, "NaN"),
    ("/v1/decode", {"vectors": [[float("inf")] * 768]}, 422, "infinity"),
    ("/v1/decode", {"vectors": [[BIG] * 768]}, 422, "beyond float32"),
    ("/v1/decode", {"vectors": [[10**400] * 768]}, 422, "vectors"),
    ("/v1/decode", {"vectors": ["AAAA"]}, 422, "holds 3 bytes, expected 3072"),
    ("/v1/decode", {"vectors": ["?"]}, 422, "not base64"),
    (
        "/v1/decode",
        {"vectors": [[1.0] * 768], "subscribers": "jxe,ielab"},
        404,
        "'jxe' is not loaded; available: mini",
    ),
    ("/v1/decode", {"vectors": [[1.0] * 768], "subscribers": ["ielab"]}, 404, "'ielab' is not loaded"),
    ("/v1/decode", {"vectors": [[1.0] * 768], "steps": 21}, 422, "limit max_steps is 20"),
    ("/v1/search", {}, 422, "got neither"),
    ("/v1/search", {"query": "a", "k": 0}, 422, "k"),
    ("/v1/search", {"query": "a", "k": 101}, 422, "max_neighbours is 100"),
    ("/v1/chunk", {"text": None}, 422, "text"),
    ("/v1/tmd", {"texts": ["a", " "]}, 422, "texts[1] holds only white space"),
    ("/v1/ingest", {"articles": []}, 422, "articles is empty"),
    (
        "/v1/ingest",
        {"articles": [{"id": "a", "text": " "}]},
        422,
        "articles[0].text[0] holds only white space",
    ),
    ("/v1/ingest", {"articles": [{"id": "", "text": "a"}]}, 422, "articles.0.id"),
    ("/v1/ingest", {"articles": [{"id": "\ud800", "text": "a"}]}, 422, "id"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED)
def test_bad_input_gets_its_message(
    service: Service, path: str, body: Any, status: int, message: str
) -> None:
    reply = service.post(path, body)
    assert reply.status == status, reply.body
    assert message in reply.message
    error = reply.json["error"]
    words = {404: "model_not_found"}  # OpenAI's routes have its codes
    assert error["code"] == (words.get(status) if path == "/v1/embeddings" else status)
    assert error["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "body"),
        (b"{", 422, "JSON"),
        (b'{"text": "\xff\xfe"}', 400, "not UTF-8"),
        (b"[" * 100_000, 400, "levels deep, limit max_depth is 16"),
        (b'{"text": "a", "x": ' + b"[" * 17 + b"]" * 17 + b"}", 400, "levels deep"),
        (b'{"text": "' + b"a" * 1_000_000 + b'"}', 413, "limit max_body_bytes is 1000000"),
        (b'{"text": ' + b"1" * 5000 + b"}", 400, "not valid JSON"),
        (b"NaN", 422, "body"),
    ],
)
def test_what_is_no_json_is_refused(service: Service, body: bytes, status: int, message: str) -> None:
    reply = service.ask("POST", "/v1/generate", body)
    assert reply.status == status, reply.body
    assert message in reply.message


def test_brackets_within_a_text_are_no_depth(service: Service) -> None:
    assert service.post("/v1/encode", {"texts": "[" * 40 + '\\"{'}).status == 200


def test_routes_and_methods_that_are_not_there(service: Service) -> None:
    assert service.get("/v1/nothing").status == 404
    assert "/openapi.json" in service.get("/v1/nothing").message
    assert service.get("/v1/generate").status == 405
    assert service.get("/../../etc/passwd").status == 404


def test_a_refusal_waits_for_no_body(service: Service) -> None:
    for key, length, status in (("wrong", 900_000, b"401"), (KEYS[0], 1_000_001, b"413")):
        head = f"Host: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
            client.sendall(f"POST /v1/encode HTTP/1.1\r\n{head}".encode())
            assert client.recv(12) == b"HTTP/1.1 " + status
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000)
        assert client.recv(12) == b"HTTP/1.1 400"


def test_a_key_is_asked_for_everywhere_but_for_page_document_and_health(service: Service) -> None:
    without = Service(service.port, service.process)
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        reply = without.get(path)
        assert reply.status == 401, path
        assert "Authorization: Bearer" in reply.message
        assert reply.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer wrong", KEYS[0], f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", "Bearer "):
        assert service.ask("GET", "/v1/models", Authorization=header).status == 401, header
    for key in KEYS:
        assert service.ask("GET", "/v1/models", Authorization=f"Bearer {key}").status == 200
    for path in ("/", "/health", "/openapi.json"):
        assert without.get(path).status == 200, path


def test_the_page_asks_no_other_server(service: Service) -> None:
    for path in ("/", "/page.js", "/style.css"):
        reply = Service(service.port, service.process).get(path)
        assert reply.status == 200
        assert not re.findall(rb"(?:https?:)?//[\w.-]+\.\w+", reply.body.replace(b"http://www.w3.org", b""))
        assert "default-src 'self'" in reply.headers["content-security-policy"]


@pytest.mark.skipif(browser.found() is None, reason="needs chromium on the PATH (apt-get install chromium)")
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_a_person_predicts_compares_and_continues_with_the_keyboard(
    service: Service, tmp_path: Path, width: int, height: int
) -> None:
    chunks = [f"On a screen of {width} points.", *FIVE[1:]]  # an answer from the cache has no times to draw
    with browser.browser() as page:
        page.size(width, height)
        page.open(service.url)
        page.wait("!document.getElementById('key-row').hidden")
        page.run("document.getElementById('key').focus()")
        page.write(KEYS[0])
        page.key("Tab", 9)
        page.wait("document.querySelectorAll('input[name=model]').length === 3")
        assert page.run("[...document.querySelectorAll('input[name=model]:checked')].map(b => b.value)") == [
            "lstm"
        ]
        assert page.run("document.activeElement.id") == "text"
        page.write("\n".join(chunks))
        page.key("Tab", 9)
        assert page.run("document.activeElement.id") == "lines"
        page.key(" ", 32, text=" ")
        page.run("document.querySelector('input[value=amn]').focus()")
        page.key(" ", 32, text=" ")
        page.key("Enter", 13, modifiers=2)
        page.wait("document.querySelectorAll('.step').length === 2 && document.getElementById('stop').hidden")
        assert page.run("[...document.querySelectorAll('.column h3')].map(h => h.textContent)") == [
            "lstm",
            "amn",
        ]
        assert page.run("[...document.querySelectorAll('#chunks li')].map(c => c.textContent)") == chunks
        assert page.run("document.querySelectorAll('.near li').length") == 10
        assert page.run("[...document.querySelectorAll('.bar')].every(b => b.children.length >= 4)")
        assert page.run("[...document.querySelectorAll('.words')].every(w => w.textContent.length > 3)")
        paths = page.run("[...document.querySelectorAll('.path')].map(p => p.textContent)")
        # Each answer's source in words: written by the language model, or found in the corpus.
        assert all("A language model wrote the text" in p or "nearest corpus chunk" in p for p in paths)
        page.picture(tmp_path / "page.png")
        if folder := os.environ.get("LATENT_RESULTS"):
            (Path(folder) / f"page_{width}.png").write_bytes((tmp_path / "page.png").read_bytes())
        page.run("document.querySelector('.continue').focus()")
        page.key("Enter", 13, text="\r")
        page.wait("document.querySelectorAll('#chunks li').length === 6")
        page.wait("document.querySelectorAll('.step').length === 2 && document.getElementById('stop').hidden")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), (
            "the page is wider than the screen"
        )
        assert not [m for m in page.messages if "401" not in m]  # the one before the key was given
        assert {r.split("/")[2] for r in page.requests if not r.startswith("data:")} == {
            f"127.0.0.1:{service.port}"
        }


def test_the_examples_of_the_openapi_document_are_answered(service: Service) -> None:
    document = service.get("/openapi.json").json
    asked = 0
    for path, operations in document["paths"].items():
        if "post" not in operations:
            continue
        (reference,) = operations["post"]["requestBody"]["content"]["application/json"]["schema"].values()
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        body = (schema.get("examples") or [{}])[0] or {
            name: field["examples"][0] for name, field in schema["properties"].items() if "examples" in field
        }
        reply = service.post(path, body)
        assert reply.status == 200, (path, reply.body)
        assert set(schema.get("required", ())) <= set(body)
        asked += 1
    assert asked == 9


def test_a_request_is_one_line_of_the_log_under_the_id_it_came_with(service: Service) -> None:
    wanted = "an-id-of-this-test.1"
    reply = service.post("/v1/generate", {"chunks": FIVE, "model": "amn"}, X_Request_ID=wanted)
    assert reply.headers["x-request-id"] == reply.json["request_id"] == wanted
    assert len(service.get("/v1/nothing", X_Request_ID="no good id").headers["x-request-id"]) == 32
    (gateway,) = service.replica_pids("Gateway")
    # Where the replica writes: the log file it holds open.
    files = {os.readlink(fd) for fd in Path(f"/proc/{gateway}/fd").iterdir() if fd.exists()}
    (log,) = [Path(file) for file in files if "replica_latent_Gateway" in file]
    (line,) = [line for line in log.read_text().splitlines() if wanted in line]
    fields = json.loads(line)["log_fields"]
    assert (fields["route"], fields["status"], fields["model"]) == ("/v1/generate", 200, "amn")
    assert fields["sources"] == [reply.json["results"][0]["generated"][0]["source"]]
    assert fields["milliseconds"] > 0


def test_health_says_ready_and_counts_replicas(service: Service) -> None:
    reply = service.get("/health")
    assert reply.status == 200
    health = reply.json
    assert health["status"] in ("ready", "degraded")
    assert health["replicas"] == {n: 1 for n in ("Gateway", "Decoder")}
    assert health["targets"]["p95_s"] == 1.3
    if health["status"] == "degraded":
        assert all(any(name in reason for name in health["targets"]) for reason in health["reasons"])


def test_metrics_have_the_stages_and_are_drawn_by_the_dashboard(service: Service) -> None:
    generate(service, chunks=FIVE, cache=False)
    assert service.ask("POST", "/v1/generate", b"", Content_Length="1000001").status == 413
    assert service.ask("POST", "/v1/generate", b"[" * 100).status == 400
    dashboard = (CHECKOUT / "deploy" / "grafana" / "latent.json").read_text()
    drawn = {re.sub(r"_(bucket|sum|count)$", "", n) for n in re.findall(r"ray_latent_\w+", dashboard)}
    assert len(drawn) >= 10
    rare = {
        "ray_latent_stage_retries_total",
        "ray_latent_deadline_exceeded_total",
        "ray_latent_entity_hits_total",
        "ray_latent_gibberish_total",
        "ray_latent_dropped_rows_total",
        "ray_latent_keyword_hits_total",
    }  # counters that no event of this module need have touched
    limit = time.monotonic() + 40  # Ray's processes report once in a while, each in its own time
    while True:
        text = service.get("/metrics").body.decode()
        counted = (
            re.search(r'ray_latent_stage_duration_seconds_bucket{[^}]*stage="decode"', text),
            *(re.search(rf'ray_latent_refused_total{{[^}}]*reason="{r}"', text) for r in ("body", "depth")),
            re.search(r'ray_latent_http_requests_total{[^}]*status="413"', text),
        )
        names = re.findall(r"^(ray_latent_\w+){", text, re.M)
        exported = {re.sub(r"_(bucket|sum|count)$", "", n) for n in names}
        if (all(counted) and drawn - rare <= exported) or time.monotonic() > limit:
            break
        time.sleep(0.2)
    assert all(counted), text
    for stage in ("queue", "encode", "predict", "snap", "decode"):
        assert f'stage="{stage}"' in text, stage
    assert drawn - rare <= exported, drawn - rare - exported
    source = (CHECKOUT / "serve" / "metrics.py").read_text()
    assert {n.removeprefix("ray_") for n in drawn} <= set(re.findall(r"latent_\w+", source))


# -------------------------------------------------------------------------------------------------------- fuzzing


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A request that is somewhat like a good one."""
    path = rng.choice(["generate", "chunk", "encode", "embeddings", "predict", "decode", "search"])
    atoms: list[Any] = [
        None,
        True,
        0,
        -1,
        10**30,
        1.5,
        float("nan"),
        float("-inf"),
        "",
        " ",
        "a",
        "ü\u0000",
        "\ud83d",
    ]
    atoms += [
        [],
        {},
        [[]],
        ["a"],
        [["a"]],
        [1.0] * 768,
        [[0.5] * 768],
        "A" * 4096,
        [[[0.1] * 768] * 2],
        {"a": [1]},
    ]
    names = [
        "text",
        "texts",
        "chunks",
        "input",
        "model",
        "vectors",
        "contexts",
        "query",
        "k",
        "steps",
        "length",
    ]
    names += [
        "stream",
        "fill",
        "snap",
        "cache",
        "neighbours",
        "deadline_s",
        "encoding_format",
        "codec",
        "sources",
    ]
    good: dict[str, dict[str, Any]] = {
        "generate": {"text": "Steam and coal."},
        "embeddings": {"input": "a", "model": "mini"},
        "chunk": {"text": "Steam."},
        "encode": {"texts": ["a", "b"]},
        "predict": {"vectors": [[1.0] * 768]},
        "decode": {"vectors": [[1.0] * 768], "steps": 0},
        "search": {"query": "steam"},
    }
    body = rng.choice([{}, good[path]]) | {
        rng.choice(names): rng.choice(atoms) for _ in range(rng.randrange(4))
    }
    raw = json.dumps(body).encode()
    for _ in range(rng.choice([0, 0, 0, 1, 3])):  # and bytes turned
        at = rng.randrange(max(1, len(raw)))
        raw = (
            raw[:at]
            + rng.choice([b"", bytes([rng.randrange(256)]), rng.choice(string.punctuation).encode()])
            + raw[at + 1 :]
        )
    return f"/v1/{path}", raw


def test_odd_requests_get_no_5xx_and_the_service_lives(service: Service) -> None:
    """LATENT_FUZZ: how many, where a thousand are too few."""
    rng = random.Random(5)
    requests = [mutated(rng) for _ in range(int(os.environ.get("LATENT_FUZZ", "1000")))]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda r: service.ask("POST", *r), requests))
    bad = [
        (r, reply.status, reply.body[:200])
        for r, reply in zip(requests, replies, strict=True)
        if reply.status >= 500
    ]
    assert not bad, bad[:3]
    statuses = Counter(reply.status for reply in replies)
    assert {200, 422} <= set(statuses)
    assert service.post("/v1/generate", {"chunks": FIVE}).status == 200
    if folder := os.environ.get("LATENT_RESULTS"):
        (Path(folder) / "fuzz.json").write_text(json.dumps(statuses))


def test_schemathesis_finds_no_5xx_from_the_openapi_document(service: Service) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="pip install -e '.[dev]' brings schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    document = service.get("/openapi.json").json
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=service.url)
    tried: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=12,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            reply = case.call(headers=service.headers)
            tried[case.path] = tried.get(case.path, 0) + 1
            assert reply.status_code < 500, (case.as_curl_command(), reply.text)

        check()
    assert len(tried) >= 9


# --------------------------------------------------------------------- under load, and how long things take
# At the end and together: in a run in several processes the others wait meanwhile.


@pytest.mark.alone
def test_the_times_of_the_stages_add_up(service: Service) -> None:
    body = {"chunks": FIVE, "model": "lstm", "neighbours": 3, "snap": True, "cache": False}
    times = generate(service, **body)["results"][0]["generated"][0]["milliseconds"]
    assert {"queue", "encode", "context", "predict", "snap", "decode", "total"} == set(times)
    assert all(times[stage] > 0 for stage in ("queue", "encode", "predict", "snap", "decode"))
    parts = sum(v for k, v in times.items() if k != "total")
    assert 0.9 * times["total"] <= parts <= 1.1 * times["total"]


@pytest.mark.alone
def test_the_first_streamed_chunk_comes_before_the_last_is_made(service: Service) -> None:
    import http.client

    body = json.dumps({"chunks": FIVE[1:], "length": 8, "stream": True, "cache": False}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("POST", "/v1/generate", body, {"Content-Type": "application/json", **service.headers})
    reply = connection.getresponse()
    seen: list[float] = []
    while line := reply.readline():
        if line.startswith(b"event: chunk"):
            seen.append(time.perf_counter())
    connection.close()
    assert len(seen) == 8
    assert seen[-1] - seen[0] > 3 * (seen[1] - seen[0]) > 0


@pytest.mark.alone
def test_the_second_time_comes_from_the_cache_unless_told_otherwise(service: Service) -> None:
    chunks = ["A sentence that only this test says.", *FIVE[:4]]
    first = generate(service, chunks=chunks)["results"][0]["generated"][0]
    again = generate(service, chunks=chunks)["results"][0]["generated"][0]
    anew, once_more = (
        generate(service, chunks=chunks, cache=False)["results"][0]["generated"][0] for _ in range(2)
    )
    assert first["cached"] is None
    assert again["cached"] == "answer"
    assert anew["cached"] is None
    assert again["text"] == first["text"]
    assert once_more["text"] == anew["text"]
    assert again["milliseconds"]["total"] < first["milliseconds"]["total"] / 5


@pytest.mark.alone
def test_a_full_service_refuses_at_once_and_says_when_to_come_back(service: Service) -> None:
    body = {"chunks": [[f"{i} {t}" for t in FIVE] for i in range(12)], "length": 2, "cache": False}
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: service.post("/v1/generate", body), range(6)))
    statuses = sorted(r.status for r in replies)
    assert set(statuses) == {200, 429}, statuses
    for reply in replies:
        if reply.status == 429:
            assert int(reply.headers["retry-after"]) >= 1
            assert "max_pending" in reply.message
            assert reply.seconds < 5
    assert service.post("/v1/generate", {"chunks": FIVE}).status == 200


@pytest.mark.alone
def test_a_deadline_is_kept_and_its_work_is_dropped(service: Service) -> None:
    body = {
        "chunks": [[f"late {i} {t}" for t in FIVE] for i in range(12)],
        "cache": False,
        "length": 32,
        "deadline_s": 0.4,
    }
    reply = service.post("/v1/generate", body)
    assert reply.status == 408, reply.body
    assert "deadline" in reply.message
    assert reply.seconds < 3
    streamed = events_of(service.post("/v1/generate", {**body, "stream": True}).body)
    assert (streamed[0][0], streamed[-1][0]) == ("start", "error")
    assert streamed[-1][1]["error"]["code"] == 408
    # Twelve rollouts of 32 are minutes of decoding; dropped, the next request is served at once.
    after = service.post("/v1/generate", {"chunks": FIVE[::-1], "cache": False})
    assert after.status == 200
    assert after.seconds < 5
