"""Perturbations after which a relevant product is not what was asked for any more.

Where the structures behind a pair are known they are changed with the text, and `recipes.data.bazaar_rules` gives the
new label, which for a product that was already wrong may be the old one. Elsewhere only relevant pairs are changed.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from recipes.data.bazaar_catalogue import alternatives, load_catalogue
from recipes.data.bazaar_rules import Offer
from recipes.data.perturb_words import PARTS, PARTS_WORDS, find_word, replace_word, stated, translations, words_of

if TYPE_CHECKING:
    from recipes.data.perturb import Pair

# Attributes that can be told from a text in any shop; `negation` and `attribute_change` speak of these.
TELLING = ("colour", "material")
_WITHOUT = {"en": "{} not {}", "es": "{} que no sea {}", "pt": "{} que não seja {}", "fr": "{} pas {}",
            "jp": "{} {}以外", "ko": "{1} 아닌 {0}"}  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.])\d{1,4}(?![\d.]|,\d)")


def brand_swap(pair: Pair, rng: random.Random) -> Pair | None:
    """Exchange the brand in the title for a rival's, where the query names the brand."""
    if not pair.brand or not pair.rivals:
        return None
    if pair.ask is not None and pair.offer is not None:
        # A maker that is also the device's would change in both places of the title.
        if pair.ask.brand is None or pair.brand != pair.offer.brand or pair.brand == pair.offer.fits_brand:
            return None
        rival = rng.choice(pair.rivals)
        title = replace_word(pair.title, pair.brand, rival)
        if title is None or rival == pair.ask.brand:
            return None
        # A rival has no such model: what the title still says of it is a model of nobody.
        return replace(pair, title=title, brand=rival, offer=replace(pair.offer, brand=rival))
    rivals = [name for name in pair.rivals if not find_word(pair.query, name)]
    if not pair.relevant or not rivals or not find_word(pair.query, pair.brand):
        return None
    rival = rng.choice(rivals)
    title = replace_word(pair.title, pair.brand, rival)
    return None if title is None or find_word(title, pair.brand) else replace(pair, title=title, brand=rival)


def negation(pair: Pair, rng: random.Random) -> Pair | None:
    """Exclude in the query a colour or material that the title states and the query does not ask for."""
    language = words_of(pair.locale)
    if language is None:
        return None
    if pair.ask is not None and pair.offer is not None:
        ask, offer = pair.ask, pair.offer
        colours = [
            (name, offer.attributes[name][0])
            for name in TELLING
            if name in offer.attributes and name not in offer.implied and name not in ask.attributes
        ]
        if ask.excluded or not colours:
            return None
        name, value = rng.choice(colours)
        word = next((text for text in spellings(name, value, language) if find_word(pair.title, text)), None)
        if word is None:
            return None
        query = _WITHOUT[language].format(pair.query, word)
        return replace(pair, query=query, ask=replace(ask, excluded={name: value}))
    words = [(word, meaning) for word, meaning in stated(pair.title, language) if meaning[1] in TELLING]
    if not pair.relevant or len(words) != 1:  # of two colours, which one is the product's?
        return None
    word = words[0][0]
    return None if find_word(pair.query, word) else pair.with_texts(query=_WITHOUT[language].format(pair.query, word))


def number_change(pair: Pair, rng: random.Random) -> Pair | None:
    """Change a number of the title that the query asks for: another size, count or model.

    With structures: an attribute written with a number gets another value of its category.
    """
    if pair.ask is not None and pair.offer is not None:
        return _other_value(pair, rng, numbers=True)
    if not pair.relevant:
        return None
    asked = {match[0] for match in _NUMBER.finditer(pair.query)}
    shared = [match for match in _NUMBER.finditer(pair.title) if match[0] in asked]
    if len(shared) != 1 or int(shared[0][0]) == 0:  # written twice, it would contradict itself
        return None
    match = shared[0]
    other = str(int(match[0]) * rng.choice([2, 3]))
    return pair.with_texts(title=pair.title[: match.start()] + other + pair.title[match.end() :])


