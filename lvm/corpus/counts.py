"""Counts of a corpus's chunks, and of what was left out and why."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lvm.corpus.records import BROKEN_SHOWN

_IDEOGRAPH = re.compile("[\u2e80-\U0010ffff]")


@dataclass
class Counts:
    """Outcome of the records of an input or a block; instances can be added up."""

    articles: int = 0
    """Articles with at least one chunk."""
    chunks: int = 0
    words: int = 0
    """Words of the chunks, separated by white space."""
    tokens: int = 0
    """End of sequence included."""
    letters: int = 0
    """Characters of the chunks, as `letters_of` counts them."""
    long_words: int = 0
    """Words longer than `lvm.corpus.records.MAX_WORD` characters that were left out."""
    num_broken: int = 0
    broken: list[dict[str, str]] = field(default_factory=list)
    """Place and reason of the first BROKEN_SHOWN."""
    broken_files: list[dict[str, str]] = field(default_factory=list)
    """Damaged files, and why; their records before the damage were used."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Valid records that are not articles, by kind."""
    duplicates: int = 0
    """Articles left out because an earlier one of the same file or wiki has the same id."""
    first_duplicates: list[dict[str, str]] = field(default_factory=list)
    """Title and place of the first BROKEN_SHOWN."""
    sources: list[str] = field(default_factory=list)
    """The first BROKEN_SHOWN source names of the records."""

    def measure(self, texts: Sequence[str], num_tokens: Sequence[int]) -> None:
        """Replace the measures of chunks by those of these chunks."""
        self.chunks, self.tokens = len(texts), sum(num_tokens)
        self.words = sum(len(text.split()) for text in texts)
        self.letters = sum(letters_of(text) for text in texts)

    def add(self, other: "Counts") -> None:
        """Add the counts of `other` and append its examples."""
        sums = ("articles", "chunks", "words", "tokens", "letters", "long_words", "num_broken", "duplicates")
        for name in (*sums, "broken_files"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped = dict(Counter(self.skipped) + Counter(other.skipped))
        self.broken = [*self.broken, *other.broken][:BROKEN_SHOWN]
        self.first_duplicates = [*self.first_duplicates, *other.first_duplicates][:BROKEN_SHOWN]
        self.sources = list(dict.fromkeys([*self.sources, *other.sources]))[:BROKEN_SHOWN]

    def to_report(self) -> dict[str, Any]:
        """The form stored in the manifest, with means; needs at least one chunk."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("tokens", "letters", "num_broken")}
        return kept | {
            "mean_tokens": round(self.tokens / self.chunks, 2),
            "tokens_per_word": round(self.tokens / max(1, self.words), 2),
            "tokens_per_letter": round(self.tokens / max(1, self.letters), 3),
            "broken_records": self.num_broken,
        }


def letters_of(text: str) -> int:
    """Characters of a text; an East Asian one counts as three letters, as it carries as much and takes three bytes."""
    return len(text) if text.isascii() else len(text) + 2 * len(_IDEOGRAPH.findall(text))
