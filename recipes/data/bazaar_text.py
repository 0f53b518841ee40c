"""How the bazaar's shoppers write queries and its sellers write titles, in six locales."""

from __future__ import annotations

import random
import unicodedata

from recipes.data.bazaar_catalogue import Catalogue, alternatives
from recipes.data.bazaar_rules import Ask, Offer

# Shares of the texts that show each habit.
NATIVE_BRAND = 0.35  # Korean and Japanese shoppers write a brand in their own script
ENGLISH_NAME = 0.1  # shoppers elsewhere use the English word for the product
ASIDE = {"long_tail": 0.6}  # "cheap ...", "... as a gift"; other kinds of query: 0.12
SLOGAN = 0.4


class Writer:
    """Writes the texts of one locale.

    Args:
        catalogue: The words.
        locale: One of the catalogue's locales.
        rng: The only source of chance.
    """

    def __init__(self, catalogue: Catalogue, locale: str, rng: random.Random) -> None:
        self.catalogue = catalogue
        self.words = catalogue.words
        self.locale = locale
        self.rng = rng

    def query(self, ask: Ask, kind: str, name: str | None) -> str:
        """Write a query.

        Args:
            ask: What it asks for.
            kind: The kind of query, one of `recipes.data.bazaar.KINDS`.
            name: What the product is called: a word that several categories share, a use, or None for the name of
                the only category of `ask`. Queries of kind `brand_only` and `model_only` call it nothing.
        """
        if kind in ("brand_only", "model_only"):
            name = ""
        elif name is None:
            locale = "en" if self.rng.random() < ENGLISH_NAME else self.locale
            name = self.rng.choice(self.catalogue.categories[ask.categories[0]].names[locale])
        if ask.fits_brand or (ask.hosts and self.rng.random() < 0.4):
            device = [self._brand(ask.fits_brand), ask.fits_model or ""]
            if not ask.fits_model:
                device.append(self.rng.choice(self.catalogue.categories[ask.hosts[0]].names[self.locale]))
            name = self._join(name, self._connect("for", " ".join(filter(None, device))))
        text = self._ordered(
            "query",
            brand="" if kind == "model_only" else self._brand(ask.brand),
            model=ask.model or ask.family or "",
            name=name,
            attributes=dict(ask.attributes),
        )
        for attribute, value in ask.excluded.items():
            without = self._connect("not", self._attribute(attribute, value))
            text = f"{without} {text}" if self.locale == "ko" else f"{text} {without}"
        if self.rng.random() < ASIDE.get(kind, 0.12):
            text = self._choice(self.words["asides"][self.locale]).format(text)
        return text if self.rng.random() < 0.3 else text.lower()

    def title(self, offer: Offer) -> str:
        """Write a product title: everything that the product states, and nothing that only its model implies."""
        category = self.catalogue.categories[offer.category]
        name = self.rng.choice(category.names[self.locale])
        if offer.host:
            name = self._join(name, self._fits(offer))
        text = self._ordered(
            "title",
            brand=self._brand(offer.brand),
            model=offer.model or "",
            name=name,
            attributes={name: value[0] for name, value in offer.attributes.items() if name not in offer.implied},
        )
        if offer.bundled:
            extra = self.rng.choice(self.catalogue.categories[offer.bundled].names[self.locale])
            text = f"{text} {self._connect('with', extra)}"
        text = text[0].upper() + text[1:]
        if self.rng.random() < SLOGAN:
            slogan = self._choice(self.words["slogans"][self.locale])
            if self.locale in ("ko", "jp"):
                return f"【{slogan}】{text}" if self.locale == "jp" else f"[{slogan}] {text}"
            text = f"{text}, {slogan}" if self.rng.random() < 0.6 else f"{slogan.capitalize()} {text}"
        return text

    def misspell(self, text: str) -> str:
        """Return the text with one slip of the finger; numbers and short words are left as they are."""
        words = text.split(" ")
        slips = [position for position, word in enumerate(words) if self._slips(word)]
        if not slips:
            return text
        position = self.rng.choice(slips)
        words[position] = self.rng.choice(self._slips(words[position]))
        return " ".join(words)

    def _slips(self, word: str) -> list[str]:
        kana = {"ー": "", "ッ": "ツ", "ヴ": "ブ"}
        if self.locale == "jp" and any(letter in word for letter in kana):
            return [word.replace(letter, slip, 1) for letter, slip in kana.items() if letter in word]
        if self.locale == "ko" and any(_swap_vowel(letter) != letter for letter in word):
            return [
                word[:place] + _swap_vowel(letter) + word[place + 1 :]
                for place, letter in enumerate(word)
                if _swap_vowel(letter) != letter
            ]
        if len(word) < 5 or not word.isalpha() or not unicodedata.name(word[0]).startswith("LATIN"):
            return []
        dropped = [word[:place] + word[place + 1 :] for place in range(1, len(word))]
        doubled = [word[:place] + word[place] + word[place:] for place in range(1, len(word))]
        swapped = [word[:p] + word[p + 1] + word[p] + word[p + 2 :] for p in range(1, len(word) - 1)]
        plain = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
        return [slip for slip in [*dropped, *doubled, *swapped, plain] if slip != word]

    def _choice(self, text: str) -> str:
        return self.rng.choice(alternatives(text))

    def _brand(self, brand: str | None) -> str:
        native = self.words["brands"].get(brand, {}).get(self.locale)
        return native if native and self.rng.random() < NATIVE_BRAND else brand or ""

    def _attribute(self, attribute: str, value: str) -> str:
        entry = self.words["attributes"][attribute]
        spelling = entry.get("values", {}).get(value, value)
        if isinstance(spelling, dict):
            spelling = spelling[self.locale]
        return self._choice(entry["phrase"][self.locale]).format(self._choice(spelling))

    def _connect(self, connective: str, text: str) -> str:
        return self._choice(self.words["connectives"][connective][self.locale]).format(text)

    def _fits(self, offer: Offer) -> str:
        host = self.rng.choice(self.catalogue.categories[offer.host].names[self.locale])
        if not offer.fits_brand:
            return self._choice(self.words["connectives"]["universal"][self.locale]) + " " + self._connect("for", host)
        device = " ".join(filter(None, [self._brand(offer.fits_brand), " / ".join(offer.fits_models)]))
        if not offer.fits_models or self.rng.random() < 0.4:
            device = f"{device} {host}"
        return self._connect(self.rng.choice(["for", "compatible"]), device)

    def _join(self, name: str, device: str) -> str:
        """Put an accessory's device where the locale has it: before the name in Korean and Japanese."""
        return f"{device} {name}" if self.locale in ("ko", "jp") else f"{name} {device}"

    def _ordered(self, what: str, brand: str, model: str, name: str, attributes: dict[str, str]) -> str:
        parts = {"brand": brand, "model": model, "name": name, "adjectives": "", "measures": ""}
        for attribute, value in attributes.items():
            position = self.words["attributes"][attribute]["position"]
            parts[position] = f"{parts[position]} {self._attribute(attribute, value)}".strip()
        orders = self.words["orders"][what][self.locale]
        order = orders[0] if self.rng.random() < 0.6 else self.rng.choice(orders[1:])
        return " ".join(parts[part] for part in order.split() if parts[part])


def _swap_vowel(syllable: str) -> str:
    """Exchange ㅐ and ㅔ, which sound alike, in a Korean syllable; return anything else as it is.

    >>> _swap_vowel("배"), _swap_vowel("가")
    ('베', '가')
    """
    index = ord(syllable) - 0xAC00
    if not 0 <= index < 11172:
        return syllable
    vowel = index // 28 % 21
    return chr(ord(syllable) + {1: 4 * 28, 5: -4 * 28}.get(vowel, 0))
