"""BIO tags of query and title, read off a rationale: which spans it speaks of, as what, and whether they match.

The source (MKD) has tags extracted from chains of thought; how is ours to say, with free text at hand:

- A span is a longest run of words that query or title and the rationale have in common, without function words at its
  ends; where words are not set apart by spaces (Japanese, Chinese, Korean), of two characters or more.
- It mismatches if the clause that cites it speaks of a difference ("another brand", "size differs") or negates ("not
  stated"), and does not negate a difference ("no conflict", "violates nothing"); words inside the span are not looked
  at. Cited in several clauses, it mismatches if any of them says so.
- Its attribute is what the span itself tells (a number; a colour or material word; the pair's own brand or colour), or
  else what the clause names ("brand", "shade", "size", "fabric"), or `other`: mostly the kind of product.

The words are English, as the rationales are, plus colours of the pair's own column.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BatchEncoding

ATTRIBUTES = ("brand", "color", "number", "material", "other")
OUTSIDE = 0
# O, then B and I of each attribute, matching and mismatching: 1 + 2 · 5 · 2.
TAG_NAMES = (
    "O",
    *(f"{part}-{name}-{verdict}" for name in ATTRIBUTES for verdict in ("match", "mismatch") for part in "BI"),
)

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\uac00-\ud7af"
_UNIT = re.compile(rf"[{_UNSPACED}]|\d+(?:[.,/]\d+)*|(?:(?![{_UNSPACED}])[^\W\d_])+")
_CLAUSE = re.compile(r"[.!?。！？](?=\s|$)|[,;—–、。]|\b(?:but|although|though|while|whereas|yet|however)\b", re.I)
_NEGATION = re.compile(
    r"\b(?:no|not|neither|never|none|nothing|nobody|cannot|without|hardly)\b|n['’]t\b",
    re.I,
)
_DIFFERENCE = re.compile(
    r"\b(?:instead|rather|unlike|another|different(?:ly)?|differ(?:s|ing)?|wrong|lack(?:s|ing|ed)?|miss(?:es|ing)|absent|"
    r"opposite|mismatch(?:es|ed)?|conflict(?:s|ing)?|contradict(?:s|ing)?|disagrees?|unequal|unsupported|unrelated|unmet|"
    r"departs?|fail(?:s|ed|ing)?|violat(?:es?|ing)|negates?|exclude[sd]?|reject(?:s|ed)?|refused?|disappoints?|breaches|"
    r"against|versus)\b",
    re.I,
)
_OF_ATTRIBUTE = {
    "color": "black white grey gray red blue navy green yellow orange purple violet pink brown beige gold golden "
    "silver turquoise teal burgundy ivory cream khaki negro negra blanco blanca rojo roja azul verde amarillo rosa",
    "material": "leather cotton wool silk linen polyester nylon denim plastic wood wooden bamboo metal steel stainless "
    "aluminium aluminum iron brass copper glass ceramic porcelain silicone rubber latex velvet suede fleece paper",
}
_TELLING = {word: name for name, words in _OF_ATTRIBUTE.items() for word in words.split()}
_NAMED = {
    "brand": re.compile(r"\b(?:brand|maker|manufacturer|make)\b", re.I),
    "color": re.compile(r"\b(?:colou?rs?|shade|hue)\b", re.I),
    "number": re.compile(r"\b(?:sizes?|dimensions?|capacity|count|quantity|length|width|volume|weight|model)\b", re.I),
    "material": re.compile(r"\b(?:materials?|fabric|made of)\b", re.I),
}
_FUNCTION_WORDS = (
    "a an the of for to in on at by with without and or but not no nor as is are was be it its this that these those "
    "from into than then so if s t d m re ve ll only all any one y o de del la el los las un una con sin para por en"
)
_FUNCTION = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True)
class Span:
    """Characters of a query (side 0) or title (side 1) that a rationale cites."""

    side: int
    start: int
    end: int
    attribute: str
    mismatch: bool

    @property
    def tag(self) -> int:
        """Number of its B tag; its I tag is the next."""
        return 1 + 4 * ATTRIBUTES.index(self.attribute) + 2 * self.mismatch


def _units(text: str) -> list[tuple[str, int, int]]:
    """Split into words, numbers and unspaced characters: what is compared (no plural s), start, end."""
    units = []
    for match in _UNIT.finditer(text):
        word = unicodedata.normalize("NFKC", match[0]).casefold()
        plural = len(word) > 3 and word.endswith("s") and not word.endswith("ss")
        units.append((word[:-1] if plural else word, match.start(), match.end()))
    return units


def _clauses(text: str) -> list[tuple[int, int]]:
    ends = [*(match.start() for match in _CLAUSE.finditer(text)), len(text)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def cited_spans(
    query: str, title: str, rationale: str, brand: str | None = None, color: str | None = None
) -> list[Span]:
    """Return the spans of query and title that a rationale cites, in order, none overlapping another.

    >>> for span in cited_spans("red nike shoe", "Adidas shoe, red", "Red is met. Nike was asked, another brand came."):
    ...     print(span)
    Span(side=0, start=0, end=3, attribute='color', mismatch=False)
    Span(side=0, start=4, end=8, attribute='other', mismatch=False)
    Span(side=1, start=13, end=16, attribute='color', mismatch=False)
    """
    said = _units(rationale)
    places: dict[str, list[int]] = {}
    for place, (word, _, _) in enumerate(said):
        places.setdefault(word, []).append(place)
    clauses = _clauses(rationale)
    own = {word: "color" for word, _, _ in _units(color or "")} | {word: "brand" for word, _, _ in _units(brand or "")}
    found = []
    for side, text in enumerate((query, title)):
        units = _units(text)
        position = 0
        while position < len(units):
            runs = [(_common(units[position:], said[place:]), place) for place in places.get(units[position][0], [])]
            longest = max((length for length, _ in runs), default=0)
            part = _trimmed(units[position : position + longest])
            if part:
                cited = [said[place : place + length] for length, place in runs if length == longest]
                around = [_clause(rationale, clauses, run[0][1], run[-1][2]) for run in cited]
                mismatch = any(map(says_mismatch, around))
                attribute = _attribute([word for word, _, _ in part], own, " ".join(around))
                found.append(Span(side, part[0][1], part[-1][2], attribute, mismatch))
            position += max(longest, 1)
    return found


def _common(one: list[tuple[str, int, int]], other: list[tuple[str, int, int]]) -> int:
    """Count the words that two lists begin with in common."""
    length = 0
    while length < min(len(one), len(other)) and one[length][0] == other[length][0]:
        length += 1
    return length


def _trimmed(units: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Take function words off the ends; nothing is left of a lone unspaced character or letter."""
    while units and units[0][0] in _FUNCTION:
        units = units[1:]
    while units and units[-1][0] in _FUNCTION:
        units = units[:-1]
    lone = len(units) == 1 and len(units[0][0]) == 1 and not units[0][0].isdigit()
    return [] if lone else units


