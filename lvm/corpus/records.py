"""Articles, the records they are read from, and the report of what was left out."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from lvm.errors import LvmError, StorageError

T = TypeVar("T")

OnPosition = Callable[[int], None]
"""Called now and then with the number of stored bytes of the input read so far."""

FIELDS = ("id", "title", "text")
"""Required fields of a record; `source` is optional."""

BROKEN_SHOWN = 20
"""Broken records that a report lists; the others are only counted."""

MAX_RECORD_BYTES = 8 << 20
"""A larger record is broken: 8 MiB is two long books, and chunking takes 90 times a record's size in memory."""

MAX_WORD = 1000
"""Longest run of visible ASCII characters that is taken for a word; data URIs, keys and hex dumps are longer."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_WORD = re.compile(rf"[!-~]{{{MAX_WORD + 1},}}")


@dataclass(frozen=True, slots=True)
class Article:
    """One document in reading order."""

    article_id: str
    """Its id in the source."""
    title: str
    """May be empty."""
    text: str
    """Paragraphs separated by a blank line."""
    source: str
    """The record's `source` field, a wiki's name such as enwiki, or else the name of its file or folder."""
    place: str = field(default="", compare=False)
    """Scope of unique ids: the file's path relative to --input, or the wiki's name; empty means the source. Not
    compared, so that an article equals its copy in another file."""

    @property
    def namespace(self) -> str:
        """With `article_id`, a permanent identifier of the article."""
        return self.place or self.source


@dataclass(frozen=True, slots=True)
class Record:
    """One record as read. Wiki markup is parsed later, in parallel."""

    article: Article
    """`text` is wiki markup unless `media_namespaces` is None."""
    place: str
    """Position in the file: "line 7", "row 7", "page 12", or a text file's name."""
    media_namespaces: frozenset[str] | None = None
    """Names of the wiki's File and Category namespaces; None where the text is already prose."""

    def plain(self) -> tuple[Article, int]:
        """The article as prose, and the number of words longer than MAX_WORD that were removed.

        Raises BrokenRecordError on markup that cannot be parsed in time, and where no text remains.
        """
        from lvm.corpus.markup import prose

        article = self.article
        text = article.text
        if self.media_namespaces is not None:
            text = prose(text, self.media_namespaces)
            if not text:
                raise BrokenRecordError("it has no prose besides templates, tables and lists")
        text, removed = _NO_WORD.subn(" ", text)
        if not has_text(text):
            only_long = f"it has no text besides {removed} words of more than {MAX_WORD} characters"
            raise BrokenRecordError(only_long if removed else "its text is empty")
        return replace(article, text=text), removed


class BrokenRecordError(ValueError):
    """One record cannot be used; the message is the reason."""


@dataclass(frozen=True)
class BrokenRecord:
    """A record that was left out."""

    place: str
    """File, and line, row or page."""
    reason: str
    """What was expected, and what it is."""


@dataclass
class ReadReport:
    """Outcome of the records of one input, filled by its reader."""

    articles: int = 0
    """Records yielded."""
    num_broken: int = 0
    """Records left out because they are broken."""
    broken: list[BrokenRecord] = field(default_factory=list)
    """The first BROKEN_SHOWN of them."""
    broken_files: list[BrokenRecord] = field(default_factory=list)
    """Damaged files, and why; their records before the damage were yielded."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Valid records that are not articles, by kind: redirect, disambiguation, other namespace."""

    def add_broken(self, place: str, reason: str) -> None:
        """Count a broken record, and keep the first BROKEN_SHOWN."""
        self.num_broken += 1
        if len(self.broken) < BROKEN_SHOWN:
            self.broken.append(BrokenRecord(replace_surrogates(place), replace_surrogates(reason)[:500]))

    def add_broken_file(self, name: str, err: LvmError | OSError) -> None:
        """Keep a damaged file, and why."""
        reason = str(err) if isinstance(err, LvmError) else f"{name} cannot be read: {err.strerror}"
        self.broken_files.append(BrokenRecord(name, reason))

    def read(self, place: str, make: Callable[..., T], *arguments: Any) -> T | None:
        """The result of `make`; None where it raises, which is counted as a broken record.

        Any error but one of object storage counts: records may contain anything, and none may end a job.
        """
        try:
            return make(*arguments)
        except StorageError:
            raise
        except BrokenRecordError as err:
            self.add_broken(place, str(err))
        except UnicodeDecodeError as err:
            self.add_broken(place, f"not UTF-8 at byte {err.start}")
        except Exception as err:
            self.add_broken(place, f"cannot be read: {type(err).__name__}: {err}")
        return None


def article_of(record: dict[str, Any], source: str, place: str) -> Article:
    """The article of a record. Raises BrokenRecordError naming the wrong field."""
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise BrokenRecordError(
            f"expected the fields id, title, text; {', '.join(missing)} is missing, "
            f"got {', '.join(map(str, list(record)[:20])) or 'none'}"
        )
    article_id, title, text = record["id"], record["title"], record["text"]
    if isinstance(article_id, bool) or not isinstance(article_id, str | int) or article_id == "":
        shown = ascii(article_id)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise BrokenRecordError(f"expected id to be a string or an integer, got {shown}")
    for name, value in (("title", "" if title is None else title), ("text", text)):
        if not isinstance(value, str):
            raise BrokenRecordError(f"expected {name} to be a string, got {type(value).__name__}")
    if len(text) > MAX_RECORD_BYTES:
        raise BrokenRecordError(too_large(len(text)))
    if not has_text(text):
        raise BrokenRecordError("its text is empty")
    own = record.get("source")
    named = own if isinstance(own, str) and own else source
    own_id, title, text, named = map(replace_surrogates, (str(article_id), title or "", text, named))
    return Article(own_id, title, text, named, place)


def replace_surrogates(text: str) -> str:
    """`text` with lone surrogates, which JSON can escape and UTF-8 cannot encode, replaced by U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def has_text(text: str) -> bool:
    """True where any character is visible: not white space, zero-width or a control character."""
    return any(c.isprintable() and not c.isspace() for c in text)


def too_large(size: int) -> str:
    """The reason why a record of `size` bytes or characters is left out."""
    return f"expected at most {MAX_RECORD_BYTES >> 20} MiB per record, got {size / 2**20:,.0f} MiB: split it"
