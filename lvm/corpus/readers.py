"""Stream articles from Wikipedia dumps, JSON, CSV, Parquet and text folders.

Nothing is decompressed to disk and no file is held in memory. A broken *record* (a line that is not JSON, a page
without text) is counted with its place and reason, and reading goes on. A broken *file* (truncated gzip, malformed
XML, a missing column) raises InputError with its name and the position, after the records before the damage.
Supported files: `lvm.corpus.inputs`.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lvm.corpus.dump import read_dump
from lvm.corpus.inputs import (
    PACKING_ERRORS,
    InputFile,
    damaged,
    list_inputs,
    opened,
    printable_name,
    stem_of,
    text_files,
)
from lvm.corpus.records import (
    FIELDS,
    MAX_RECORD_BYTES,
    Article,
    BrokenRecordError,
    OnPosition,
    ReadReport,
    Record,
    article_of,
    too_large,
)
from lvm.errors import InputError
from lvm.storage import Location

BATCH_BYTES = 32 << 20
"""Bytes of Parquet text decoded at a time; a batch has at least one row."""


def read_articles(
    path: str | Location, limit: int | None = None, report: ReadReport | None = None, strict: bool = True
) -> Iterator[Article]:
    """Articles of every input under `path`, in order, at most `limit`; fills `report` on the way.

    Raises InputError with name and position of a broken file; without `strict` the file is reported and the next one
    read.
    """
    report = report if report is not None else ReadReport()
    taken = 0
    if limit == 0:
        return
    for input_file in list_inputs(path):
        try:
            for record in read_records(input_file, report):
                plain = report.read(f"{input_file.name}, {record.place}", record.plain)
                if plain is None:
                    report.articles -= 1
                    continue
                yield plain[0]
                taken += 1
                if taken == limit:
                    return
        except (InputError, OSError) as err:
            if strict:
                raise
            report.add_broken_file(input_file.name, err)


def read_records(
    input_file: InputFile, report: ReadReport, on_position: OnPosition | None = None
) -> Iterator[Record]:
    """Records of one input, in file order, with markup unparsed.

    Raises InputError with name and position of a broken file.
    """
    reader = {
        "wikipedia": read_dump,
        "json": _read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "text": _read_text_folder,
    }[input_file.format]
    if input_file.format != "text" and input_file.path.stat().st_size == 0:
        raise InputError(
            f"{printable_name(str(input_file.path))} is empty (0 bytes); write or download the file again"
        )
    for record in reader(input_file, report, on_position or (lambda _: None)):
        report.articles += 1
        yield record


# ------------------------------------------------------------------------------------------------ JSON


def _read_json(input_file: InputFile, report: ReadReport, on_position: OnPosition) -> Iterator[Record]:
    """One object per line; or, by the first line, an array or objects that span several lines."""
    path, name = input_file.path, input_file.name
    source = stem_of(path)
    last = "its beginning"
    with opened(path) as (file, position):
        try:
            first = file.readline(64)
            start = first.removeprefix(codecs.BOM_UTF8).strip()
            file.seek(0)
            lower = path.name.lower()
            json_lines = lower.rpartition(".json")[2][:1] == "l" or ".ndjson" in lower
            multiline = start == b"[" or (not json_lines and (start[:1] == b"[" or start == b"{"))
            for number, value in _values(file) if multiline else _lines(file):
                last = f"{'record' if multiline else 'line'} {number}"
                place = f"{name}, {last}" if multiline else f"{name}:{number}"
                article = report.read(place, _json_article, value, source, name)
                if article is not None:
                    yield Record(article, last)
                if number % 64 == 0:
                    on_position(position())
        except PACKING_ERRORS as err:
            raise damaged(path, position(), last, err) from err
        except _BrokenJsonError as err:
            raise InputError(
                f"{printable_name(str(path))} is not valid JSON after {last}: {err}. Write one object per line "
                "(.jsonl), so that one broken record does not hide the others."
            ) from err
        on_position(position())


def _json_article(value: Any, source: str, place: str) -> Article | None:
    """The article of a line's bytes or of a value; None for an empty line."""
    if isinstance(value, _Oversized):
        raise BrokenRecordError(too_large(value.size))
    if isinstance(value, bytes):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except UnicodeDecodeError:
            raise
        except ValueError as err:
            raise BrokenRecordError(f"not JSON: {err}") from err
        except RecursionError as err:
            raise BrokenRecordError("not readable JSON: nested too deep") from err
    if not isinstance(value, dict):
        raise BrokenRecordError(f"expected a JSON object, got {type(value).__name__}")
    return article_of(value, source, place)


class _Oversized:
    """Stands for a line that is too long to be held in memory."""

    def __init__(self, size: int) -> None:
        self.size = size


class _BrokenJsonError(Exception):
    """A JSON document is truncated or malformed."""


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | _Oversized]]:
    """Lines with their numbers from 1; for a line longer than MAX_RECORD_BYTES only its size."""
    number = 0
    while line := file.readline(MAX_RECORD_BYTES):
        number += 1
        if len(line) < MAX_RECORD_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        size = len(line)
        while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
            size += len(rest)
        yield number, _Oversized(size + len(rest))


