"""Chunks keep the text, the order and the codec's limit."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvm.codec.zoo import load_tokenizer
from lvm.corpus.chunker import SHORT_TOKENS, Chunk, Chunker, Tokenizer, chunk_article
from lvm.corpus.readers import read_articles
from lvm.corpus.records import Article
from lvm.errors import InputError
from tests.doubles import FakeTokenizer


class PieceTokenizer:
    """A token is up to three characters, spaces included: words do not add up, and long words exist."""

    sha256 = "0" * 64

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_special = 1

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(self.offsets(t)) + 1 for t in texts]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [m.span() for m in re.finditer(r"(?s).{1,3}", text)]


def article(text: str, article_id: str = "a", source: str = "s") -> Article:
    return Article(article_id, "Title", text, source)


def texts(text: str, max_tokens: int = 32, tokenizer: Tokenizer | None = None) -> list[str]:
    return [c.text for c in chunk_article(article(text), tokenizer or FakeTokenizer(max_tokens))]


def without_space(text: str) -> str:
    return "".join(text.split())


WORDS = [
    "a",
    "Dr.",
    "the",
    "3.5",
    "river,",
    "and",
    "(old)",
    "U.S.",
    "—",
    "said:",
    '"yes"',
    "it.",
    "Stone!",
    "Who?",
]
SENTENCES = st.lists(st.lists(st.sampled_from(WORDS), min_size=1).map(" ".join), max_size=12)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=300), max_tokens=st.integers(2, 12))
def test_no_character_is_lost_or_moved_whatever_the_text(text: str, max_tokens: int) -> None:
    for tokenizer in (FakeTokenizer(max_tokens), PieceTokenizer(max_tokens)):
        chunks = chunk_article(article(text), tokenizer)
        assert without_space("".join(c.text for c in chunks)) == without_space(text)
        assert [c.position for c in chunks] == list(range(len(chunks)))
        assert [c.num_tokens for c in chunks] == tokenizer.count([c.text for c in chunks])
        assert all(c.num_tokens <= max_tokens for c in chunks)
        assert all(c.text == " ".join(c.text.split()) != "" for c in chunks)


@settings(max_examples=100, deadline=None)
@given(paragraphs=st.lists(SENTENCES.map(". ".join), max_size=4), max_tokens=st.integers(3, 40))
def test_prose_keeps_its_text_and_the_limit(paragraphs: list[str], max_tokens: int) -> None:
    text = "\n\n".join(paragraphs)
    chunks = chunk_article(article(text), FakeTokenizer(max_tokens))
    assert " ".join(c.text for c in chunks) == " ".join(text.split())
    assert all(c.num_tokens <= max_tokens for c in chunks)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=400))
def test_mini_loses_nothing_and_never_truncates(text: str) -> None:
    tokenizer = load_tokenizer("mini")
    chunks = chunk_article(article(text), tokenizer)
    assert without_space("".join(c.text for c in chunks)) == without_space(text)
    assert all(c.num_tokens <= tokenizer.max_tokens for c in chunks)


def test_sample_chunks_fit_mini_and_restore_the_text() -> None:
    tokenizer = load_tokenizer("mini")
    articles = list(read_articles("sample"))
    for source, chunks in zip(articles, Chunker(tokenizer).chunk(articles), strict=True):
        assert " ".join(c.text for c in chunks) == " ".join(source.text.split())
        assert max(c.num_tokens for c in chunks) <= tokenizer.max_tokens
        assert tokenizer.count([c.text for c in chunks]) == [c.num_tokens for c in chunks]
        assert min(c.num_tokens for c in chunks) > SHORT_TOKENS


def test_a_chunk_takes_as_many_whole_sentences_as_fit() -> None:
    text = (
        "One two three four five. Six seven eight nine ten. "
        "One two three four five six. Seven eight nine ten."
    )
    assert texts(text, max_tokens=12) == [
        "One two three four five. Six seven eight nine ten.",
        "One two three four five six. Seven eight nine ten.",
    ]


def test_a_chunk_never_spans_paragraphs() -> None:
    assert texts("A short one.\n\nAnother one.\n \t\nA third\nof two lines.") == [
        "A short one.",
        "Another one.",
        "A third of two lines.",
    ]


@pytest.mark.parametrize(
    "sentence",
    [
        "Dr. Smith and Mr. Jones of St. Louis, Inc. met at 5 p.m. in the U.S. capital.",
        "It rose by 3.5 percent to $1.25 million in No. 5 of the series.",
        "J. R. R. Tolkien wrote it c. 1937, e.g. in Oxford.",
        "The cat (Felis catus, L. 1758) sleeps approx. 13.5 h a day.",
    ],
)
def test_abbreviations_and_numbers_do_not_end_a_sentence(sentence: str) -> None:
    other = "This other sentence stands behind the first one here."
    limit = len(sentence.split()) + 3  # either fits alone, both together do not
    assert texts(f"{sentence} {other}", max_tokens=limit) == [sentence, other]


@pytest.mark.parametrize(
    ("sentence", "pieces"),
    [
        (
            "The old canal was dug by hand; the new one was cut by machines in two years.",
            ["The old canal was dug by hand;", "the new one was cut by machines in two years."],
        ),
        (
            "The keeper of the light came down the stairs and the boy ran up to meet him there.",
            ["The keeper of the light came down the stairs", "and the boy ran up to meet him there."],
        ),
        (
            "Born in the year of the great flood, she learned the trade of her mother and uncle.",
            ["Born in the year of the great flood,", "she learned the trade of her mother and uncle."],
        ),
        (
            "He was born in the small town on September 14, 1753 and lived there all his life.",
            ["He was born in the small town on September 14, 1753", "and lived there all his life."],
        ),
    ],
)
def test_long_sentences_are_cut_at_clauses(sentence: str, pieces: list[str]) -> None:
    assert texts(sentence, max_tokens=12) == pieces


def test_pieces_of_a_sentence_without_clauses_are_of_like_length() -> None:
    pieces = texts(" ".join(f"word{i}" for i in range(70)), max_tokens=32)
    assert len(pieces) == 3
    assert all(20 <= len(p.split()) <= 26 for p in pieces)


def test_a_word_longer_than_the_limit_is_cut_at_its_tokens() -> None:
    word = "".join(chr(97 + i % 26) for i in range(100))
    pieces = texts(f"See {word} now.", tokenizer=PieceTokenizer(11))
    assert without_space("".join(pieces)) == f"See{word}now."
    assert all(PieceTokenizer(11).count([p])[0] <= 11 for p in pieces)
    assert len(pieces) <= 6


def test_texts_with_more_tokens_than_their_words_are_cut_again() -> None:
    tokenizer = PieceTokenizer(5)  # its words have four tokens together, the text has five
    pieces = texts("one two six ten\n\nold new big sea", tokenizer=tokenizer)
    assert pieces == ["one two", "six ten", "old new", "big sea"]


def test_a_short_last_sentence_joins_the_chunk_before_it() -> None:
    text = "One two three four five six seven. Eight nine ten eleven. He died."
    assert texts(text, max_tokens=13) == [
        "One two three four five six seven.",
        "Eight nine ten eleven. He died.",
    ]


def test_a_short_paragraph_stays_a_chunk_of_its_own() -> None:
    assert texts("Yes.\n\nThe longer answer is given here.") == ["Yes.", "The longer answer is given here."]


def test_sentences_that_touch_are_joined_without_a_space() -> None:
    assert texts("She ran!Then she stopped.") == ["She ran!Then she stopped."]


def test_text_of_white_space_gives_no_chunk() -> None:
    assert texts(" \n\n\t ") == []


def test_chunk_ids_depend_on_source_article_and_position_alone() -> None:
    first = chunk_article(article("One here.\n\nTwo here."), FakeTokenizer())
    again = chunk_article(article("Other.\n\nText."), FakeTokenizer())
    assert [c.chunk_id for c in first] == [c.chunk_id for c in again]
    assert first[0].chunk_id == "60fe39b09167080aa348f6689f0cf6e2"
    others = [article("One here.", article_id="b"), article("One here.", source="t"), article("x", "", "sa")]
    ids = {
        c.chunk_id
        for a in [article("One here.\n\nTwo here."), *others]
        for c in chunk_article(a, FakeTokenizer())
    }
    assert len(ids) == 5
    assert all(re.fullmatch(r"[0-9a-f]{32}", i) for i in ids)


def test_a_batch_equals_its_singles() -> None:
    batch = [article(f"Text number {i}.\n\nIt has, in part {i}, a second one.", str(i)) for i in range(5)]
    singles: list[list[Chunk]] = [chunk_article(a, FakeTokenizer(8)) for a in batch]
    assert Chunker(FakeTokenizer(8)).chunk(batch) == singles


def test_a_limit_without_room_for_a_word_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 tokens.*expected at least 2"):
        Chunker(FakeTokenizer(1))


def test_a_chunk_says_which_paragraph_it_is_of() -> None:
    text = "One two three.\n\n \n\n" + " ".join(["word"] * 70) + ".\n\nLast."
    (chunks,) = Chunker(FakeTokenizer()).chunk([Article("a", "T", text, "s")])
    assert [c.paragraph for c in chunks] == [0, *[1] * (len(chunks) - 2), 2]
    assert len(chunks) >= 5
