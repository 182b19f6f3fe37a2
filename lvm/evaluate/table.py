"""Tables of formatted cells, as text and as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

UNKNOWN = "-"
"""Cell of a value that was not measured."""


@dataclass(frozen=True)
class Table:
    """A table of formatted cells."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """Explains the columns in a sentence or two."""
    emphasised: frozenset[int] = frozenset()
    """Indices of the rows that are models, not baselines."""


def table_of_columns(
    title: str,
    items: Sequence[T],
    columns: Mapping[str, Callable[[T], str]],
    note: str = "",
    emphasised: frozenset[int] = frozenset(),
) -> Table:
    """A table with a row per item. columns: header to the function that formats an item's cell."""
    rows = tuple(tuple(cell(item) for cell in columns.values()) for item in items)
    return Table(title, tuple(columns), rows, note, emphasised)


def as_text(table: Table) -> str:
    """The table for a terminal, with aligned columns, numbers to the right."""
    columns = list(zip(table.headers, *table.rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [_numeric(column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(
        [table.title, line(table.headers), *(line(row) for row in table.rows), table.note]
    ).rstrip()


def as_markdown(table: Table) -> str:
    """The table with its heading and note; models in bold."""
    columns = list(zip(table.headers, *table.rows, strict=True))
    rule = ["---:" if _numeric(column[1:]) else "---" for column in columns]
    lines = [f"## {table.title}", "", _pipes(table.headers), _pipes(rule)]
    for number, row in enumerate(table.rows):
        # The name is in the first column, or in the second after the rank.
        name = 1 if table.headers[0] == "#" else 0
        bold = number in table.emphasised
        lines.append(_pipes([f"**{c}**" if bold and i == name else c for i, c in enumerate(row)]))
    return "\n".join([*lines, "", table.note]).rstrip() + "\n"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _numeric(cells: Sequence[str]) -> bool:
    filled = [c for c in cells if c and c != UNKNOWN]
    return bool(filled) and all(c[0].isdigit() or (c[0] in "+-<" and c[1:2].isdigit()) for c in filled)