def _values(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Values of an array, or concatenated objects, with their numbers from 1."""
    import ijson

    mark = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    file.seek(mark)
    array = file.readline(64).strip()[:1] == b"["
    file.seek(mark)
    try:
        found = ijson.items(file, "item" if array else "", multiple_values=True, use_float=True)
        yield from enumerate(found, 1)
    except (ijson.JSONError, UnicodeDecodeError) as err:
        raise _BrokenJsonError(str(err).splitlines()[0][:200]) from err


# ------------------------------------------------------------------------------------------------- CSV


def _read_csv(input_file: InputFile, report: ReadReport, on_position: OnPosition) -> Iterator[Record]:
    path, name = input_file.path, input_file.name
    source = stem_of(path)
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    number = 0
    csv.field_size_limit(MAX_RECORD_BYTES)
    with opened(path) as (file, position):
        # Bytes that are not UTF-8 become lone surrogates here and a broken record below.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            head = next(rows, [])
            _require_columns(path, head)
            while True:
                number += 1
                row = report.read(f"{name}, row {number}", _csv_row, rows, head)
                if row == {}:
                    break
                if row is None:
                    continue
                article = report.read(f"{name}, row {number}", article_of, row, source, name)
                if article is not None:
                    yield Record(article, f"row {number}")
                if number % 64 == 0:
                    on_position(position())
        except PACKING_ERRORS as err:
            raise damaged(path, position(), f"row {number}", err) from err
        except csv.Error as err:
            raise InputError(f"{printable_name(str(path))} has no readable header row: {err}") from err
        on_position(position())


def _csv_row(rows: Iterator[list[str]], head: list[str]) -> dict[str, str]:
    """The next row by column name; empty at the end."""
    try:
        row = next(rows, None)
    except csv.Error as err:
        raise BrokenRecordError(f"not CSV: {err}") from err
    if row is None:
        return {}
    if len(row) != len(head):
        raise BrokenRecordError(f"expected {len(head)} fields as in the header row, got {len(row)}")
    for field in row:
        field.encode("utf-8", "surrogateescape").decode()
    return dict(zip(head, row, strict=True))


def _require_columns(path: Location, names: list[str]) -> None:
    missing = [name for name in FIELDS if name not in names]
    if missing:
        raise InputError(
            f"{printable_name(str(path))} has no column {', '.join(missing)}: expected id, title, text (and source), "
            f"got {', '.join(names)[:200] or 'none'}. Rename its columns."
        )


# --------------------------------------------------------------------------------------------- Parquet


def _read_parquet(input_file: InputFile, report: ReadReport, on_position: OnPosition) -> Iterator[Record]:
    path, name = input_file.path, input_file.name
    source = stem_of(path)
    number = 0
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            _require_columns(path, names)
            columns = [column for column in (*FIELDS, "source") if column in names]
            size, rows = path.stat().st_size, max(1, file.metadata.num_rows)
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
            row_bytes = max((g.total_byte_size / max(1, g.num_rows) for g in groups), default=1)
            batch_rows = int(min(256, max(1, BATCH_BYTES // max(1, row_bytes))))
            for batch in file.iter_batches(batch_size=batch_rows, columns=columns):
                cells = {column: _cells(batch.column(column)) for column in columns}
                for row in range(batch.num_rows):
                    number += 1
                    article = report.read(f"{name}, row {number}", _row_article, cells, row, source, name)
                    if article is not None:
                        yield Record(article, f"row {number}")
                on_position(size * number // rows)
    except (pa.ArrowException, OSError) as err:
        raise InputError(
            f"{printable_name(str(path))} is not a valid Parquet file: {str(err).strip()[:300]}, last read: row "
            f"{number}. Download the file again; finished work is kept."
        ) from err


def _row_article(cells: dict[str, Callable[[int], Any]], row: int, source: str, place: str) -> Article:
    return article_of({column: cell(row) for column, cell in cells.items()}, source, place)


def _cells(column: Any) -> Callable[[int], Any]:
    """A column's value by row. Text is decoded row by row, so that invalid UTF-8 breaks only its own row."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = any(
        of(column.type) for of in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )
    if not is_text:
        return lambda row: column[row].as_py()
    raw = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())

    def decoded(row: int) -> str | None:
        value = raw[row].as_buffer()
        if value is None:
            return None
        if value.size > MAX_RECORD_BYTES:  # before it is copied
            raise BrokenRecordError(too_large(value.size))
        return str(value.to_pybytes().decode())

    return decoded


# ------------------------------------------------------------------------------------------------ text


def _read_text_folder(input_file: InputFile, report: ReadReport, on_position: OnPosition) -> Iterator[Record]:
    folder = input_file.path
    source = stem_of(folder) if folder.is_file() else printable_name(folder.resolve().name)
    position = 0
    for file in text_files(folder):
        name = printable_name(file.name)
        article = report.read(printable_name(str(file)), _text_article, file, source, input_file.name)
        if article is not None:
            yield Record(article, name)
        try:
            position += file.stat().st_size
        except OSError:  # deleted meanwhile, and already counted as broken
            continue
        on_position(position)


def _text_article(file: Location, source: str, place: str) -> Article:
    try:
        size = file.stat().st_size
        if size > MAX_RECORD_BYTES:
            raise BrokenRecordError(too_large(size))
        data = file.read_bytes()
    except OSError as err:
        raise BrokenRecordError(f"cannot be opened: {err.strerror}") from err
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise BrokenRecordError(f"not UTF-8 at byte {err.start}: save it as UTF-8") from err
    title = stem_of(file)
    return article_of({"id": title, "title": title, "text": text}, source, place)
