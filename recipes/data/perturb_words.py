"""Words that the perturbations put into texts, by locale: from the bazaar's catalogue, and a few of their own.

A locale without words of its own gets English ones only where it is English (`us`, `uk`, `en`...): a Japanese title
is never given an English slogan by accident.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from recipes.data.bazaar_catalogue import LOCALES, alternatives, load_catalogue

ENGLISH = ("us", "uk", "gb", "au", "ca", "in")
OTHERS = {"ja": "jp", "kr": "ko", "br": "pt", "mx": "es"}

# `{}` stands for the title. Whatever the product is, its parts are not the product.
PARTS = {
    "en": "Replacement parts for {}",
    "es": "Repuestos para {}",
    "ko": "{} 전용 교체 부품",
    "jp": "{} 専用 交換部品",
    "pt": "Peças de reposição para {}",
    "fr": "Pièces de rechange pour {}",
}
# A query that has one of these may itself ask for parts.
PARTS_WORDS = re.compile(
    r"\b(?:part|parts|replacement|spare|repuestos?|recambios?|peças?|pièces?|rechange)\b|부품|部品|交換", re.I
)
# Where these stand, the order of a query's words says what belongs to what.
ORDER_MATTERS = re.compile(
    r"\b(?:for|with|without|and|or|of|in|not|no|to|vs|para|con|sin|de|que|sem|com|não|pour|avec|sans|pas|et|ou)\b|[&+/-]",
    re.I,
)
EMOJI = ("✨", "🔥", "🎁", "✅", "💯", "⭐")
STUFFING = {
    "en": ["best seller", "gift idea", "premium", "2025 new", "hot sale", "must have", "trending", "free shipping"],
    "es": ["más vendido", "idea de regalo", "premium", "novedad 2025", "oferta", "imprescindible", "envío gratis"],
    "ko": ["베스트셀러", "선물 추천", "프리미엄", "2025 신상", "특가", "인기", "무료배송"],
    "jp": ["売れ筋", "ギフト", "プレミアム", "2025年新作", "セール", "人気", "送料無料"],
    "pt": ["mais vendido", "ideia de presente", "premium", "novidade 2025", "oferta", "imperdível", "frete grátis"],
    "fr": [
        "meilleure vente",
        "idée cadeau",
        "premium",
        "nouveauté 2025",
        "promotion",
        "tendance",
        "livraison gratuite",
    ],
}


def words_of(locale: str) -> str | None:
    """Return which of the catalogue's languages a locale reads, None if none.

    >>> words_of("us"), words_of("jp"), words_of("ja"), words_of("de")
    ('en', 'jp', 'jp', None)
    """
    if locale in LOCALES:
        return locale
    return "en" if locale in ENGLISH else OTHERS.get(locale)


@functools.cache
def glossary() -> Mapping[str, Mapping[str, tuple[str, str]]]:
    """Return language -> word, casefolded -> (what it means, its kind: `name` or the attribute).

    Only words whose meaning is one: what two concepts share in a language is left out.
    """
    catalogue = load_catalogue()
    found: dict[str, dict[str, tuple[str, str]]] = {language: {} for language in LOCALES}
    shared: set[tuple[str, str]] = set()

    def add(language: str, word: str, meaning: tuple[str, str]) -> None:
        if found[language].setdefault(word.casefold(), meaning) != meaning:
            shared.add((language, word.casefold()))

    for category in catalogue.categories.values():
        for language in LOCALES:
            for name in category.names[language]:
                add(language, name, (category.key, "name"))
    for attribute, entry in catalogue.words["attributes"].items():
        for value, spelling in entry.get("values", {}).items():
            if isinstance(spelling, dict):
                for language in LOCALES:
                    for word in alternatives(spelling[language]):
                        add(language, word, (value, attribute))
    for language, word in shared:
        del found[language][word]
    return found


@functools.cache
def translations() -> Mapping[tuple[str, str], Mapping[str, str]]:
    """Return (what it means, its kind) -> language -> the usual word."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for language, words in glossary().items():
        for word, meaning in words.items():
            found.setdefault(meaning, {}).setdefault(language, word)
    return found


def stated(text: str, language: str) -> list[tuple[str, tuple[str, str]]]:
    """List the words of the glossary that stand in a text, each once, the longer one where one is part of another.

    >>> stated("Faux leather bag, faux leather strap", "en")
    [('faux leather', ('faux leather', 'material'))]
    """
    known = glossary()[language]
    return [(word, known[word]) for word in dict.fromkeys(m[0].casefold() for m in _any_of(language).finditer(text))]


@functools.cache
def _any_of(language: str) -> re.Pattern[str]:
    words = sorted(glossary()[language], key=len, reverse=True)
    return re.compile("|".join(_as_a_whole(word) for word in words), re.IGNORECASE)


def _as_a_whole(word: str) -> str:
    """Match a word as a whole; where a script has no spaces, anywhere."""
    spaced = re.match(r"[\w'-]*[a-zA-ZÀ-ÿ0-9]", word)
    return rf"(?<!\w){re.escape(word)}(?!\w)" if spaced else re.escape(word)


def find_word(text: str, word: str) -> re.Match[str] | None:
    """Find a word as a whole, in any case; where a script has no spaces, anywhere.

    >>> find_word("A red-hot Redwood", "red").start(), find_word("redwood", "red"), find_word("黒い靴", "黒").end()
    (2, None, 1)
    """
    return _pattern(word).search(text)


@functools.lru_cache(maxsize=100_000)  # the module's own cache holds 512, a marketplace more brands
def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(_as_a_whole(word), re.IGNORECASE)


def replace_word(text: str, word: str, other: str) -> str | None:
    """Replace every occurrence of a word, None where it does not occur.

    >>> replace_word("Acme case for ACME phones", "acme", "Zed"), replace_word("Acmes", "acme", "Zed")
    ('Zed case for Zed phones', None)
    """
    found = find_word(text, word)
    return None if found is None else re.sub(found.re, lambda _: other, text)