def attribute_change(pair: Pair, rng: random.Random) -> Pair | None:
    """Change the colour or material of the title that the query asks for."""
    if pair.ask is not None and pair.offer is not None:
        return _other_value(pair, rng, numbers=False)
    language = words_of(pair.locale)
    if language is None:
        return None
    words = stated(pair.title, language)
    words = [(w, meaning) for w, meaning in words if meaning[1] in TELLING and find_word(pair.query, w)]
    if not pair.relevant or len(words) != 1:
        return None
    word, (value, attribute) = words[0]
    catalogue = load_catalogue()
    others = [
        texts[language]
        for (other, kind), texts in translations().items()
        if kind == attribute and language in texts and not find_word(pair.query, texts[language])
        and value not in catalogue.broader(attribute, other) and other not in catalogue.broader(attribute, value)
    ]  # fmt: skip
    title = replace_word(pair.title, word, rng.choice(sorted(others)))
    return None if title is None else pair.with_texts(title=title)


def accessory_words(pair: Pair, rng: random.Random) -> Pair | None:
    """Turn the product into something for it: the bazaar's own accessories, elsewhere "Replacement parts for ..."."""
    language = words_of(pair.locale)
    if language is None:
        return None
    if pair.ask is not None and pair.offer is not None:
        catalogue, offer = load_catalogue(), pair.offer
        accessories = catalogue.categories[offer.category].accessories
        if offer.host or offer.bundled or offer.category not in pair.ask.categories or not accessories:
            return None
        accessory = catalogue.categories[rng.choice(accessories)]
        connect = alternatives(catalogue.words["connectives"]["for"][language])[0].format(pair.title)
        name = accessory.names[language][0]
        title = f"{connect} {name}" if language in ("ko", "jp") else f"{name} {connect}"
        models = (offer.model,) if offer.model else ()
        made = Offer(accessory.key, host=offer.category, fits_brand=offer.brand, fits_models=models)
        return replace(pair, title=title[0].upper() + title[1:], offer=made)
    if not pair.relevant or PARTS_WORDS.search(pair.query):
        return None
    return pair.with_texts(title=PARTS[language].format(pair.title))


def spellings(attribute: str, value: str, language: str) -> list[str]:
    """List how a language writes a value of the bazaar, without the phrase around it.

    >>> spellings("colour", "grey", "en"), spellings("storage", "1TB", "es"), spellings("count", "3", "jp")
    (['grey', 'gray'], ['1TB', '1000GB'], ['3'])
    """
    spelling = load_catalogue().words["attributes"][attribute].get("values", {}).get(value, value)
    return alternatives(spelling[language] if isinstance(spelling, dict) else spelling)


def _other_value(pair: Pair, rng: random.Random, numbers: bool) -> Pair | None:
    """Give one attribute that the query asks for another value, in title and structure.

    Where a value's word stands more than once in the title the change could miss the right one: not applied.
    """
    ask, offer, language = pair.ask, pair.offer, words_of(pair.locale)
    if ask is None or offer is None or language is None:
        return None
    catalogue = load_catalogue()
    choices = []
    for name, wanted in ask.attributes.items():
        held = offer.attributes.get(name, ())
        if wanted not in held or name in offer.implied or any(letter.isdigit() for letter in held[0]) != numbers:
            continue
        written = [text for text in spellings(name, held[0], language) if _occurs_once(pair.title, text)]
        values = catalogue.categories[offer.category].attributes.get(name, [])
        others = [value for value in values if wanted not in catalogue.broader(name, value)]
        if written and others:
            choices.append((name, max(written, key=len), others))
    if not choices:
        return None
    name, word, others = rng.choice(choices)
    value = rng.choice(others)
    found = re.search(_exactly(word), pair.title, re.IGNORECASE)
    title = pair.title[: found.start()] + spellings(name, value, language)[0] + pair.title[found.end() :]
    attributes = {**offer.attributes, name: catalogue.broader(name, value)}
    return replace(pair, title=title, offer=replace(offer, attributes=attributes))


def _exactly(word: str) -> str:
    """Match a word that is no part of a longer one; digits may touch letters of scripts without spaces."""
    latin = r"A-Za-zÀ-ÿ0-9"
    return rf"(?<![{latin}.]){re.escape(word)}(?![{latin}]|\.\d)"


def _occurs_once(text: str, word: str) -> bool:
    return len(re.findall(_exactly(word), text, re.IGNORECASE)) == 1
