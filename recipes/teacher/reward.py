"""The reward of CRSD's preference optimisation: four dimensions of a completion, each a number from 0 to 1.

The source (arXiv 2510.11056) names a multi-dimensional reward model and does not give its dimensions: these four, their
formulas and their weights are ours. They are computed, not learnt, so that a preference can be explained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from recipes.teacher.books import Rule

DIMENSIONS = ("label", "faithfulness", "rules", "brevity")
# Scripts that put no spaces between words, or that glue particles to them (Korean).
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_RUN = re.compile(rf"[{_CJK}ー]+|[^\W{_CJK}]+(?:[-'’.][^\W{_CJK}]+)*")
_QUOTED = re.compile(r"[\"“「『]([^\"“”「」『』]{1,80})[\"”」』]")
_CAPITALISED = re.compile(r"(?<![.!?:;…\n\"“「『(])[ ,](?=[^\W\d_])([^\W\d_]*[A-ZÀ-Þ][\w-]*)")


def count_words(text: str) -> int:
    """Count words; two characters of Chinese, Japanese or Korean count as one.

    >>> count_words("fits the Aro 12"), count_words("互換性があります")
    (4, 4)
    """
    return sum((len(run) + 1) // 2 if re.match(rf"[{_CJK}]", run) else 1 for run in _RUN.findall(text))


def label_correctness(predicted: str | None, gold: str) -> float:
    """Return 1 where the predicted label is the gold label, else 0."""
    return float(predicted == gold)


def faithfulness(rationale: str, query: str, title: str, label_names: Iterable[str] = ()) -> float:
    """Measure whether a rationale speaks of this pair, and invents nothing about it.

    F = P · (m(query) + m(title)) / 2. P is the share of the rationale's concrete claims (quoted words, words with a
    digit, capitalised words within a sentence) that stand in query or title, 1 where it makes none. m(text) is 1 where
    the rationale repeats a word of the text (three letters or more, or with a digit; two adjacent characters of
    Chinese, Japanese or Korean), else 0. Case does not matter; the names of labels are no claims.

    >>> faithfulness("The query asks for an Aro 12 case, the title is a charger.", "aro 12 case", "USB charger 20W")
    1.0
    >>> faithfulness("The title says Zenit, 64GB.", "aro 12 case", "USB charger 20W"), faithfulness("Fine.", "a", "b")
    (0.0, 0.0)
    """
    own = f"{query} {title}".casefold()
    for name in label_names:
        rationale = re.sub(re.escape(name), " ", rationale, flags=re.IGNORECASE)
    said = _units(rationale)
    claims = _claims(rationale)
    grounded = sum(claim in own for claim in claims) / len(claims) if claims else 1.0
    return grounded * (bool(said & _units(query)) + bool(said & _units(title))) / 2


def rule_adherence(rationale: str, predicted: str | None, rules: Sequence[Rule]) -> float:
    """Measure whether the verdict is the one of the business rule that the rationale names.

    Of the named rules that lead to a label, the first in the order of the file decides, as it does for the teacher:
    1 where its label was predicted, 0 where another was. 0.5 where no such rule is named: nothing was kept or broken.

    >>> brand = Rule("binding brand", "the brand differs", "the brand decides", "Substitute")
    >>> [rule_adherence("By the binding-brand rule.", label, [brand]) for label in ("Substitute", "Exact")]
    [1.0, 0.0]
    >>> rule_adherence("It looks right.", "Exact", [brand])
    0.5
    """
    text = f" {' '.join(_RUN.findall(rationale.casefold().replace('-', ' ')))} "
    for rule in rules:
        name = " ".join(_RUN.findall(rule.name.casefold().replace("-", " ")))
        if rule.label is not None and f" {name} " in text:
            return float(rule.label == predicted)
    return 0.5


def brevity(rationale: str, shortest: int = 15, longest: int = 60) -> float:
    """Measure whether a rationale is as long as it needs to be.

    With n words: 1 for shortest <= n <= longest; n / shortest below; above, down in a straight line to 0 at twice the
    longest: max(0, 2 - n / longest).

    >>> [brevity("word " * n, 10, 20) for n in (5, 10, 20, 30, 40, 99)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    words = count_words(rationale)
    return min(words / shortest, 1.0) if words <= longest else max(0.0, 2 - words / longest)


def reward(scores: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted mean of the dimensions.

    >>> reward({"label": 1.0, "faithfulness": 0.5}, {"label": 3.0, "faithfulness": 1.0})
    0.875
    """
    return sum(weights[name] * score for name, score in scores.items()) / sum(weights[name] for name in scores)


def _units(text: str) -> set[str]:
    units = set()
    for run in _RUN.findall(text.casefold()):
        if re.match(rf"[{_CJK}]", run):
            units |= {run[i : i + 2] for i in range(len(run) - 1)}
        elif len(run) >= 3 or re.search(r"\d", run):
            units.add(run)
    return units


def _claims(rationale: str) -> set[str]:
    quoted = {" ".join(words.split()) for words in _QUOTED.findall(rationale)}
    numbers = {run for run in _RUN.findall(rationale) if re.search(r"\d", run)}
    return {claim.casefold() for claim in quoted | numbers | set(_CAPITALISED.findall(rationale)) if claim.strip()}
