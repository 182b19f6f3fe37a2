"""Convert wiki markup to paragraphs of prose, through mwparserfromhell's tree.

Running text is kept, in order: words, link labels, quotations, and the text of the few templates used inside
sentences. Everything else is removed: headings, other templates, references, tables, lists, galleries, files,
categories, formulae, comments.
"""

import html
import re
from collections.abc import Callable, Collection

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

_NAMESPACES = """
file image media category bild datei kategorie fichier catégorie archivo imagen categoría immagine categoria
ficheiro imagem afbeelding bestand categorie plik grafika kategoria файл изображение категория зображення категорія
выява катэгорыя fil kategori tiedosto kuva luokka soubor obrázek súbor obrázok kategória fájl kép fișier imagine
датотека слика категорија datoteka slika kategorija dosya resim berkas gambar imatge fitxer dosiero kategorio mynd
skrá flokkur vaizdas attēls αρχείο εικόνα κατηγορία ファイル 画像 カテゴリ 文件 檔案 档案 图像 圖像 分类 分類 파일 그림
분류 ملف صورة تصنيف پرونده رده קובץ תמונה קטגוריה चित्र श्रेणी ไฟล์ ภาพ หมวดหมู่ চিত্র বিষয়শ্রেণী படிமம் fitxategi
irudi tập_tin hình thể_loại
"""
MEDIA_NAMESPACES = frozenset(name.replace("_", " ") for name in _NAMESPACES.split())
"""Names (lower case) of the File and Category namespaces in the common languages; their links are not text. A wiki
accepts its own name, the English one, and older names that its export does not list."""

# Tags whose content is not prose. mwparserfromhell also represents wiki tables and rules as such tags.
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
"""Marks a line as a list item; XML does not allow this character, so no article contains it."""

_INTERLANGUAGE = re.compile(r"^[a-z]{2,3}(-[a-z-]+)?$")
# Unpaired tags, which the parser leaves in the text.
_LOOSE_TAG = re.compile(
    r"</?(?:ref|references|small|big|br|p|div|span|center|font|sub|sup|blockquote|noinclude|includeonly|onlyinclude|"
    r"gallery|nowiki|table|tr|td|th|ul|ol|li|dl|dt|dd|i|b|u|s|em|strong|del|ins|cite|code|tt|pre|poem|math|hr|abbr|"
    r"section|imagemap|syntaxhighlight|source|timeline|score|strike|var|kbd|samp|q|bdi|bdo|ruby|rt|rp|rb|h[1-6])"
    r"(?:\s[^<>]{0,300})?\s?/?\s?>",
    re.IGNORECASE,
)
_LOOSE_SPACE = re.compile(r"</?\s?br\b[^<>]{0,100}>|<ref\b[^<>]{0,300}>", re.IGNORECASE)
_LOOSE_QUOTES = re.compile(r"'{2,5}")
_VARIANT = re.compile(r"-\{([^{}]*)\}-")
"""A text in several scripts of one language, as in Chinese and Serbian wikis."""
_LOOSE_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_LOOSE_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_SWITCH = re.compile(r"__[A-Z]+__")
_PARAGRAPH_BREAK = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
# Remains of removed templates: "( ; born 1950)", "( )", "covers .". White space is single by then. The possessive
# quantifiers and the lookbehind keep long runs of commas linear.
_AFTER_BRACKET = re.compile(r"\([;, ]++")
_BEFORE_BRACKET = re.compile(r"(?<![;, ])[;, ]++\)")
_EMPTY_BRACKETS = re.compile(r" ?\( ?\)")
_BEFORE_STOP = re.compile(r" ([,.])(?= |$)")


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


# Templates that are part of a sentence. All others are removed.
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
    # A category of another project is commons:Category:Mills; a link with a leading colon shows its title.
    names = [] if title.startswith(":") else title.split(":")[:-1]
    if any(name.strip().lower().replace("_", " ") in drop for name in names):
        return ""
    if colon and link.text is None and _INTERLANGUAGE.match(prefix):
        return ""
    return _render(link.title if link.text is None else link.text, drop).removeprefix(":")


