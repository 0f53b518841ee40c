"""Perturbations that leave the label as it is: the shopper wants the same thing, and the product is the same."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from recipes.data.bazaar_catalogue import load_catalogue
from recipes.data.bazaar_text import Writer
from recipes.data.perturb_words import (
    EMOJI,
    ORDER_MATTERS,
    STUFFING,
    find_word,
    replace_word,
    stated,
    translations,
    words_of,
)

if TYPE_CHECKING:
    from recipes.data.perturb import Pair

LONG = 220  # words that `long_title` fills up to: more than the 128 tokens of the students
# Exact conversions only: the text says the same.
_UNITS = {
    ("TB", "GB"): 1000,
    ("kg", "g"): 1000,
    ("g", "mg"): 1000,
    ("L", "ml"): 1000,
    ("m", "cm"): 100,
    ("cm", "mm"): 10,
    ("kW", "W"): 1000,
}
# As they are written: a phone is 5G, 3M is a maker, and L a size where no number of decimals stands before it.
_MEASURE = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?)\s?(TB|GB|kg|mg|g|ml|mL|mm|cm|m|kW|W)(?!\w)|(\d+\.\d+)\s?(L)(?!\w)")


def typo(pair: Pair, rng: random.Random) -> Pair | None:
    """Misspell one word of the query: a letter dropped, doubled or swapped; a slip of kana or of a Korean vowel."""
    return pair.with_texts(query=_misspell(pair.query, pair.locale, rng))


def typo_title(pair: Pair, rng: random.Random) -> Pair | None:
    """Misspell one word of the title."""
    return pair.with_texts(title=_misspell(pair.title, pair.locale, rng))


def _misspell(text: str, locale: str, rng: random.Random) -> str:
    return Writer(load_catalogue(), words_of(locale) or "en", rng).misspell(text)


def case(pair: Pair, rng: random.Random) -> Pair | None:
    """Write the query in capitals and the title in small letters; a student with an uncased tokenizer cannot tell."""
    return pair.with_texts(query=pair.query.upper(), title=pair.title.lower())


def word_order(pair: Pair, rng: random.Random) -> Pair | None:
    """Shuffle the words of a query that is nothing but words: not "case for phone", where order says what is what."""
    words = pair.query.split()
    if len(words) < 2 or ORDER_MATTERS.search(pair.query):
        return None
    shuffled = rng.sample(words, len(words))
    return pair.with_texts(query=" ".join(shuffled if shuffled != words else [*words[1:], words[0]]))


def title_order(pair: Pair, rng: random.Random) -> Pair | None:
    """Shuffle what a title says after its first part, where commas, bars or dashes part it."""
    first, *others = re.split(r"(?:, | \| | - |、)", pair.title)
    if len(others) < 2:
        return None
    shuffled = rng.sample(others, len(others))
    return pair.with_texts(title=", ".join([first, *(shuffled if shuffled != others else [*others[1:], others[0]])]))


def keyword_stuffing(pair: Pair, rng: random.Random) -> Pair | None:
    """Add five phrases of sellers to the title ("best seller", "gift idea"), which say nothing of the product."""
    language = words_of(pair.locale)
    if language is None:
        return None
    return pair.with_texts(title=f"{pair.title}, {', '.join(rng.sample(STUFFING[language], 5))}")


def query_in_title(pair: Pair, rng: random.Random) -> Pair | None:
    """Put the query at the end of the title of a product that is not relevant: the seller lies, the product stays."""
    if pair.relevant or pair.query.casefold() in pair.title.casefold():
        return None
    return pair.with_texts(title=f"{pair.title} | {pair.query}")


def brand_swap_unnamed(pair: Pair, rng: random.Random) -> Pair | None:
    """Exchange the brand in the title for a rival's, where the query names no brand: a shopper who named none agrees.

    With structures: where the query asks for no brand and no model (its own, or of a device), and the title names none.
    """
    if not pair.brand or not pair.rivals:
        return None
    if any(find_word(pair.query, brand) for brand in (pair.brand, *pair.rivals)):
        return None
    if (
        pair.ask is not None
        and pair.offer is not None
        and (pair.ask.brand or pair.ask.fits_brand or pair.offer.model or pair.offer.brand != pair.brand)
    ):
        return None
    title = replace_word(pair.title, pair.brand, rng.choice(pair.rivals))
    return None if title is None else pair.with_texts(title=title)


def code_switching(pair: Pair, rng: random.Random) -> Pair | None:
    """Write one word of the query in another language: English, or in an English query one of the other five."""
    language = words_of(pair.locale)
    if language is None:
        return None
    choices = []
    for word, meaning in stated(pair.query, language):
        others = {name: text for name, text in translations()[meaning].items() if name != language}
        targets = [others["en"]] if language != "en" and "en" in others else list(others.values())
        choices += [(word, target) for target in targets if target != word]
    if not choices:
        return None
    return pair.with_texts(query=replace_word(pair.query, *rng.choice(choices)))


def units(pair: Pair, rng: random.Random) -> Pair | None:
    """Write a measure of the title in another unit of the same size: 1 kg is 1000 g."""
    found = [(match, text) for match in _MEASURE.finditer(pair.title) if (text := _converted(match))]
    if not found:
        return None
    match, text = rng.choice(found)
    return pair.with_texts(title=pair.title[: match.start()] + text + pair.title[match.end() :])


def _converted(match: re.Match[str]) -> str | None:
    """Convert a measure, to the smaller unit if the number stays short.

    >>> [_converted(_MEASURE.search(text)) for text in ("1.5 kg bag", "500ml", "7mg")]
    ['1500g', '0.5L', '0.007g']
    """
    number, unit = float(match[1] or match[3]), {"mL": "ml"}.get(match[2], match[2] or match[4])
    for (large, small), factor in _UNITS.items():
        if unit == large and number * factor < 10_000:  # nobody writes 500000 mg
            return f"{number * factor:g}{small}"
    for (large, small), factor in _UNITS.items():
        if unit == small:
            return f"{number / factor:g}{large}"
    return None


def emoji(pair: Pair, rng: random.Random) -> Pair | None:
    """Put emoji before, behind and within the title."""
    words = pair.title.split(" ")
    place = rng.randrange(len(words))
    signs = rng.sample(EMOJI, 3)
    return pair.with_texts(title=" ".join([signs[0], *words[:place], signs[1], *words[place:], signs[2]]))


def long_title(pair: Pair, rng: random.Random) -> Pair | None:
    """Fill the title up with phrases of sellers to more words than a student reads."""
    language = words_of(pair.locale)
    if language is None:
        return None
    filling = [rng.choice(STUFFING[language]) for _ in range(LONG - len(pair.title.split()))]
    return pair.with_texts(title=", ".join([pair.title, *filling]))
