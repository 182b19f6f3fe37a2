"""Wiki markup to paragraphs of prose, through mwparserfromhell's tree.

What a reader sees as running text stays, in its order: words, link labels, quotations, the text of the
few templates that stand inside sentences. What is not prose goes: headings, other templates, references,
tables, lists, galleries, files, categories, formulae, comments.
"""

import re
from collections.abc import Callable, Collection

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

MEDIA_NAMESPACES = frozenset({"file", "image", "media", "category"})
"""English names (lower case) of the namespaces whose links show no text in a sentence."""

# Tags whose content is not prose. mwparserfromhell gives wiki tables and rules as tags of these names too.
_DROPPED_TAGS = frozenset(
    {
        *("ref", "references", "table", "caption", "gallery", "imagemap", "mapframe", "maplink"),
        *("ul", "ol", "dl", "li", "math", "chem", "ce", "score", "hiero", "timeline", "graph"),
        *("syntaxhighlight", "source", "pre", "templatedata", "templatestyles", "style"),
        *("categorytree", "inputbox", "section", "noinclude"),
    }
)
_BREAKING_TAGS = frozenset(
    {"hr", "p", "div", "blockquote", "poem", "center", "table", "gallery", "ul", "ol", "dl"}
)
_LIST_TAGS = frozenset({"li", "dt", "dd"})
_LIST_LINE = "\x00"
"""Marks a line as a list item; XML cannot hold this character, so no article does."""

_INTERLANGUAGE = re.compile(r"^[a-z]{2,3}(-[a-z-]+)?$")
_SWITCH = re.compile(r"__[A-Z]+__")
_PARAGRAPH_BREAK = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
# What removed templates leave behind: "( ; born 1950)", "( )", "covers .".
_AFTER_BRACKET = re.compile(r"\(\s*[;,\s]+")
_BEFORE_BRACKET = re.compile(r"[;,\s]+\)")
_EMPTY_BRACKETS = re.compile(r"\s*\(\s*\)")
_BEFORE_STOP = re.compile(r"\s+([,.])(?=\s|$)")


def _positional(template: Template, drop: Collection[str]) -> list[str]:
    """The template's unnamed parameters as prose, in order."""
    return [_render(p.value, drop).strip() for p in template.params if not p.showkey]


def _converted(args: list[str]) -> str:
    """{{convert|5|km}} as "5 km", {{convert|5|to|9|km}} as "5 to 9 km"."""
    ranges = {"to", "and", "or", "by", "x", "-", "–", "to(-)"}
    if len(args) >= 4 and args[1] in ranges:
        between = "–" if args[1] in {"-", "–"} else f" {args[1]} "
        return f"{args[0]}{between}{args[2]} {args[3]}"
    return " ".join(args[:2])


def _first(args: list[str]) -> str:
    return args[0] if args else ""


def _last(args: list[str]) -> str:
    return args[-1] if args else ""


# Templates that are words of a sentence. Everything else is removed, as boxes, notes and tables are.
_INLINE_TEMPLATES: dict[str, Callable[[list[str]], str]] = {
    **dict.fromkeys(("convert", "cvt"), _converted),
    **dict.fromkeys(("lang", "transl", "transliteration"), _last),
    **dict.fromkeys(
        (
            "nowrap",
            "nobr",
            "small",
            "abbr",
            "tooltip",
            "em",
            "strong",
            "nihongo",
            "ill",
            "interlanguage link",
        ),
        _first,
    ),
    **dict.fromkeys(("circa", "c.", "ca."), lambda args: f"c. {_first(args)}".strip()),
    **dict.fromkeys(("ndash", "snd", "spaced ndash", "–"), lambda args: " – "),
    **dict.fromkeys(("mdash", "em dash", "—"), lambda args: "—"),
    **dict.fromkeys(("frac", "fraction", "sfrac"), lambda args: "/".join(args[-2:])),
    **dict.fromkeys(("quote", "blockquote", "cquote"), lambda args: f"\n\n{_first(args)}\n\n"),
    **{
        prefix.lower(): (lambda args, prefix=prefix: f"{prefix} {_first(args)}")  # type: ignore[misc]
        for prefix in ("HMS", "USS", "SS", "RMS", "HMAS", "HMCS")
    },
}


def _render_template(template: Template, drop: Collection[str]) -> str:
    as_words = _INLINE_TEMPLATES.get(str(template.name).strip().lower().replace("_", " "))
    return as_words(_positional(template, drop)) if as_words else ""


def _render_link(link: Wikilink, drop: Collection[str]) -> str:
    title = str(link.title).strip()
    prefix, colon, _ = title.partition(":")
    if colon and prefix.strip().lower() in drop:
        return ""
    if colon and link.text is None and _INTERLANGUAGE.match(prefix):
        return ""
    return _render(link.title if link.text is None else link.text, drop).removeprefix(":")


def _render_tag(tag: Tag, drop: Collection[str]) -> str:
    name = str(tag.tag).strip().lower()
    if name in _LIST_TAGS and tag.wiki_markup:
        return _LIST_LINE
    if name == "br":
        return " "
    inside = "" if name in _DROPPED_TAGS or tag.contents is None else _render(tag.contents, drop)
    return f"\n\n{inside}\n\n" if name in _BREAKING_TAGS else inside


def _render(code: Wikicode, drop: Collection[str]) -> str:
    out = []
    for node in code.nodes:
        if isinstance(node, Text):
            out.append(str(node.value))
        elif isinstance(node, Wikilink):
            out.append(_render_link(node, drop))
        elif isinstance(node, Tag):
            out.append(_render_tag(node, drop))
        elif isinstance(node, Template):
            out.append(_render_template(node, drop))
        elif isinstance(node, HTMLEntity):
            out.append(str(node.normalize()))
        elif isinstance(node, ExternalLink) and node.title is not None:
            out.append(_render(node.title, drop))
        # What is left is headings, comments, template arguments and bare addresses: no prose.
    return "".join(out)


def _tidy(paragraph: str) -> str:
    paragraph = _AFTER_BRACKET.sub("(", paragraph)
    paragraph = _BEFORE_BRACKET.sub(")", paragraph)
    paragraph = _EMPTY_BRACKETS.sub("", paragraph)
    return _BEFORE_STOP.sub(r"\1", " ".join(paragraph.split()))


def prose_of(markup: str, media_namespaces: Collection[str] = MEDIA_NAMESPACES) -> str:
    """The article's paragraphs in order, separated by a blank line; empty where it has no prose.

    media_namespaces: names, lower case, of the wiki's own File and Category namespaces.
    Raises mwparserfromhell's ParserError on markup it cannot read.
    """
    drop = MEDIA_NAMESPACES.union(media_namespaces)
    rendered = _SWITCH.sub("", _render(mwparserfromhell.parse(markup), drop))
    lines = [line for line in rendered.split("\n") if _LIST_LINE not in line]
    paragraphs = (_tidy(p) for p in _PARAGRAPH_BREAK.split("\n".join(lines)))
    return "\n\n".join(p for p in paragraphs if any(c.isalnum() for c in p))
