"""The bazaar's hand-written catalogue: `recipes/data/catalogue/*.yaml`, read once."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "catalogue"
LOCALES = ("en", "es", "ko", "jp", "pt", "fr")


def alternatives(text: str) -> list[str]:
    """Split `a | b`, the catalogue's notation for different ways to say one thing.

    >>> alternatives("smartphone | mobile phone")
    ['smartphone', 'mobile phone']
    """
    return [part.strip() for part in text.split("|")]


@dataclass(frozen=True)
class Category:
    """One kind of product, main or accessory.

    Attributes:
        key: Its name in the structures.
        names: Locale -> its names there, the usual one first.
        attributes: Attribute -> the values that its products have.
        host: For an accessory, the main product that it belongs to.
        brands: Brand -> its (family, model) pairs; empty pairs where the brand names no models.
        implied: Family or model -> the attributes that follow from it.
        uses: Locale -> how a shopper describes the need without naming the product.
        near: The kinds of product that are most easily confused with it.
        accessories: The accessories that belong to it.
    """

    key: str
    names: Mapping[str, list[str]]
    attributes: Mapping[str, list[str]]
    host: str | None = None
    brands: Mapping[str, list[tuple[str, str]]] = field(default_factory=dict)
    implied: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    uses: Mapping[str, str] = field(default_factory=dict)
    near: list[str] = field(default_factory=list)
    accessories: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Catalogue:
    """Everything that the bazaar's pairs are made from.

    Attributes:
        categories: Key -> category, main products and accessories.
        main: Keys of the main products.
        words: Content of `words.yaml`: what all categories share.
        sells: Brand -> the main products that it makes.
    """

    categories: Mapping[str, Category]
    main: list[str]
    words: Mapping[str, Any]
    sells: Mapping[str, list[str]]

    def broader(self, attribute: str, value: str) -> tuple[str, ...]:
        """Return a value followed by the broader one that holds too.

        >>> load_catalogue().broader("colour", "navy")
        ('navy', 'blue')
        """
        entry = self.words["attributes"][attribute].get("values", {}).get(value, {})
        return (value, entry["is"]) if "is" in entry and isinstance(entry, dict) else (value,)


@functools.cache
def load_catalogue() -> Catalogue:
    """Read the catalogue's files."""
    words = yaml.safe_load((FOLDER / "words.yaml").read_text(encoding="utf-8"))
    categories: dict[str, Category] = {}
    main: list[str] = []
    for department in ("electronics", "home", "life"):
        content = yaml.safe_load((FOLDER / f"{department}.yaml").read_text(encoding="utf-8"))
        main += content["categories"]
        for key, entry in content["categories"].items():
            owned = [name for name, accessory in content["accessories"].items() if accessory["host"] == key]
            categories[key] = _category(key, entry, accessories=owned)
        for key, entry in content["accessories"].items():
            categories[key] = _category(key, entry)
    brands = sorted({brand for key in main for brand in categories[key].brands})
    sells = {brand: [key for key in main if brand in categories[key].brands] for brand in brands}
    return Catalogue(categories, main, words, sells)


def _category(key: str, entry: Mapping[str, Any], accessories: Sequence[str] = ()) -> Category:
    brands = entry.get("brands", {})
    if isinstance(brands, list):
        brands = {brand: {} for brand in brands}
    models = {
        brand: [(family, f"{family} {version}") for family, versions in families.items() for version in versions]
        for brand, families in brands.items()
    }
    names = {locale: alternatives(entry["names"][locale]) for locale in LOCALES}
    return Category(key=key, accessories=list(accessories), **{**entry, "names": names, "brands": models})
