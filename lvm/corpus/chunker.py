"""Split articles into chunks: whole sentences within the codec's token limit, in order, nothing lost.

A chunk holds as many consecutive sentences of one paragraph as fit. A sentence that is too long alone is split at
clause boundaries into pieces of similar length. An article's chunks, joined, are its text up to white space.

Each distinct word is tokenized once and its token count cached; chunk boundaries then follow from sums, since
tokenizers split text at white space first. At the end every chunk is tokenized as a whole, and the few whose sum was
too low (a tokenizer may merge across a space) are split again.
"""

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import regex
import sentencex

from lvm.corpus.records import Article
from lvm.errors import InputError

RULES = 2
"""Version of the rules below; raised when the same text would be split differently."""

SHORT_TOKENS = 5
"""A chunk with fewer content tokens says too little to be predicted; it is merged into a neighbour with room."""

MAX_CACHED_WORDS = 400_000
"""Most words in the cache of token counts; 8,320 Wikipedia articles hold 389,772 distinct ones."""

_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_LINE_ENDS = str.maketrans(
    {"\r": "\n", "\v": "\n", "\f": "\n", "\x85": "\n", "\u2028": "\n", "\u2029": "\n\n"}
)
"""Other line separators, and U+2029, which separates paragraphs. CRLF is replaced before."""

_CLUSTER = regex.compile(r"\X")
"""A grapheme cluster (Unicode Standard Annex 29): a letter with its marks, a joined emoji."""

# Cost of a cut between two words, and of pieces of unequal length. Chosen by reading some 300 cuts of Wikipedia
# sentences: any punctuation is preferred to a conjunction, a conjunction to any other place, and a comma up to a third
# of a chunk off the middle to a bare word boundary in the middle.
_AT_SENTENCE, _AT_SEMICOLON, _AT_DASH, _AT_COMMA, _AT_BRACKET, _AT_CONJUNCTION = -3.0, 0.0, 0.5, 1.0, 1.2, 2.0
_ANYWHERE, _IN_PHRASE = 4.5, 7.0
_CLAUSE = _AT_CONJUNCTION
"""Highest cost of a cut between clauses."""
_PER_CHUNK_OFF = 6.0
_SHORT_PIECE = 6.0

_CONJUNCTIONS_TEXT = """
and or but nor yet so because although though while whereas when where which who whom whose that if unless
until since after before as than including such
"""
_CONJUNCTIONS = frozenset(_CONJUNCTIONS_TEXT.split())
_LEANS_FORWARD_TEXT = """
the a an of in on at to for from by with and or but as his her its their this that these those is are was
were be not no than into between under over about which who whose has had c.
"""
_LEANS_FORWARD = frozenset(_LEANS_FORWARD_TEXT.split())
_CLOSERS = "\"'”’»)]"


class Tokenizer(Protocol):
    """What the chunker needs of a codec's tokenizer."""

    max_tokens: int
    """Most tokens of a text, end of sequence included."""
    num_special: int
    """Special tokens added to a text."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, end of sequence included."""

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Character span of each content token, in order."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an article."""

    chunk_id: str
    """32 hex digits over the article's namespace, its id and position: the same on every run and machine."""
    position: int
    """Index in the article, from 0."""
    text: str
    """With single spaces."""
    num_tokens: int
    """End of sequence included; at most the tokenizer's max_tokens (see `Chunker` for the one exception)."""
    paragraph: int = 0
    """Index of its one paragraph in the article, from 0; paragraphs without words are not counted."""


def chunk_id(namespace: str, article_id: str, position: int) -> str:
    """A chunk's permanent id, 32 hex digits. namespace: `Article.namespace`, within which article ids are unique."""
    return hashlib.sha256(f"{namespace}\0{article_id}\0{position}".encode()).hexdigest()[:32]


def chunk_article(article: Article, tokenizer: Tokenizer, language: str = "en") -> list[Chunk]:
    """Chunks of one article, in order. For many articles keep a `Chunker`, which caches token counts."""
    return Chunker(tokenizer, language).chunk([article])[0]