def _clause(text: str, clauses: list[tuple[int, int]], start: int, end: int) -> str:
    """Return the clause around a citation, without the citation itself."""
    first = max(begin for begin, _ in clauses if begin <= start)
    last = min(stop for _, stop in clauses if stop >= end)
    return f"{text[first:start]} {text[end:last]}"


def says_mismatch(clause: str) -> bool:
    """Tell whether a clause speaks of a difference, or negates, but not both.

    >>> [says_mismatch(clause) for clause in ("the brand agrees", "another brand", "not red", "no conflict")]
    [False, True, True, False]
    """
    negated = len(_NEGATION.findall(clause)) % 2 == 1
    return negated != bool(_DIFFERENCE.search(clause))


def _attribute(words: list[str], own: dict[str, str], clause: str) -> str:
    if any(word[0].isdigit() for word in words):
        return "number"
    told = [own.get(word) or _TELLING.get(word) for word in words]
    named = next((name for name in told if name), None)
    return named or next((name for name, pattern in _NAMED.items() if pattern.search(clause)), "other")


def merged(spans: Iterable[Span]) -> list[Span]:
    """Join the spans of several rationales: of two that overlap the first stays, and mismatches if either does."""
    kept: list[Span] = []
    for span in spans:
        overlapping = [
            place for place, one in enumerate(kept) if one.side == span.side and one.start < span.end > one.start
            and span.start < one.end
        ]  # fmt: skip
        for place in overlapping:
            one = kept[place]
            kept[place] = Span(one.side, one.start, one.end, one.attribute, one.mismatch or span.mismatch)
        if not overlapping:
            kept.append(span)
    return kept


def token_tags(encoding: BatchEncoding, row: int, spans: Iterable[Span]) -> list[int]:
    """Return the tag of each token of a tokenised (query, title), special tokens being O.

    Args:
        encoding: What a fast tokenizer returned with `return_offsets_mapping=True`.
        row: Which pair of it.
        spans: Of that pair, none overlapping another.
    """
    offsets, sides = encoding["offset_mapping"][row], encoding.sequence_ids(row)
    tags = [OUTSIDE] * len(offsets)
    for span in spans:
        inside = False
        for token, ((start, end), side) in enumerate(zip(offsets, sides, strict=True)):
            if side == span.side and start < span.end and end > span.start and end > start:
                tags[token] = span.tag + inside
                inside = True
    return tags
