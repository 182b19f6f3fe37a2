"""Vectors of requests and replies, OpenAI's form, and events that no client cuts in two."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from serve.schema import (
    PIECE,
    CodecRecord,
    EmbeddingsReply,
    EmbeddingsRequest,
    Milliseconds,
    RefusedError,
    Usage,
    embeddings_json,
    event,
    pack,
    unpack,
)

VECTOR = np.random.default_rng(0).standard_normal(768).astype(np.float32)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_what_is_packed_unpacks_to_unit_norm(form: str) -> None:
    back = unpack([pack(VECTOR, form), pack(3 * VECTOR, form)], 768, "vectors")
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, np.stack([VECTOR, VECTOR]) / np.linalg.norm(VECTOR), atol=1e-6)


def bad(value: float, place: int = 700) -> list[float]:
    vector = [0.1] * 768
    vector[place] = value
    return vector


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (bad(float("nan")), "NaN"),
        (bad(float("inf")), "infinity"),
        (bad(-float("inf")), "infinity"),
        (bad(1e39), "beyond float32"),
        ([0.0] * 768, "all zero"),
        ([1e-30] * 768, "all zero"),
        ([0.1] * 767, "767 numbers, expected 768"),
        ([], "0 numbers, expected 768"),
        ("AAAA", "holds 3 bytes, expected 3072"),
        ("not base64!", "not base64"),
        (base64.b64encode(np.full(768, np.nan, "<f4").tobytes()).decode(), "NaN"),
    ],
)
def test_a_bad_vector_is_named(vector: list[float] | str, message: str) -> None:
    with pytest.raises(RefusedError, match=message) as error:
        unpack([[0.1] * 768, vector], 768, "vectors")
    assert error.value.status == 422
    assert "vectors[1]" in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {
            "encoding_format": None,
            "dimensions": None,
            "user": None,
            "model": None,
        },  # LiteLLM writes defaults out
        {"input_type": "query", "truncate_prompt_tokens": -1, "user": "u"},  # fields of other servers
        {"encoding_format": "base64", "dimensions": 768},
    ],
)
def test_an_embeddings_request_passes_over_what_it_does_not_know_and_null_is_the_default(
    more: dict[str, Any],
) -> None:
    body = EmbeddingsRequest.model_validate({"model": "mini", "input": ["a", "b"], **more})
    assert body.input == ["a", "b"]


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]], [[1]]])
def test_token_ids_are_refused_with_what_to_set(tokens: Any) -> None:
    with pytest.raises(ValidationError, match="check_embedding_ctx_length=False") as error:
        EmbeddingsRequest.model_validate({"model": "mini", "input": tokens})
    assert error.value.error_count() == 1


@pytest.mark.parametrize("given", [None, 1.5, True, {}, [None], [True], ["a", 1], [["a"]], [[]]])
def test_an_input_that_is_no_text_is_refused(given: Any) -> None:
    with pytest.raises(ValidationError, match="input"):
        EmbeddingsRequest.model_validate({"input": given})


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize("count", [1, PIECE, PIECE + 1, 3 * PIECE])
def test_pieces_of_a_reply_are_the_json_of_the_whole(form: str, count: int) -> None:
    vectors: Sequence[NDArray[np.float32]] = list(np.random.default_rng(count).random((count, 4), np.float32))
    codec = CodecRecord(
        name="mini",
        digest="d",
        encoder_sha256="e",
        tokenizer_sha256="t",
        pooling="mean",
        dense=False,
        normalized=True,
        max_tokens=32,
        dim=4,
    )
    reply = EmbeddingsReply(
        data=[],
        model="mini",
        usage=Usage(prompt_tokens=3, total_tokens=3),
        truncated=[False] * count,
        request_id="r",
        codec=codec,
        milliseconds=Milliseconds(),
    )
    pieces = list(embeddings_json(reply, vectors, form))
    assert len(pieces) == -(-count // PIECE)
    whole = EmbeddingsReply.model_validate_json("".join(pieces))
    assert [d.index for d in whole.data] == list(range(count))
    for vector, data in zip(vectors, whole.data, strict=True):
        assert data.embedding == pack(vector, form)
    assert whole.model_copy(update={"data": []}) == reply


@pytest.mark.parametrize("break_", list("\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"))
def test_an_event_is_three_lines_whatever_a_text_holds(break_: str) -> None:
    text = f"It carried{break_}carts, ü and \U0001f6a2."
    lines = event("chunk", {"text": text}).splitlines()
    assert len(lines) == 3, lines
    assert (lines[0], lines[2]) == ("event: chunk", "")
    assert json.loads(lines[1].removeprefix("data: ")) == {"text": text}
    assert "ü and \U0001f6a2" in lines[1]  # only what must be is escaped
