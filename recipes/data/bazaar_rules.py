"""Structures behind the bazaar's pairs, and the rules that derive a label from them.

A query asks (`Ask`), a product offers (`Offer`), and `decide` compares the two. Nothing else enters a label, so
the label that is stored can always be derived again from `structures.parquet`.

The rules, in order of precedence; the first that applies decides:

1. Accessory Mismatch: an accessory of what was asked for, or the main product where its accessory was asked for.
2. Category Mismatch: any other kind of product. An accessory of something else belongs here, and so does another
   accessory of the same main product.
3. Brand Mismatch: a brand is asked for and the product has another one.
4. Model Mismatch: a family or a model is asked for and the product is another one; or the product is made for
   other devices than the one named. A product that names no device fits all of them.
5. Attribute Mismatch: the product states another value than the one asked for, or one that the query excludes.
   A narrower value satisfies a broader one (navy is blue), never the reverse. A value that is not stated
   contradicts nothing, except a count: no count means one piece.
6. Strongly Relevant: everything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from recipes.schemas import Column, Contract

STRONGLY_RELEVANT = "Strongly Relevant"
BRAND = "Brand Mismatch"
CATEGORY = "Category Mismatch"
MODEL = "Model Mismatch"
ATTRIBUTE = "Attribute Mismatch"
ACCESSORY = "Accessory Mismatch"

# What a product is when it does not say.
UNSTATED = {"count": ("1",)}

STRUCTURES = Contract(
    name="structures",
    made_by="recipes.data.bazaar",
    columns={
        "pair_id": Column("string", blank=False),
        "split": Column("string", blank=False),
        "query_kind": Column("string", blank=False),
        "misspelt": Column("string", blank=False),
        "query_structure": Column("string", blank=False),
        "product_structure": Column("string", blank=False),
    },
    key=("pair_id",),
)


@dataclass(frozen=True)
class Ask:
    """What a query asks for.

    Attributes:
        categories: Any of these kinds of product answers the query.
        hosts: For an accessory, the main products that it belongs to.
        brand: Named, or implied by a model.
        family: A line of models, any of which will do ("Aro").
        model: One model ("Aro 12 Pro").
        fits_brand: The brand of the device that an accessory is wanted for.
        fits_model: The model of the device that an accessory is wanted for.
        attributes: Attribute -> the value wanted.
        excluded: Attribute -> the value not wanted.
    """

    categories: tuple[str, ...]
    hosts: tuple[str, ...] = ()
    brand: str | None = None
    family: str | None = None
    model: str | None = None
    fits_brand: str | None = None
    fits_model: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """What a product is.

    Attributes:
        category: Its kind.
        host: For an accessory, the main product that it belongs to.
        brand: Its maker.
        family: Its line of models.
        model: Its model.
        fits_brand: For an accessory, the brand of the devices that it is made for.
        fits_models: For an accessory, those devices; empty: all of them.
        attributes: Attribute -> its value, followed by the broader values that hold too.
        implied: The attributes that follow from the model and that the title does not write.
        bundled: An accessory in the box. No rule reads it: a main product with a case is a main product.
    """

    category: str
    host: str | None = None
    brand: str | None = None
    family: str | None = None
    model: str | None = None
    fits_brand: str | None = None
    fits_models: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    implied: tuple[str, ...] = ()
    bundled: str | None = None


@dataclass(frozen=True)
class Decision:
    """A label and the comparison that decided it.

    Attributes:
        label: Name of the class in `recipes/labels/aliexpress6.yaml`.
        aspect: What was compared: `accessory`, `category`, `brand`, `model`, `fit`, an attribute's name, or `all`.
        asked: What the query wanted there.
        offered: What the product has there.
    """

    label: str
    aspect: str
    asked: str
    offered: str


def label(ask: Ask, offer: Offer) -> str:
    """Return the class of a pair.

    >>> label(Ask(("tent",)), Offer("tent peg", host="tent"))
    'Accessory Mismatch'
    """
    return decide(ask, offer).label


def decide(ask: Ask, offer: Offer) -> Decision:
    """Apply the rules of this module in order; the first that applies decides."""
    wanted = " or ".join(ask.categories)
    if offer.category not in ask.categories:
        related = offer.host in ask.categories or offer.category in ask.hosts
        return Decision(
            ACCESSORY if related else CATEGORY, "accessory" if related else "category", wanted, offer.category
        )
    if ask.brand and ask.brand != offer.brand:
        return Decision(BRAND, "brand", ask.brand, offer.brand or "no brand")
    if ask.model and ask.model != offer.model:
        return Decision(MODEL, "model", ask.model, offer.model or "no model")
    if ask.family and ask.family != offer.family:
        return Decision(MODEL, "model", ask.family, offer.model or "no model")
    if ask.fits_brand and offer.fits_brand and ask.fits_brand != offer.fits_brand:
        return Decision(
            MODEL, "fit", ask.fits_model or ask.fits_brand, " / ".join(offer.fits_models) or offer.fits_brand
        )
    if ask.fits_model and offer.fits_models and ask.fits_model not in offer.fits_models:
        return Decision(MODEL, "fit", ask.fits_model, " / ".join(offer.fits_models))
    for name, value in ask.attributes.items():
        offered = offer.attributes.get(name, UNSTATED.get(name, ()))
        if offered and value not in offered:
            return Decision(ATTRIBUTE, name, value, offered[0])
    for name, value in ask.excluded.items():
        offered = offer.attributes.get(name, ())
        if value in offered:
            return Decision(ATTRIBUTE, name, f"not {value}", offered[0])
    return Decision(STRONGLY_RELEVANT, "all", wanted, offer.category)


def to_json(structure: Ask | Offer) -> str:
    """Write a structure as JSON, without its empty fields."""
    return json.dumps({name: value for name, value in asdict(structure).items() if value}, ensure_ascii=False)


def ask_from_json(text: str) -> Ask:
    """Read what `to_json` wrote for a query."""
    values = json.loads(text)
    return Ask(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def offer_from_json(text: str) -> Offer:
    """Read what `to_json` wrote for a product."""
    values = json.loads(text)
    values["attributes"] = {name: tuple(value) for name, value in values.get("attributes", {}).items()}
    return Offer(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