def _render_tag(tag: Tag, drop: Collection[str]) -> str:
    name = str(tag.tag).strip().lower()
    if name == "nowiki":
        return "" if tag.contents is None else str(tag.contents)
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
            out.append(_loose(str(node.value)))
        elif isinstance(node, Wikilink):
            out.append(_render_link(node, drop))
        elif isinstance(node, Tag):
            out.append(_render_tag(node, drop))
        elif isinstance(node, Template):
            out.append(_render_template(node, drop))
        elif isinstance(node, HTMLEntity):
            out.append(html.unescape(str(node)))  # the parser's own method raises on invalid code points
        elif isinstance(node, ExternalLink) and node.title is not None:
            out.append(_render(node.title, drop))
        # All other nodes (headings, comments, template arguments, bare URLs) are not prose.
    return "".join(out)


def _loose(text: str) -> str:
    """Text without unpaired markup, which the parser leaves in it."""
    if "<" in text:
        text = _LOOSE_TAG.sub("", _LOOSE_SPACE.sub(" ", text))
    return _LOOSE_QUOTES.sub("", text) if "''" in text else text


def _variant(match: re.Match[str]) -> str:
    """The first variant of -{zh-hans:a; zh-hant:b}-, the text of -{a}-, or nothing for one that only sets a rule."""
    flags, bar, body = match[1].rpartition("|")
    if bar and set(flags.upper()) & set("HT-"):
        return ""
    first = body.split(";")[0].strip()
    code, colon, text = first.partition(":")
    return text.strip() if colon and _INTERLANGUAGE.match(code.strip()) else body


def _tidy(paragraph: str) -> str:
    paragraph = _AFTER_BRACKET.sub("(", " ".join(paragraph.split()))
    paragraph = _BEFORE_BRACKET.sub(")", paragraph)
    paragraph = _EMPTY_BRACKETS.sub("", paragraph)
    return _BEFORE_STOP.sub(r"\1", paragraph).strip()


def _without_tables(lines: list[str]) -> list[str]:
    """The lines outside malformed tables, which the parser leaves as text; prose lines do not start with "|" or "!"."""
    kept, within = [], False
    last_end = max((i for i, line in enumerate(lines) if line.lstrip().startswith("|}")), default=-1)
    for i, line in enumerate(lines):
        start = line.lstrip()[:2]
        if start == "{|":
            within = True
        elif start == "|}":
            within = False
        elif start[:1] != "|" and not (within and (start[:1] in ("!", "") or i < last_end)):
            kept.append(line)
    return kept


def prose_of(markup: str, media_namespaces: Collection[str] = MEDIA_NAMESPACES) -> str:
    """The article's paragraphs in order, separated by blank lines; empty where it has no prose.

    media_namespaces: lower-case names of the wiki's own File and Category namespaces.
    Raises whatever the parser raises on markup that it cannot parse.
    """
    drop = MEDIA_NAMESPACES.union(media_namespaces)
    if "-{" in markup:
        markup = _VARIANT.sub(_variant, markup)
    rendered = _SWITCH.sub("", _render(mwparserfromhell.parse(markup), drop))
    rendered = _LOOSE_LINK.sub(
        lambda m: "" if m[1].partition(":")[0].strip().lower() in drop else m[1].rpartition("|")[2],
        _LOOSE_TEMPLATE.sub("", rendered),
    )
    lines = [line for line in _without_tables(rendered.split("\n")) if _LIST_LINE not in line]
    paragraphs = (_tidy(p) for p in _PARAGRAPH_BREAK.split("\n".join(lines)))
    return "\n\n".join(p for p in paragraphs if any(c.isalnum() for c in p))
