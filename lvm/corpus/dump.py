"""Read id, title and the last revision's markup of each page of a MediaWiki export.

All other elements (dates, contributors, those of later schema versions) are ignored, so none can make a page fail.
"""

import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element, ParseError, iterparse

from lvm.corpus.inputs import PACKING_ERRORS, InputFile, damaged, opened, printable_name, stem_of
from lvm.corpus.records import (
    MAX_RECORD_BYTES,
    Article,
    BrokenRecordError,
    OnPosition,
    ReadReport,
    Record,
    has_text,
    replace_surrogates,
    too_large,
)
from lvm.corpus.wikitext import MEDIA_NAMESPACES
from lvm.errors import InputError

# A page that contains one of these templates outside comments is a disambiguation page.
_DISAMBIGUATION = re.compile(
    r"\{\{\s{0,9}(?:"
    + "|".join(
        sorted(
            {
                *("disambiguation", "disambig", "disamb", "dab", "disambiguation[ _]page", "hndis", "geodis"),
                *("disambiguation[ _]cleanup", "human[ _]name[ _]disambiguation", "numberdis", "schooldis"),
                *("place[ _]name[ _]disambiguation", "hospitaldis", "roaddis", "airport[ _]disambiguation"),
                *("letter-number[ _]combination[ _]disambiguation", "begriffsklärung", "homonymie"),
                *("desambiguación", "desambiguação", "disambigua", "doorverwijspagina"),
            }
        )
    )
    + r")\s{0,9}[|}]",
    re.IGNORECASE,
)


def read_dump(input_file: InputFile, report: ReadReport, on_position: OnPosition) -> Iterator[Record]:
    """Articles of a dump, in file order. Raises InputError with the position where the file is damaged."""
    path = input_file.path
    source, place, media, titles = stem_of(path), input_file.name, MEDIA_NAMESPACES, {}
    last = "its head"
    with opened(path) as (xml, position):
        try:
            events = iterparse(xml, ("start", "end"))
            within: list[Element] = []
            for event, element in events:
                name = _name(element)
                if event == "start":
                    if not within and name != "mediawiki":
                        raise InputError(
                            f"{printable_name(str(path))} is XML of <{name}>, expected a MediaWiki export "
                            "(<mediawiki>), such as pages-articles.xml.bz2 of dumps.wikimedia.org"
                        )
                    within.append(element)
                    continue
                within.pop()
                depth = len(within)
                if name == "siteinfo" and depth == 1:
                    dbname = (_text(element, "dbname") or "").strip()
                    if dbname:
                        source = place = replace_surrogates(dbname)
                    titles = {
                        (space.text or "").strip().lower(): space.get("key")
                        for space in element.iter()
                        if _name(space) == "namespace"
                    }
                    media = media.union(t for t, key in titles.items() if key in ("-2", "6", "14") and t)
                elif name == "revision" and depth == 2:
                    _drop_earlier_revisions(within[-1], element)
                elif name == "page" and depth == 1:
                    title = replace_surrogates((_text(element, "title") or "").strip())
                    own = replace_surrogates((_text(element, "id") or "").strip())
                    last = f"page {own or '?'} ({title or 'no title'})"
                    markup = report.read(
                        f"{input_file.name}, {last}", _markup_of, element, title, titles, report
                    )
                    if markup is not None:
                        # Titles are unique within a wiki, too.
                        yield Record(
                            Article(own or title, title, markup, source, place), f"page {own or title}", media
                        )
                    on_position(position())
                if depth == 1:
                    # Remove this very element, not the first: the parser is ahead of its events.
                    within[0].remove(element)
        except PACKING_ERRORS as err:
            raise damaged(path, position(), last, err) from err
        except ParseError as err:
            line, column = getattr(err, "position", (0, 0))
            raise InputError(
                f"{printable_name(str(path))} is broken XML at line {line:,}, column {column:,} (byte "
                f"{position():,} of {path.stat().st_size:,}), last read: {last}: {str(err)[:200]}. Expected a complete "
                "MediaWiki export. Download the file again; finished work is kept."
            ) from err
        on_position(position())


def _name(element: Element) -> str:
    """The element's name without its namespace."""
    return str(element.tag).rpartition("}")[2]


def _child(element: Element, name: str) -> Element | None:
    return next((child for child in element if _name(child) == name), None)


def _text(element: Element, name: str) -> str | None:
    child = _child(element, name)
    return None if child is None else child.text


def _drop_earlier_revisions(page: Element, last: Element) -> None:
    """Free earlier revisions: a full history does not fit in memory."""
    for revision in [child for child in page if _name(child) == "revision"]:
        if revision is last:
            return
        page.remove(revision)


def _markup_of(page: Element, title: str, spaces: dict[str, str | None], report: ReadReport) -> str | None:
    """Markup of the page's last revision; None for a page that is not an article, which is counted in `report`.

    Raises BrokenRecordError where the page has no title or no text.
    """
    if not title:
        raise BrokenRecordError("expected a page with a title, it has none")
    space = _text(page, "ns")
    if space is None:  # exports before version 0.6
        space = spaces.get(title.partition(":")[0].strip().lower(), "0") if ":" in title else "0"
    if (space or "").strip() != "0":
        report.skipped["other namespace"] += 1
        return None
    if _child(page, "redirect") is not None:
        report.skipped["redirect"] += 1
        return None
    revisions = [child for child in page if _name(child) == "revision"]
    if not revisions:
        raise BrokenRecordError("expected a revision, the page has none")
    model = (_text(revisions[-1], "model") or "").strip() or "wikitext"
    if model != "wikitext":
        report.skipped[f"content model {replace_surrogates(model)[:40]}"] += 1
        return None
    markup = replace_surrogates(_text(revisions[-1], "text") or "")
    if len(markup) > MAX_RECORD_BYTES:
        raise BrokenRecordError(too_large(len(markup)))
    if not has_text(markup):
        raise BrokenRecordError("its text is empty")
    if markup.lstrip()[:9].lower() == "#redirect":
        report.skipped["redirect"] += 1
        return None
    if _DISAMBIGUATION.search(without_comments(markup)):
        report.skipped["disambiguation"] += 1
        return None
    return markup


def without_comments(markup: str) -> str:
    """The markup without <!-- comments -->, in linear time even where they nest or are not closed."""
    kept, start = [], 0
    while (opening := markup.find("<!--", start)) >= 0:
        closing = markup.find("-->", opening + 4)
        if closing < 0:
            break
        kept.append(markup[start:opening])
        start = closing + 3
    kept.append(markup[start:])
    return "".join(kept)
