"""Words of rationales that neither query nor title has: what the probe of `recipes.evaluate.probe` looks for.

Texts are NFKC-normalised and case-folded. What counts as a word:

- Scripts with spaces (Latin, Cyrillic, Arabic...): a run of three letters or more; Hangul: of two. "it's" and "doesn't"
  are no words, of "brand's" the first part is one. Nothing is stemmed: "mention" and "mentions" are two.
- Japanese and Chinese have no spaces, and a morphological analyser is a heavy dependency for counting keywords: a run
  of two or more characters of one script, kanji or katakana, is a word; hiragana, mostly particles and endings, is not.

A word of the first kind is absent from a pair if it is not among the words of query and title; one of the second kind
if it is nowhere inside them, because the ends of such words are guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_UNSPACED = r"[一-鿿㐀-䶿々]{2,}|[ァ-ヺー]{2,}"
_LETTER = r"[^\W\d_一-鿿㐀-䶿々ぁ-ヿ가-힣]"
_WORD = re.compile(rf"{_UNSPACED}|[가-힣]{{2,}}|{_LETTER}+(?:['’]{_LETTER}+)?")
_IS_UNSPACED = re.compile(_UNSPACED)


def normalise(text: str) -> str:
    """Return the text in the form that words are looked for in."""
    return unicodedata.normalize("NFKC", text).casefold()


def words(text: str) -> set[str]:
    """Return the words of a text.

    Example:
        >>> sorted(words("The brand's LEGO, which the title doesn't mention (2 in 1)"))
        ['brand', 'lego', 'mention', 'the', 'title', 'which']
        >>> sorted(words("防水のスマートウォッチを探す"))
        ['スマートウォッチ', '防水']
    """
    found = set()
    for word in _WORD.findall(normalise(text)):
        stem, apostrophe, ending = word.replace("’", "'").partition("'")
        if apostrophe and ending != "s":
            continue
        if len(stem) >= 3 or not stem.isascii():
            found.add(stem)
    return found


def absent(keyword: str, surface: str, surface_words: Collection[str]) -> bool:
    """Say whether a keyword is absent from `surface`, a normalised query and title, and from its words."""
    return keyword not in surface if _IS_UNSPACED.fullmatch(keyword) else keyword not in surface_words


def choose_keywords(
    rationales: Sequence[str], surfaces: Sequence[str], top: int, max_share: float, ignored: Collection[str]
) -> list[str]:
    """Return the words that stand in the rationales of most pairs while query and title do not have them.

    Args:
        rationales: The rationales of each pair, joined.
        surfaces: Query and title of each pair.
        top: How many keywords.
        max_share: Words in more than this share of the rationales tell pairs apart no more and are left out.
        ignored: Words that are trivial by themselves.

    Example:
        >>> choose_keywords(["fits the red shoe", "implies a shoe", "implies"], ["red shoe", "shoe", "hat"], 2, 1.0, [])
        ['implies', 'fits']
    """
    anywhere: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for rationale, text in zip(rationales, surfaces, strict=True):
        surface, surface_words = normalise(text), words(text)
        found = words(rationale)
        anywhere.update(found)
        counted.update(word for word in found if absent(word, surface, surface_words))
    allowed = [
        word for word in counted if word not in ignored and anywhere[word] <= max_share * max(1, len(rationales))
    ]
    return sorted(allowed, key=lambda word: (-counted[word], word))[:top]


def label_pairs(
    keywords: Sequence[str], rationales: Sequence[str], surfaces: Sequence[str]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return, `(keywords, pairs)` each: whether the rationale has the keyword, and whether query and title lack it."""
    present = np.zeros((len(keywords), len(rationales)), dtype=bool)
    lacking = np.zeros_like(present)
    for pair, (rationale, text) in enumerate(zip(rationales, surfaces, strict=True)):
        surface, surface_words, found = normalise(text), words(text), words(rationale)
        for row, keyword in enumerate(keywords):
            present[row, pair] = keyword in found
            lacking[row, pair] = absent(keyword, surface, surface_words)
    return present, lacking
