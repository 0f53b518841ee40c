"""Take the label's name out of a rationale, so that its embedding carries the reasoning and not the answer.

Names are the class names and the word aliases of the label schema, in any case.

- A sentence that is only a verdict goes: "So it is an Exact match." "Label: S." "E."
- A closing clause that is only a verdict goes: "The brand differs, so S." "..., making it Irrelevant."
- Inside a longer sentence a name that stands for the class becomes `candidate`: "rated Exact because", "a substitute
  for the pen", "the product is irrelevant to", "complement status", "brand mismatch".
- As an ordinary word it stays: before another noun ("the exact size", "a substitute teacher"), in a remark on a detail
  ("the colour is irrelevant", "brand and type are exact"), as a verb ("cases complement pillows"), and where the pair's
  own query or title has the word ("Trim to Exact Fit").
- A letter goes only as a verdict: after a cue ("the label is E"), as a conclusion ("so E"), or as a sentence of its
  own. "C wire", "vitamin E" and "size S" stay.

The rules are English, as class names are. What they miss stays, what they are unsure of stays.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from recipes.schemas import LabelSchema

NEUTRAL = "candidate"

_CUE = (
    r"\b(?:(?:the|my|our|final|overall|predicted|correct|relevance|right)\s+)*"
    r"(?:label|verdict|answer|class|classification|judge?ment|rating|grade|conclusion|prediction|decision)"
    r"\s*(?::|=|->|→|(?:is|was|would be|should be|remains)\b)\s*"
)
_CONCLUSION = (
    r"(?:(?:and\s+)?(?:so|thus|hence|therefore|overall|consequently|accordingly|in short|finally|ultimately|"
    r"which makes (?:it|this)|making (?:it|this)|i\.e\.)(?!\w)|=>|->|→)[,:]?\s*"
)
_SUBJECT = (
    r"\b(?:it|this|that|(?:the|this|that)\s+(?:product|item|pair|listing|offer|result|match))"
    r"(?:['’]s|\s+(?:is|was|seems|remains|counts|ranks|rates|qualifies|(?:can|may|must|should|would) (?:only )?be))\s+"
)
_HOW = (
    r"(?:(?:only|clearly|simply|merely|just|at best|rather|thus|therefore|judged|rated|labell?ed|classified|considered|"
    r"deemed|graded|as)\s+)*"
)
_NOUN = r"(?:match|label|class|rating|grade|status|tier|bracket|range|verdict|relation|relationship)"
# What may follow a name that is a noun of its own, rather than an adjective of the next word.
_FREE = (
    r"(?=\s*(?:$|[.,;:!?)\]。！？–—]|(?:for|to|of|by|in|with|on|because|since|as|and|but|or|nor|rather|than|here|when|if|"
    r"while|though|although|given)\b))"
)
_OPEN, _CLOSE = r"[\"“‘*_`(\[]*", r"[\"”’*_`)\]]*"
_END = r"\s*[.!?。！？]*" + _CLOSE
_SENTENCES = re.compile(r"((?<=[.!?])\s+|(?<=[.!?][\"”’)*])\s+|(?<=[。！？])|\s*\n\s*)")
# "so" opens a clause without a comma only before what can be a verdict: "a wording so exact" is none.
_CLAUSES = re.compile(
    r"\s*[,;:–—]\s*|\s+(?=and (?:so|thus|hence|therefore)\b|→|->|=>)"
    r"|\s+(?=(?:so|thus|hence|therefore) (?:an? |it|this|that|the |[A-Z]))"
)


@dataclass(frozen=True)
class _Patterns:
    verdict: re.Pattern[str]  # a clause that is nothing else
    letter: re.Pattern[str]  # a sentence that is one letter
    cued: re.Pattern[str]  # "the label is E" anywhere
    name: re.Pattern[str]  # a name anywhere, with what stands before and after it


def strip_label_names(text: str, labels: LabelSchema, own_words: str = "") -> str:
    """Remove the verdict from a rationale; the result is empty when there was nothing else.

    Args:
        text: The rationale.
        labels: Its class names, and their aliases: words, or letters.
        own_words: Query and title of the pair: inside sentences, their words are not taken for class names.

    >>> from recipes.schemas import load_labels
    >>> esci = load_labels("esci")
    >>> strip_label_names("The exact size is met. So it is an Exact match.", esci)
    'The exact size is met.'
    >>> strip_label_names("Another brand, so S.", esci)
    'Another brand.'
    >>> strip_label_names("Within one maker it is a substitute for the pen asked for.", esci)
    'Within one maker it is a candidate for the pen asked for.'
    """
    spellings = [spelling for label in labels.labels for spelling in (label.name, *label.aliases)]
    patterns = _patterns(tuple(spellings))
    kept = frozenset(re.findall(r"\w+", own_words.casefold()))
    # Without one verdict another can be the last clause ("it fits, so Exact, so E."); every round takes away a name.
    while (shorter := _strip_once(text, patterns, kept)) != text:
        text = shorter
    return text


@functools.cache
def _patterns(spellings: tuple[str, ...]) -> _Patterns:
    words = sorted((s for s in spellings if len(s) > 1), key=len, reverse=True)
    letters = [s for s in spellings if len(s) == 1]
    letter = rf"(?-i:{'|'.join(map(re.escape, letters))})(?!\w)" if letters else r"(?!)"
    word = rf"(?:{'|'.join(map(re.escape, words))})(?!\w)" if words else r"(?!)"
    name = rf"{_OPEN}{word}(?:\s*\({letter}\))?{_CLOSE}"
    either = rf"(?:{name}|{_OPEN}{letter}(?:\s*\({word}\))?{_CLOSE})"
    article = r"(?:(?:an?|the)\s+)?"
    tail = rf"(?:\s+{_NOUN})?(?:\s+(?:for|to|with) (?:the|this) (?:query|search|request))?{_END}"
    verdict = (
        rf"{_OPEN}(?:{_CONCLUSION}(?:{_SUBJECT})?{_HOW}{article}{either}{tail}"
        rf"|(?:{_CONCLUSION})?{_CUE}{_HOW}{article}{either}{tail}"
        rf"|(?:{_SUBJECT})?{_HOW}{article}{name}{tail})"
    )
    before = rf"(?P<subject>{_SUBJECT}{_HOW})?(?P<article>\b(?:an?|the|no|any|another)\s+)?"
    return _Patterns(
        verdict=re.compile(verdict, re.I),
        letter=re.compile(rf"{_OPEN}{letter}{_CLOSE}{_END}", re.I),
        cued=re.compile(rf"(?P<cue>{_CUE}{_HOW}){article}{either}{_FREE}", re.I),
        name=re.compile(
            rf"{before}(?<!\w)(?P<name>{word})(?:\s*\({letter}\))?(?P<noun>\s+{_NOUN}\b)?(?P<free>{_FREE})?", re.I
        ),
    )


def _strip_once(text: str, patterns: _Patterns, kept: frozenset[str]) -> str:
    parts = _SENTENCES.split(text)  # sentence, white space, sentence, ...
    sentences = [_strip_sentence(sentence, patterns, kept) for sentence in parts[::2]]
    if sentences == parts[::2]:
        return text
    spaces = [*parts[1::2], ""]
    return "".join(s + space for s, space in zip(sentences, spaces, strict=True) if s).strip()


def _strip_sentence(sentence: str, patterns: _Patterns, kept: frozenset[str]) -> str:
    if patterns.verdict.fullmatch(sentence) or patterns.letter.fullmatch(sentence):
        return ""
    for clause in _CLAUSES.finditer(sentence):
        if sentence[: clause.start()].strip() and patterns.verdict.fullmatch(sentence, clause.end()):
            end = re.search(r"[.!?。！？]*$", sentence)
            return sentence[: clause.start()] + (end[0] if end else "")

    def neutral(match: re.Match[str]) -> str:
        name, article = match["name"], (match["article"] or "").strip()
        if kept.issuperset(name.casefold().split()):
            return match[0]
        starts = match.start("name") == 0
        is_class = (
            " " in name
            or match["noun"]
            or (match["free"] is not None and (match["subject"] or article))
            or (name[0].isupper() and not starts and match["free"] is not None)
        )
        if not is_class:
            return match[0]
        if article.lower() in ("", "an"):
            article = "" if match["noun"] and not article else "a"
        replaced = f"{match['subject'] or ''}{article} {NEUTRAL}{match['noun'] or ''}".lstrip()
        return replaced[0].upper() + replaced[1:] if match.start() == 0 else replaced

    return patterns.name.sub(neutral, patterns.cued.sub(rf"\g<cue>a {NEUTRAL}", sentence))