class Chunker:
    """Splits articles for one tokenizer, with a cache of token counts by word.

    Only a single code point that alone takes more tokens than the limit makes a chunk that exceeds it.
    """

    def __init__(self, tokenizer: Tokenizer, language: str = "en") -> None:
        if tokenizer.max_tokens < 2:
            raise InputError(
                f"the codec takes {tokenizer.max_tokens} tokens with the end of sequence, expected at least 2"
            )
        self._tokenizer = tokenizer
        self._language = language
        self._limit = tokenizer.max_tokens - tokenizer.num_special
        self._counts: dict[str, int] = {}

    def chunk(self, articles: Sequence[Article]) -> list[list[Chunk]]:
        """Chunks of each article, in order. Larger batches are faster; a few hundred articles are enough."""
        paragraphs = [
            [
                p
                for text in _PARAGRAPH_BREAK.split(article.text.replace("\r\n", "\n").translate(_LINE_ENDS))
                if (p := _Paragraph.of(text, self._language)).words
            ]
            for article in articles
        ]
        self._learn(word for ps in paragraphs for p in ps for word in p.words)
        texts: list[str] = []
        places: list[int] = []
        ends: list[int] = []
        for ps in paragraphs:
            for place, paragraph in enumerate(ps):
                texts += self._cut_paragraph(paragraph)
                places += [place] * (len(texts) - len(places))
            ends.append(len(texts))
        counts = self._tokenizer.count(texts) if texts else []
        chunks: list[list[Chunk]] = []
        for article, start, end in zip(articles, [0, *ends], ends, strict=False):
            pieces: list[tuple[str, int, int]] = []
            for i in range(start, end):
                text, count = texts[i], counts[i]
                cut = [(text, count)] if count - 1 <= self._limit else self._cut_again(text, count)
                pieces += [(*piece, places[i]) for piece in cut]
            names = (chunk_id(article.namespace, article.article_id, i) for i in range(len(pieces)))
            chunks.append(
                [Chunk(name, i, *piece) for i, (name, piece) in enumerate(zip(names, pieces, strict=True))]
            )
        return chunks

    def _learn(self, words: Iterable[str]) -> None:
        """Add the words' token counts to the cache."""
        if len(self._counts) > MAX_CACHED_WORDS:
            self._counts.clear()
        new = list(set(words) - self._counts.keys())
        if new:
            self._counts.update(zip(new, (c - 1 for c in self._tokenizer.count(new)), strict=True))

    def _cut_paragraph(self, paragraph: "_Paragraph") -> list[str]:
        tokens = [self._counts[w] for w in paragraph.words]
        total = sum(tokens)
        if total <= self._limit:
            return [paragraph.text(0, len(tokens))]
        if max(tokens) > self._limit:
            paragraph = paragraph.with_words_cut(
                {
                    w: self._cut_word(w)
                    for w, t in zip(paragraph.words, tokens, strict=True)
                    if t > self._limit
                }
            )
            tokens = self._count_words(paragraph.words)
        cuts = _Cutter(paragraph.words, tokens, paragraph.ends, self._limit).cuts()
        return [paragraph.text(a, b) for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]

    def _count_words(self, words: Sequence[str]) -> list[int]:
        self._learn(words)
        return [self._counts[w] for w in words]

    def _cut_word(self, word: str) -> list[str]:
        """Pieces of similar length of a word over the limit, split between grapheme clusters.

        A cluster that alone is over the limit (a letter with a hundred marks) is split inside.
        """
        if len(word) < 2:
            return [word]
        spans = self._tokenizer.offsets(word)
        num_pieces = max(2, math.ceil(len(spans) / self._limit))
        begins = [m.start() for m in _CLUSTER.finditer(word)][1:] or list(range(1, len(word)))
        wanted = [spans[len(spans) * i // num_pieces][0] for i in range(1, num_pieces)] if spans else []
        # The last cluster boundary before each evenly spaced token.
        places = sorted({begins[max(0, bisect_right(begins, w) - 1)] for w in wanted if w})
        places = places or [begins[len(begins) // 2]]
        pieces = [word[a:b] for a, b in zip([0, *places], [*places, len(word)], strict=True)]
        counts = self._tokenizer.count(pieces)
        return [
            part
            for piece, count in zip(pieces, counts, strict=True)
            for part in ([piece] if count - 1 <= self._limit else self._cut_word(piece))
        ]

    def _cut_again(self, text: str, count: int) -> list[tuple[str, int]]:
        """Pieces, with token counts, of a text that has more tokens than the sum over its words."""
        words = text.split(" ")
        if len(words) == 1:
            pieces = self._cut_word(text)
        else:
            tokens = self._count_words(words)
            # Lower the limit in proportion to the error of the sum, and far enough to split the text at all.
            limit = min(self._limit * max(1, sum(tokens)) // (count - 1), sum(tokens) - 1)
            cuts = [len(words) // 2]
            if limit >= max(tokens):
                cuts = _Cutter(words, tokens, [len(words)], limit).cuts()
            pieces = [" ".join(words[a:b]) for a, b in zip([0, *cuts], [*cuts, len(words)], strict=True)]
        if len(pieces) == 1:
            return [(text, count)]
        counts = self._tokenizer.count(pieces)
        return [
            part
            for piece, n in zip(pieces, counts, strict=True)
            for part in ([(piece, n)] if n - 1 <= self._limit else self._cut_again(piece, n))
        ]


@dataclass(frozen=True, slots=True)
class _Paragraph:
    """A paragraph's words and where its sentences end."""

    words: list[str]
    ends: list[int]
    """Number of words up to the end of each sentence; the last is len(words)."""
    glued: frozenset[int]
    """Indices of words that follow the one before without a space (a sentence ended inside a run of letters)."""

    @classmethod
    def of(cls, text: str, language: str) -> "_Paragraph":
        sentences: list[str] = sentencex.segment(language, text)
        if "".join(sentences) != text:  # the splitter lost text: treat it as one sentence, split at clauses
            sentences = [text]
        words: list[str] = []
        ends: list[int] = []
        glued: list[int] = []
        open_end = False
        for sentence in sentences:
            new = sentence.split()
            if new:
                if open_end and not sentence[0].isspace():
                    glued.append(len(words))
                words += new
                ends.append(len(words))
            open_end = bool(sentence) and not sentence[-1].isspace()
        return cls(words, ends, frozenset(glued))

    def with_words_cut(self, pieces: dict[str, list[str]]) -> "_Paragraph":
        """A copy with each word in `pieces` replaced by its pieces."""
        words: list[str] = []
        glued: set[int] = set()
        moved = [0]
        for i, word in enumerate(self.words):
            if i in self.glued:
                glued.add(len(words))
            parts = pieces.get(word, [word])
            glued.update(range(len(words) + 1, len(words) + len(parts)))
            words += parts
            moved.append(len(words))
        return _Paragraph(words, [moved[e] for e in self.ends], frozenset(glued))

    def text(self, start: int, end: int) -> str:
        """Words start..end joined as in the source, with single spaces."""
        if not self.glued:
            return " ".join(self.words[start:end])
        spaced = [w if i in self.glued else f" {w}" for i, w in enumerate(self.words[start:end], start)]
        return "".join(spaced).removeprefix(" ")


class _Cutter:
    """Finds the chunk boundaries of one paragraph whose words have at most `limit` tokens each."""

    def __init__(self, words: list[str], tokens: list[int], ends: list[int], limit: int) -> None:
        self._words = words
        self._sum = [0, *accumulate(tokens)]
        self._ends = ends
        self._end_set = frozenset(ends)
        self._limit = limit

    def cuts(self) -> list[int]:
        """Word indices at which a new chunk begins, ascending, without 0."""
        total, limit = self._sum, self._limit
        starts: list[int] = []
        first = 0  # first word of the chunk being filled
        previous = 0  # end of the sentence before
        for end in self._ends:
            if total[end] - total[first] > limit:
                if first < previous:
                    starts.append(previous)
                    first = previous
                if total[end] - total[previous] > limit:
                    starts += self._pieces(previous, end)
                    if end < len(self._words):
                        starts.append(end)
                    first = end
            previous = end
        return self._without_short([s for s in starts if s < len(self._words)])

    def _pieces(self, start: int, end: int) -> list[int]:
        """Cuts inside the sentence start..end, at clause boundaries and into pieces of similar length."""
        tokens = self._sum[end] - self._sum[start]
        if tokens <= self._limit:
            return []
        fewest = math.ceil(tokens / self._limit)
        cut, cost = self._best_cut(start, end, fewest)
        if cut is None or cost > _CLAUSE:
            # One more piece leaves more places to choose from; worth it to cut at a clause.
            other, other_cost = self._best_cut(start, end, fewest + 1)
            if other is not None and (cut is None or other_cost <= _CLAUSE):
                cut = other
        pieces = fewest + 2
        while cut is None:
            cut, _ = self._best_cut(start, end, pieces)
            pieces += 1
        return [*self._pieces(start, cut), cut, *self._pieces(cut, end)]

    def _best_cut(self, start: int, end: int, num_pieces: int) -> tuple[int | None, float]:
        """The best middle cut of start..end into `num_pieces`, and its cost without that of unequal length.

        None where no word boundary leaves both sides small enough for their share of the pieces.
        """
        total, limit = self._sum, self._limit
        tokens = total[end] - total[start]
        left_pieces = num_pieces // 2
        wanted = tokens * left_pieces / num_pieces
        least, most = tokens - (num_pieces - left_pieces) * limit, left_pieces * limit
        best: int | None = None
        best_cost = best_total = math.inf
        for cut in range(start + 1, end):
            left = total[cut] - total[start]
            if left < least:
                continue
            if left > most:
                break
            off = _PER_CHUNK_OFF * abs(left - wanted) / limit
            if off + _AT_SENTENCE >= best_total:
                continue
            cost = self._cost(cut)
            short = _SHORT_PIECE if left < SHORT_TOKENS or tokens - left < SHORT_TOKENS else 0.0
            if cost + off + short < best_total:
                best, best_cost, best_total = cut, cost, cost + off + short
        return best, best_cost

    def _cost(self, cut: int) -> float:
        """Cost of cutting before word `cut`."""
        if cut in self._end_set:
            return _AT_SENTENCE
        before, after = self._words[cut - 1], self._words[cut]
        last = before.rstrip(_CLOSERS)[-1:] or before[-1]
        if last in ";:!?。；：！？":
            return _AT_SEMICOLON
        if after[0] in "—–" or last in "—–":
            return _AT_DASH
        if last in ",，、،":
            in_date = before[-2:-1].isdigit() and after[0].isdigit()
            return _IN_PHRASE if in_date else _AT_COMMA
        if after[0] in "([" or before[-1] in ")]":
            return _AT_BRACKET
        if last == "." or before.lower() in _LEANS_FORWARD:
            return _IN_PHRASE
        if after.lower() in _CONJUNCTIONS:
            return _AT_CONJUNCTION
        # "3.5 | million", "John | Smith", "September | 14"
        if last.isdigit() or (before[0].isupper() and (after[0].isupper() or after[0].isdigit())):
            return _IN_PHRASE
        return _ANYWHERE

    def _without_short(self, starts: list[int]) -> list[int]:
        """The cuts, with each chunk under SHORT_TOKENS merged into a neighbour or filled from one if it fits."""
        total, limit = self._sum, self._limit
        bounds = [0, *starts, len(self._words)]
        i = 0
        while i + 1 < len(bounds):
            if len(bounds) == 2 or total[bounds[i + 1]] - total[bounds[i]] >= SHORT_TOKENS:
                i += 1
                continue
            # The boundary with the chunk before, then that with the one after.
            inner = [b for b in (i, i + 1) if 0 < b < len(bounds) - 1]
            spans = {b: (bounds[b - 1], bounds[b + 1]) for b in inner}
            fits = [b for b, (low, high) in spans.items() if total[high] - total[low] <= limit]
            if fits:
                del bounds[fits[0]]
                i = max(0, i - 1)
                continue
            for b, (low, high) in spans.items():
                cut, cost = self._best_cut(low, high, 2)
                if cut is None or cost > _CLAUSE:
                    continue
                if min(total[cut] - total[low], total[high] - total[cut]) >= SHORT_TOKENS:
                    bounds[b] = cut
                    break
            i += 1
        return bounds[1:-1]
