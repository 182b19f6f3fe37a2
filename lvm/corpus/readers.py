"""Articles out of Wikipedia dumps, JSON lines, Parquet and text folders, one at a time.

Nothing is unpacked to disk and no file is held in memory: a reader yields one record after another. Two kinds
of damage are told apart. A broken *record* (a line that is no JSON, a page without text) is counted with its
reason and place, and reading goes on. A broken *file* (cut gzip, malformed XML, a missing column) raises
InputError with the file's name and the position, since what follows cannot be trusted.

    .xml .xml.bz2 .xml.gz               MediaWiki export, as pages-articles of dumps.wikimedia.org
    .jsonl .json .ndjson (.gz, .bz2)    one object a line: id, title, text, and source if there is one
    .parquet                            columns id, title, text, and source if there is one
    a folder's .txt files               one article a file, its title the file's name; in a folder with
                                        files of the other kinds they are left alone
    sample                              the articles that come with this project
"""

import bz2
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast
from xml.etree.ElementTree import ParseError

import mwparserfromhell
import pyarrow as pa
import pyarrow.parquet as pq

from lvm.corpus.wikitext import MEDIA_NAMESPACES, prose_of
from lvm.errors import InputError, StorageError
from lvm.storage import Location, RemotePath, files_below, location

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
"""Folder of the bundled articles, in a checkout."""

BROKEN_SHOWN = 20
"""How many broken records a report spells out; the others are counted."""

