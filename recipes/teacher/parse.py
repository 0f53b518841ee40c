"""From a raw completion to rationale and label; what cannot be read is null with a reason, never a guess.

The prompts ask for `<think> reasoning </think>` and then `{"label": "..."}`. Models also leave tags open, leave them
out (when the chat template opened them in the prompt), wrap the JSON in a fence, answer in words, or in the language
of the query. The rules, in order:

1. What stands inside think tags is reasoning; a label named there is no answer. Only where the tag is never closed may
   a JSON object at the very end of the text be one.
2. In the rest, an answer field (`"label": ...`) wins over any word around it.
3. Without a field, what counts is a cue with a label after it ("Label: S", "判定: 代替品"), and a line that is a label
   and nothing else. Prose without either is no answer.
4. Answers that name several labels, or that differ, are a contradiction.

Labels are read by name, alias and translation of the label schema, in any case.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, NoReturn

from recipes.schemas import LabelSchema

# Every parse_error begins with one of these, a colon, and words for people.
REASONS = {
    "empty": "there is no text",
    "truncated": "the text ends before its answer does",
    "no_answer": "neither an answer field, nor a cue with a label, nor a line that is a label",
    "unknown_label": "the answer is not in the label schema",
    "contradiction": "the answer names several labels",
}

_TAG = re.compile(r"<\s*(/?)\s*think(?:ing)?\s*>", re.IGNORECASE)
_BRACE = re.compile(r"\{(?=\s*\")")
_FIELDS = ("label", "predicted_label", "answer", "verdict", "class", "classification", "relevance")
_RATIONALE_FIELDS = ("rationale", "reasoning", "reason", "explanation", "analysis")
# For what is nearly JSON: single or typographic quotes, a missing brace, trailing commas.
_FIELD = re.compile(
    rf"[\"'“”‘’「]({'|'.join(_FIELDS)})[\"'“”‘’」]\s*[:：=]\s*(?:[\"“「]([^\"“”」\n]*)[\"”」]|'([^'\n]*)'|([^\s\"'“「,}}{{]+)(?=\s*[,}}]))",
    re.IGNORECASE,
)
_CUES = (
    "label|answer|verdict|class|classification|judge?ment|relevance|etiqueta|respuesta|veredicto|clasificación|clase|"
    "rótulo|resposta|veredito|classificação|classe|étiquette|réponse|classement|ラベル|回答|判定|結論|分類|라벨|레이블|"
    "정답|답변|판정|결론|분류"
)
# A cue reaches to the end of its sentence. Japanese has no spaces: only Latin letters can be the rest of another word.
_CUE = re.compile(
    rf"(?<![A-Za-zÀ-ÿ])(?:{_CUES})\s*[*_`\"]*\s*(?:[:：=]|(?:is|es|est|é)(?!\w)|は|은|는)\s*([^\n.。]*)", re.IGNORECASE
)
_DECORATION = " \t\r\n\"'“”‘’「」『』*_`#.!。!,，;；()（）[]【】{}<>-–—:："
_SEPARATORS = re.compile(r"\s*(?:[()（）\[\]/|,，、;；:：=+&\n]|\s[-–—]\s|\b(?:or|and|ou|et)\b|または|또는)\s*")


@dataclass(frozen=True)
class Parsed:
    """What a completion says.

    Attributes:
        rationale: The reasoning, without tags; None where there is none, or where it is cut off.
        predicted_label: A class name of the schema, None where the answer could not be read.
        parse_error: None with a label; else a code of `REASONS`, a colon, and what was found.
    """

    rationale: str | None
    predicted_label: str | None
    parse_error: str | None


class _Unread(Exception):
    """The answer could not be read; carries the `parse_error`."""


def parse_completion(text: str, schema: LabelSchema) -> Parsed:
    r"""Read one completion. Never raises, whatever the text.

    >>> from recipes.schemas import load_labels
    >>> esci = load_labels("esci")
    >>> parse_completion('<think>Another brand.</think>\n```json\n{"label": "substitute"}\n```', esci)
    Parsed(rationale='Another brand.', predicted_label='Substitute', parse_error=None)
    >>> parse_completion("<think>Another brand, so per", esci)
    Parsed(rationale=None, predicted_label=None, parse_error='truncated: the reasoning is never closed')
    >>> parse_completion('{"label": "Exact or Substitute"}', esci).parse_error
    "contradiction: 'Exact or Substitute' names Exact, Substitute"
    """
    if not isinstance(text, str) or not text.strip():
        return Parsed(None, None, f"empty: {REASONS['empty']}")
    thoughts, answer, is_open = _split(text)
    rationale: str | None = thoughts.strip() or None
    try:
        if is_open:
            rationale, label = _closing_object(thoughts, schema)
            return Parsed(rationale, label, None)
        objects = _objects(answer)
        if rationale is None:
            rationale = _rationale(answer, objects)
        return Parsed(rationale, _label(answer, objects, schema), None)
    except _Unread as error:
        return Parsed(None if is_open else rationale, None, str(error))


def reason_code(parse_error: str) -> str:
    """Return the code of `REASONS` that a `parse_error` begins with.

    >>> reason_code("truncated: the reasoning is never closed")
    'truncated'
    """
    return parse_error.split(":", 1)[0]


def _refuse(code: str, found: str) -> NoReturn:
    assert code in REASONS
    raise _Unread(f"{code}: {found}")


def _split(text: str) -> tuple[str, str, bool]:
    """Return what stands inside think tags, what stands outside, and whether the last tag is still open."""
    tags = list(_TAG.finditer(text))
    # A first tag that closes was opened in the prompt.
    inside = bool(tags) and tags[0][1] == "/"
    parts: dict[bool, list[str]] = {True: [], False: []}
    start = 0
    for tag in tags:
        parts[inside].append(text[start : tag.start()].strip())
        inside = tag[1] == ""
        start = tag.end()
    parts[inside].append(text[start:].strip())
    thoughts, answer = ("\n".join(filter(None, parts[side])) for side in (True, False))
    return thoughts, answer, inside


def _objects(text: str) -> list[tuple[int, int, list[tuple[str, Any]]]]:
    """Find the JSON objects of a text: start, end, and all (key, value), keys given twice included."""
    decoder = json.JSONDecoder(object_pairs_hook=list)
    found = []
    start = 0
    while brace := _BRACE.search(text, start):
        start = brace.start() + 1  # an object without an answer may hold the one that has it
        try:
            pairs, end = decoder.raw_decode(text, brace.start())
        except RecursionError:  # a model that repeats `{"a":` for ever
            break
        except ValueError:
            continue
        if _values(pairs):
            found.append((brace.start(), end, pairs))
            start = end
    return found


def _values(pairs: list[tuple[str, Any]]) -> list[Any]:
    return [value for key, value in pairs if key.strip().casefold() in _FIELDS and not _is_object(value)]


def _is_object(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, tuple) for item in value)


def _closing_object(thoughts: str, schema: LabelSchema) -> tuple[str | None, str]:
    """Read reasoning whose tag was never closed: only a JSON object at its very end is an answer."""
    closed = thoughts.rstrip("` \n")
    last = [found for found in _objects(thoughts) if found[1] >= len(closed)]
    if not last:
        _refuse("truncated", "the reasoning is never closed")
    start, _, pairs = last[0]
    rationale = re.sub(r"```\w*\s*$", "", thoughts[:start]).strip()
    return rationale or None, _agree(_values(pairs), schema)


def _rationale(answer: str, objects: list[tuple[int, int, list[tuple[str, Any]]]]) -> str | None:
    """Find the reasoning of a text without think tags: what stands before the answer, or a field of it."""
    if not objects:
        lines = answer.strip().splitlines()
        return "\n".join(lines[:-1]).strip() or None
    start, _, pairs = objects[0]
    fields = [v for key, v in pairs if key.strip().casefold() in _RATIONALE_FIELDS and isinstance(v, str) and v.strip()]
    before = re.sub(r"```\w*\s*$", "", answer[:start]).strip()
    return before or (fields[0].strip() if fields else None)


def _label(answer: str, objects: list[tuple[int, int, list[tuple[str, Any]]]], schema: LabelSchema) -> str:
    if not answer.strip():
        _refuse("truncated", "nothing follows the reasoning")
    values = [value for _, _, pairs in objects for value in _values(pairs)]
    values = values or [next(filter(None, match.groups()[1:]), "") for match in _FIELD.finditer(answer)]
    if values:
        return _agree(values, schema)
    if re.search(r"\{[^{}]*$", answer):
        _refuse("truncated", "the JSON object is never closed")
    cued = [match[1] for match in _CUE.finditer(answer)]
    if named := [words for words in (*cued, *answer.splitlines()) if _decode(words, schema)]:
        return _agree(named, schema)
    _refuse("no_answer", REASONS["no_answer"])


def _agree(values: list[Any], schema: LabelSchema) -> str:
    """Return the one label that all values name."""
    named: list[str] = []
    for value in values:
        names = [name for item in value for name in _decode(item, schema)] if isinstance(value, list) else None
        names = _decode(value, schema) if names is None else names
        if not names:
            _refuse("unknown_label", f"{_quoted(value)} is not in the schema {schema.name!r}")
        named += names
    distinct = sorted(set(named), key=schema.names.index)
    if len(distinct) > 1:
        shown = _quoted(values[0]) if len(values) == 1 else "the answers"
        _refuse("contradiction", f"{shown} name{'s' if len(values) == 1 else ''} {', '.join(distinct)}")
    return distinct[0]


def _quoted(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:79] + "…"


def _decode(value: Any, schema: LabelSchema) -> list[str]:
    """Return the labels that a value names when it consists of nothing else: "Exact (E)", "S or C"; else nothing."""
    if not isinstance(value, str):
        return []
    words = _words(schema)
    if (name := words.get(_normal(value))) is not None:
        return [name]
    parts = [part for part in _SEPARATORS.split(value) if part and _normal(part)]
    names = [words.get(_normal(part)) for part in parts]
    return [] if None in names else [name for name in names if name is not None]


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).strip(_DECORATION).casefold()
    return re.sub(r"[\s_-]+", " ", text)


def _words(schema: LabelSchema) -> dict[str, str]:
    spellings = (
        (spelling, label.name)
        for label in schema.labels
        for spelling in (label.name, *label.aliases, *(word for words in label.translations.values() for word in words))
    )
    return _normal_words(tuple(spellings))


@functools.lru_cache(maxsize=8)
def _normal_words(spellings: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {_normal(spelling): name for spelling, name in spellings}
