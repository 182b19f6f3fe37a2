"""`Codec.encode` and `lvm.chunk` as a stranger calls them: what comes back, and what is refused with its place."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lvm import Codec, InputError, chunk, load_codec

TEXTS = [
    "The river rises in the hills north of the town.",
    "Yes.",
    "She studied law in Vienna, but gave it up after two years and turned to painting.",
    "",
    "In 1871 the company opened a second factory.",
]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("mini", device="cpu")


def test_a_text_gives_one_vector_and_a_list_one_each(codec: Codec) -> None:
    one, many = codec.encode(TEXTS[0]), codec.encode(TEXTS)
    assert type(one) is type(many) is np.ndarray
    assert (one.shape, one.dtype) == ((768,), np.float32)
    assert (many.shape, many.dtype) == ((5, 768), np.float32)
    np.testing.assert_allclose(one, many[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-5)
    assert np.array_equal(many, codec.encode(tuple(TEXTS)))
    assert np.array_equal(many, codec.encode_chunks(TEXTS).vectors)
    assert codec.encode([]).shape == (0, 768)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_no_more_than_batch_size_texts_are_encoded_at_once(
    codec: Codec, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    core = codec._encoder.core

    def counted(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(ids))
        return core(ids, mask)

    texts = [*TEXTS, *("Bread, and water." for _ in range(20))]
    expected = codec.encode(texts)
    monkeypatch.setattr(codec._encoder, "core", counted)
    found = codec.encode(texts, batch_size=batch_size)
    assert max(rows) <= batch_size
    assert max(rows) == batch_size or batch_size == 64
    assert sum(rows) == len(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_progress_is_shown_on_stderr_when_asked_for(codec: Codec, capsys: pytest.CaptureFixture[str]) -> None:
    codec.encode(TEXTS)
    assert capsys.readouterr() == ("", "")
    codec.encode(TEXTS, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "encode" in err
    assert "100%" in err


def letters() -> Iterator[str]:
    yield "a"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (b"text", "expected a str or a list of str, got bytes; decode it first"),
        (None, "expected a str or a list of str, got NoneType"),
        (7, "expected a str or a list of str, got int"),
        ({"text"}, "expected a str or a list of str, got set; convert it to a list of str"),
        (letters(), "expected a str or a list of str, got generator; convert it to a list of str"),
        (np.array([1.0]), "expected a str or a list of str, got ndarray"),
        (["a", b"b"], "text 1 of 2 is bytes, expected str; decode it first"),
        (["a", None, "c"], "text 1 of 3 is NoneType, expected str; leave out missing texts"),
        (["a", "b", 3], "text 2 of 3 is int, expected str"),
        (["a", ["b", "c"]], "text 1 of 2 is list, expected str; give one list of texts"),
        ("half \ud800 of a pair", "text 0 of 1 holds half a surrogate pair"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(codec: Codec, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        codec.encode(texts)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8"])
def test_a_batch_size_that_is_none_is_refused(codec: Codec, batch_size: Any) -> None:
    with pytest.raises(InputError, match="expected an integer of 1 or more"):
        codec.encode(TEXTS, batch_size=batch_size)


def test_what_is_cut_is_said(codec: Codec) -> None:
    with pytest.warns(
        UserWarning, match=r"1 of 2 texts are longer than 32 tokens and were truncated, text 1 first"
    ):
        codec.encode(["short", "word " * 60])


def test_one_vector_decodes_as_one_row_does(codec: Codec) -> None:
    vector = codec.encode(TEXTS[0])
    assert codec.decode(vector, steps=1).texts == codec.decode(vector[None], steps=1).texts == TEXTS[:1]
    with pytest.raises(InputError, match=re.escape("expected (B, 768)")):
        codec.decode(vector[:100])
    with pytest.raises(InputError, match="got list as vectors"):
        codec.decode(["text"])  # type: ignore[arg-type]


def test_chunks_are_within_the_limit_and_hold_the_whole_text(codec: Codec) -> None:
    text = " ".join(TEXTS) + "\n\n" + "word, " * 100
    chunks = chunk(text, codec)
    assert " ".join(chunks) == " ".join(text.split())
    assert max(codec.tokenizer.count(chunks)) <= 32
    assert chunks == chunk(text) == chunk(text, "mini")
    assert chunk(" \n ") == []
    with pytest.raises(InputError, match="expected one text, got list"):
        chunk([text])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown codec 'nano'"):
        chunk(text, "nano")