Format = Literal["wikipedia", "jsonl", "parquet", "text"]
_SUFFIXES: dict[str, Format] = {
    ".xml": "wikipedia",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
_COMPRESSIONS = frozenset({".gz", ".bz2"})
_EXPECTED = (
    "a Wikipedia dump (.xml, .xml.bz2, .xml.gz), JSON lines (.jsonl, .json, .ndjson, also .gz or .bz2), "
    "Parquet (.parquet), a folder of these or of .txt files, or the word sample"
)

# A page is a disambiguation page when one of these templates stands on it. The search is over raw markup, so
# that such pages need no parsing; the parser then confirms it.
_DISAMBIGUATION = frozenset(
    {
        *("disambiguation", "disambig", "disamb", "dab", "disambiguation page", "disambiguation cleanup"),
        *(
            "hndis",
            "human name disambiguation",
            "geodis",
            "place name disambiguation",
            "numberdis",
            "schooldis",
        ),
        *("hospitaldis", "roaddis", "airport disambiguation", "letter-number combination disambiguation"),
        *(
            "begriffsklärung",
            "homonymie",
            "desambiguación",
            "desambiguação",
            "disambigua",
            "doorverwijspagina",
        ),
    }
)
_MAYBE_DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:"
    + "|".join(re.escape(name).replace(r"\ ", "[ _]") for name in sorted(_DISAMBIGUATION))
    + r")\s*[|}]",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Article:
    """One document in reading order."""

    article_id: str
    """Its id in the source; with `source` it names the article for good."""
    title: str
    """May be empty."""
    text: str
    """Paragraphs separated by a blank line."""
    source: str
    """The record's own source, a wiki's name such as enwiki, else the name of its file or folder."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as a reader finds it; markup becomes prose later, where there are processors for it."""

    article: Article
    """With wiki markup in `text` where `media_namespaces` is not None."""
    place: str
    """Where in the file: "line 7", "row 7", "page 12", or a text file's name."""
    media_namespaces: frozenset[str] | None = None
    """Names of the wiki's File and Category namespaces; None where the text is prose already."""

    def plain(self) -> Article:
        """The article as prose. Raises BrokenRecordError on unreadable markup and where no prose is left."""
        article = self.article
        if self.media_namespaces is None:
            return article
        try:
            text = prose_of(article.text, self.media_namespaces)
        except mwparserfromhell.parser.ParserError as err:
            raise BrokenRecordError(f"its markup cannot be parsed: {err}") from err
        if not text:
            raise BrokenRecordError("no prose is left without its templates, tables and lists")
        return Article(article.article_id, article.title, text, article.source)


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
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records that are no articles, by kind: redirect, disambiguation, other namespace."""

    def add_broken(self, place: str, reason: str) -> None:
        """Count a broken record; the first BROKEN_SHOWN are kept with place and reason."""
        self.num_broken += 1
        if len(self.broken) < BROKEN_SHOWN:
            self.broken.append(BrokenRecord(place, reason))


@dataclass(frozen=True)
class InputFile:
    """One thing to read in one pass: a file, or all text files of a folder."""

    path: Location
    """The file, or the folder of .txt files."""
    format: Format
    """Which reader takes it."""
    name: str
    """Its path inside the input the user named; equal for the same corpus in another place."""


# ------------------------------------------------------------------------------------------- which files


def input_root(path: str | Location) -> Location:
    """The file or folder an --input names, "sample" the bundled one. Raises InputError when it is absent."""
    if str(path) == "sample":
        if not SAMPLE.is_dir():
            raise InputError(
                f"no bundled sample at {SAMPLE}; it comes with a checkout of the repository, not with the "
                "installed library. Run from a checkout, or give --input a corpus of your own."
            )
        return SAMPLE
    root = location(path)
    if not root.exists():
        raise InputError(f"--input {root} does not exist; expected {_EXPECTED}")
    return root


def list_inputs(path: str | Location) -> list[InputFile]:
    """What `path` holds that can be read, in order of name. Hidden files (. or _ first) are passed over.

    Raises InputError when there is nothing, saying what was found instead.
    """
    root = input_root(path)
    if root.is_file():
        kind = _format_of(root)
        if kind is None:
            raise InputError(f"--input {root} has no known ending; expected {_EXPECTED}")
        return [InputFile(root, kind, root.name)]
    inputs: list[InputFile] = []
    others: list[str] = []
    texts: dict[Location, str] = {}
    for file in files_below(root):
        inside = PurePosixPath(file.relative_to(root))  # type: ignore[arg-type]  # both of one kind
        if any(part.startswith((".", "_")) for part in inside.parts):
            continue
        kind = _format_of(file)
        if kind == "text":
            texts[file.parent] = (inside.parent / "*.txt").as_posix()
        elif kind is not None:
            inputs.append(InputFile(file, kind, inside.as_posix()))
        else:
            others.append(inside.as_posix())
    # Text beside other formats is their README or licence, not a corpus.
    beside = {i.path.parent for i in inputs}
    inputs += [InputFile(folder, "text", name) for folder, name in texts.items() if folder not in beside]
    inputs.sort(key=lambda i: i.name)
    if not inputs:
        found = f"only {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else "no files"
        raise InputError(f"--input {root} holds {found}; expected {_EXPECTED}")
    return inputs


def text_files(folder: Location) -> list[Location]:
    """The .txt files right inside `folder`, in order of name."""
    if folder.is_file():
        return [folder]
    return sorted(
        (p for p in folder.iterdir() if p.suffix.lower() == ".txt" and p.name[0] not in "._"),
        key=lambda p: p.name,
    )


def _format_of(path: Location) -> Format | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        kind = _SUFFIXES.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in ("wikipedia", "jsonl") else None
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _stem(path: Location) -> str:
    """The file's name without the endings that say its format."""
    name = path.name
    for suffix in reversed(path.suffixes):
        if suffix.lower() not in _SUFFIXES and suffix.lower() not in _COMPRESSIONS:
            break
        name = name.removesuffix(suffix)
    return name or path.name


# ---------------------------------------------------------------------------------------------- articles


def read_articles(
    path: str | Location, limit: int | None = None, report: ReadReport | None = None
) -> Iterator[Article]:
    """Articles of every input under `path`, in order, at most `limit`; `report` is filled on the way.

    Raises InputError on a broken file, naming it and the position.
    """
    report = report if report is not None else ReadReport()
    taken = 0
    for input_file in list_inputs(path):
        for record in read_records(input_file, report):
            if limit is not None and taken >= limit:
                return
            try:
                article = record.plain()
            except BrokenRecordError as err:
                report.articles -= 1
                report.add_broken(f"{input_file.name}, {record.place}", str(err))
                continue
            yield article
            taken += 1
            if limit is not None and taken >= limit:
                return


def read_records(
    input_file: InputFile, report: ReadReport, on_position: Callable[[int], None] | None = None
) -> Iterator[Record]:
    """Records of one input, in file order; markup is left as it is.

    on_position: called now and then with the number of (compressed) bytes read so far.
    Raises InputError on a broken file, naming it and the position.
    """
    reader = {
        "wikipedia": _read_wikipedia,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "text": _read_text_folder,
    }[input_file.format]
    for record in reader(input_file, report, on_position or (lambda _: None)):
        report.articles += 1
        yield record


def _article_of(record: dict[str, Any], source: str) -> Article:
    """The article a record of named fields holds. Raises BrokenRecordError naming the field that is wrong."""
    missing = [name for name in ("id", "title", "text") if name not in record]
    if missing:
        raise BrokenRecordError(
            f"expected the fields id, title, text; {', '.join(missing)} is missing, "
            f"found {', '.join(record) or 'none'}"
        )
    article_id, title, text = record["id"], record["title"], record["text"]
    if isinstance(article_id, bool) or not isinstance(article_id, str | int) or article_id == "":
        raise BrokenRecordError(f"expected id to be a text or an integer, got {article_id!r}")
    if title is not None and not isinstance(title, str):
        raise BrokenRecordError(f"expected title to be a text, got {type(title).__name__}")
    if not isinstance(text, str):
        raise BrokenRecordError(f"expected text to be a text, got {type(text).__name__}")
    if not text.strip():
        raise BrokenRecordError("its text is empty")
    own = record.get("source")
    named = own if isinstance(own, str) and own else source
    return Article(str(article_id), _whole(title or ""), _whole(text), _whole(named))


def _whole(text: str) -> str:
    """`text` with lone surrogates replaced: JSON can spell them, no file can hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass").decode(errors="replace")
    return text


@contextmanager
def _opened(path: Location) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The file's unpacked bytes, and a function for how many of its own bytes were read."""
    with path.open("rb", buffering=1 << 20) as raw:
        match path.suffix.lower():
            case ".gz":
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield cast(IO[bytes], unpacked), raw.tell
            case ".bz2":
                with bz2.BZ2File(raw) as unbzipped:
                    yield cast(IO[bytes], unbzipped), raw.tell
            case _:
                yield raw, raw.tell


_PACKING_ERRORS = (EOFError, OSError, zlib.error)
"""What gzip and bz2 raise on cut or damaged data."""


def _damaged(path: Location, size: int, place: str, err: Exception) -> InputError:
    cut = isinstance(err, EOFError)
    what = "ends too early" if cut else f"cannot be unpacked ({err})"
    return InputError(
        f"{path} {what}: expected a whole {path.suffix} file, it breaks at byte {size:,} of "
        f"{path.stat().st_size:,}, last read: {place}. Fetch the file again; finished work is kept."
    )


# ------------------------------------------------------------------------------------------ JSON lines


def _read_jsonl(
    input_file: InputFile, report: ReadReport, on_position: Callable[[int], None]
) -> Iterator[Record]:
    path = input_file.path
    source = _stem(path)
    number = 0
    with _opened(path) as (lines, position):
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise BrokenRecordError(f"expected a JSON object, got {type(record).__name__}")
                    article = _article_of(record, source)
                except UnicodeDecodeError as err:
                    report.add_broken(
                        f"{input_file.name}:{number}", f"not UTF-8 at byte {err.start} of the line"
                    )
                except BrokenRecordError as err:
                    report.add_broken(f"{input_file.name}:{number}", str(err))
                except (ValueError, RecursionError) as err:
                    report.add_broken(f"{input_file.name}:{number}", f"not JSON: {err}")
                else:
                    yield Record(article, f"line {number}")
                if number % 64 == 0:
                    on_position(position())
        except StorageError:
            raise
        except _PACKING_ERRORS as err:
            raise _damaged(path, position(), f"line {number}", err) from err
        on_position(position())


# --------------------------------------------------------------------------------------------- Parquet


def _read_parquet(
    input_file: InputFile, report: ReadReport, on_position: Callable[[int], None]
) -> Iterator[Record]:
    path = input_file.path
    source = _stem(path)
    number = 0
    try:
        with pq.ParquetFile(path.open("rb") if isinstance(path, RemotePath) else path) as file:
            names = file.schema_arrow.names
            missing = [name for name in ("id", "title", "text") if name not in names]
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}: expected id, title, text (and source), "
                    f"found {', '.join(names)}. Rename its columns."
                )
            columns = [name for name in ("id", "title", "text", "source") if name in names]
            size, rows = path.stat().st_size, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        yield Record(_article_of(row, source), f"row {number}")
                    except BrokenRecordError as err:
                        report.add_broken(f"{input_file.name}, row {number}", str(err))
                on_position(size * number // rows)
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as err:
        raise InputError(
            f"{path} is no whole Parquet file: {str(err).strip()}, last read: row {number}. "
            "Fetch the file again; finished work is kept."
        ) from err


# ---------------------------------------------------------------------------------------------- text


def _read_text_folder(
    input_file: InputFile, report: ReadReport, on_position: Callable[[int], None]
) -> Iterator[Record]:
    folder = input_file.path
    source = _stem(folder) if folder.is_file() else folder.resolve().name
    position = 0
    for file in text_files(folder):
        data = file.read_bytes()
        position += len(data)
        try:
            text = data.decode("utf-8-sig")
            article = _article_of({"id": file.stem, "title": file.stem, "text": text}, source)
        except UnicodeDecodeError as err:
            report.add_broken(str(file), f"not UTF-8 at byte {err.start}: save it as UTF-8")
        except BrokenRecordError as err:
            report.add_broken(str(file), str(err))
        else:
            yield Record(article, file.name)
        on_position(position)


# ----------------------------------------------------------------------------------------- Wikipedia


def _read_wikipedia(
    input_file: InputFile, report: ReadReport, on_position: Callable[[int], None]
) -> Iterator[Record]:
    import mwxml
    from mwxml.element_iterator import ElementIterator
    from mwxml.errors import MalformedXML

    path = input_file.path
    place = "its head"
    with _opened(path) as (xml, position):
        try:
            root = ElementIterator.from_file(xml)
            if root.tag != "mediawiki":
                raise InputError(
                    f"{path} is XML of <{root.tag}>, expected a MediaWiki export (<mediawiki>), such as "
                    "pages-articles.xml.bz2 of dumps.wikimedia.org"
                )
            source, media, names = _stem(path), MEDIA_NAMESPACES, None
            # Page by page, not mwxml.Dump: there one broken page ends the whole iteration.
            for number, element in enumerate(root, 1):
                if element.tag == "siteinfo":
                    site = mwxml.SiteInfo.from_element(element)
                    spaces = list(site.namespaces or [])
                    source = site.dbname or source
                    media = MEDIA_NAMESPACES.union(
                        s.name.lower() for s in spaces if s.id in (-2, 6, 14) and s.name
                    )
                    names = {s.name: s for s in spaces}
                elif element.tag == "page":
                    try:
                        page = mwxml.Page.from_element(element, names)
                        place = f"page {page.id} ({page.title})"
                        markup = _markup_of(page, report)
                    except (MalformedXML, ValueError, AttributeError, TypeError) as err:
                        reason = str(err) if isinstance(err, BrokenRecordError) else f"not a page: {err}"
                        report.add_broken(f"{input_file.name}, element {number}, {place}", reason)
                    else:
                        if markup is not None:
                            article = Article(str(page.id), page.title, markup, source)
                            yield Record(article, f"page {page.id}", media)
                    element.clear()
                    on_position(position())
                # mwxml empties a page but keeps its element: a gigabyte by the end of English Wikipedia.
                root.element.clear()
        except StorageError:
            raise
        except _PACKING_ERRORS as err:
            raise _damaged(path, position(), place, err) from err
        except ParseError as err:
            line, column = getattr(err, "position", (0, 0))
            raise InputError(
                f"{path} is broken XML at line {line:,}, column {column:,} (byte {position():,} of "
                f"{path.stat().st_size:,}), last read: {place}: {str(err)[:200]}. Expected a whole MediaWiki "
                "export. Fetch the file again; finished work is kept."
            ) from err
        on_position(position())


def _markup_of(page: Any, report: ReadReport) -> str | None:
    """The page's last revision's markup, None for a page that is no article; that is counted then.

    Raises BrokenRecordError when it has no text.
    """
    if page.id is None or not page.title:
        raise BrokenRecordError("expected a page with an id and a title")
    if page.namespace != 0:
        report.skipped["other namespace"] += 1
        return None
    if page.redirect:
        report.skipped["redirect"] += 1
        return None
    revision = None
    for revision in page:  # noqa: B007 - the last one counts; a full-history dump has many
        pass
    if revision is None:
        raise BrokenRecordError("expected a revision, the page has none")
    if (revision.model or "wikitext") != "wikitext":
        report.skipped[f"content model {revision.model}"] += 1
        return None
    markup = revision.text
    if not markup or not markup.strip():
        raise BrokenRecordError("its text is empty")
    if markup.lstrip()[:9].lower() == "#redirect":
        report.skipped["redirect"] += 1
        return None
    if _is_disambiguation(markup):
        report.skipped["disambiguation"] += 1
        return None
    return str(markup)


def _is_disambiguation(markup: str) -> bool:
    if not _MAYBE_DISAMBIGUATION.search(markup):
        return False
    templates = mwparserfromhell.parse(markup).filter_templates()
    return any(str(t.name).strip().lower().replace("_", " ") in _DISAMBIGUATION for t in templates)
