"""Articles, the records they are read from, and the account of what was left out."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lvm.errors import LvmError, StorageError

T = TypeVar("T")

FIELDS = ("id", "title", "text")
"""What a record must name; `source` may be beside them."""

BROKEN_SHOWN = 20
"""How many broken records a report spells out; the others are counted."""

MAX_RECORD_BYTES = 8 << 20
"""A larger record is broken: 8 MiB is two long books, and cutting one takes 90 times its size in memory."""

MAX_WORD = 1000
"""Longest run of visible ASCII characters that is taken for language; data URIs, keys and dumps of bytes are longer."""

_HALF_PAIR = re.compile("[\ud800-\udfff]")
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
    """The record's own source, a wiki's name such as enwiki, else the name of its file or folder."""
    place: str = field(default="", compare=False)
    """Where ids are unique: the file's path inside the input, or the wiki's name. Empty: the source. Not compared, so
    that an article equals itself in another file."""

    @property
    def namespace(self) -> str:
        """With `article_id`, names the article for good."""
        return self.place or self.source


@dataclass(frozen=True, slots=True)
class Record:
    """One record as a reader finds it; markup becomes prose later, where there are processors for it."""

    article: Article
    """With wiki markup in `text` where `media_namespaces` is not None."""
    place: str
    """Where in the file: "line 7", "row 7", "page 12", or a text file's name."""
    media_namespaces: frozenset[str] | None = None
    """Names of the wiki's File and Category namespaces; None where the text is prose already."""

    def plain(self) -> tuple[Article, int]:
        """The article as prose, and how many words longer than MAX_WORD were left out of it.

        Raises BrokenRecordError on markup that cannot be parsed in time, and where no text is left.
        """
        from lvm.corpus.markup import prose

        article = self.article
        text = article.text
        if self.media_namespaces is not None:
            text = prose(text, self.media_namespaces)
            if not text:
                raise BrokenRecordError("no prose is left without its templates, tables and lists")
        text, left_out = _NO_WORD.subn(" ", text)
        if not has_text(text):
            raise BrokenRecordError(
                f"nothing is left without its {left_out} words of more than {MAX_WORD} characters"
                if left_out
                else "its text is empty"
            )
        return Article(article.article_id, article.title, text, article.source, article.place), left_out


class BrokenRecordError(ValueError):
    """One record cannot be used; the message is the reason."""


@dataclass(frozen=True)
class BrokenRecord:
    """A record that was left out."""

    place: str
    """File and line, row or page."""
    reason: str
    """Expected and got."""


@dataclass
class ReadReport:
    """What became of the records of one input. Readers fill it as they go."""

    articles: int = 0
    """Records handed on."""
    num_broken: int = 0
    """Records left out because they are damaged."""
    broken: list[BrokenRecord] = field(default_factory=list)
    """The first BROKEN_SHOWN of them."""
    broken_files: list[BrokenRecord] = field(default_factory=list)
    """Files that broke, and why; their records before that place were handed on."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records that are no articles, by kind: redirect, disambiguation, other namespace."""

    def add_broken(self, place: str, reason: str) -> None:
        """Count a broken record; the first BROKEN_SHOWN are kept with place and reason."""
        self.num_broken += 1
        if len(self.broken) < BROKEN_SHOWN:
            self.broken.append(BrokenRecord(whole(place), whole(reason)[:500]))

    def add_broken_file(self, name: str, err: LvmError | OSError) -> None:
        """Keep a file that broke, and why."""
        reason = str(err) if isinstance(err, LvmError) else f"{name} cannot be read: {err.strerror}"
        self.broken_files.append(BrokenRecord(name, reason))

    def read(self, place: str, make: Callable[..., T], *arguments: Any) -> T | None:
        """What `make` makes of a record; None where the record is broken, which is counted.

        Any error but one of object storage is the record's: what records can hold is not to be listed, and none may
        end a job.
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
    """The article a record of named fields holds. Raises BrokenRecordError naming the field that is wrong."""
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise BrokenRecordError(
            f"expected the fields id, title, text; {', '.join(missing)} is missing, "
            f"found {', '.join(map(str, list(record)[:20])) or 'none'}"
        )
    article_id, title, text = record["id"], record["title"], record["text"]
    if isinstance(article_id, bool) or not isinstance(article_id, str | int) or article_id == "":
        raise BrokenRecordError(f"expected id to be a text or an integer, got {short(article_id)}")
    if title is not None and not isinstance(title, str):
        raise BrokenRecordError(f"expected title to be a text, got {type(title).__name__}")
    if not isinstance(text, str):
        raise BrokenRecordError(f"expected text to be a text, got {type(text).__name__}")
    if len(text) > MAX_RECORD_BYTES:
        raise BrokenRecordError(too_large(len(text)))
    if not has_text(text):
        raise BrokenRecordError("its text is empty")
    own = record.get("source")
    named = own if isinstance(own, str) and own else source
    return Article(whole(str(article_id)), whole(title or ""), whole(text), whole(named), place)


def whole(text: str) -> str:
    """`text` with half surrogate pairs replaced by U+FFFD: JSON and XML can spell them, no file can hold them."""
    return text if text.isascii() else _HALF_PAIR.sub("\ufffd", text)


def has_text(text: str) -> bool:
    """False where all of it is white space or invisible (zero-width characters, controls)."""
    return any(c.isprintable() and not c.isspace() for c in text)


def short(value: Any) -> str:
    """A value as a message can hold it."""
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def too_large(size: int) -> str:
    """The reason why a record of `size` bytes or characters is left out."""
    return f"expected at most {MAX_RECORD_BYTES >> 20} MiB per record, got {size / 2**20:,.0f} MiB: split it"
