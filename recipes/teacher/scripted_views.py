"""How each perspective of the scripted teacher sees a pair: the structures, with something overlooked or misread."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from recipes.data.bazaar_catalogue import load_catalogue
from recipes.data.bazaar_rules import Ask, Decision, Offer, decide
from recipes.schemas import PERSPECTIVES

# How often a further sample looks again instead of seeing what the first one saw.
SECOND_LOOK = 0.3
# Attributes that a business rule insists on; the others are preferences to it.
CONTRACTUAL = ("count", "storage", "volume", "weight", "clothing size", "shoe size", "screen size", "bed size")

# What a perspective sees where the query names no product, or the title no value.
UNNAMED = "product without a name"
NO_VALUE = "no value"
# Some pairs are beyond every perspective: none of them sees what decides.
OBSCURE = 0.12

Notice = Callable[[float], bool]


def user_intent(ask: Ask, offer: Offer, kind: str, misspelt: bool, notice: Notice) -> tuple[Ask, Offer]:
    """See as a shopper: the need and the look of the thing, hardly ever a version."""
    if misspelt and not notice(0.9):
        return replace(ask, categories=(UNNAMED,), hosts=()), offer
    if not notice(0.2):
        ask = replace(ask, model=None, family=None)
    if not notice(0.4):
        ask = replace(ask, fits_brand=None, fits_model=None)
    if ask.brand and kind != "brand_only" and not notice(0.75):
        ask = replace(ask, brand=None)
    attributes = {name: value for name, value in ask.attributes.items() if notice(0.75)}
    if "audience" not in ask.attributes and "children" in offer.attributes.get("audience", ()) and not notice(0.5):
        attributes["audience"] = "adults"
    ask = replace(ask, attributes=attributes, excluded={n: v for n, v in ask.excluded.items() if notice(0.6)})
    if offer.bundled in ask.categories and not notice(0.5):
        # It is in the box, after all.
        return ask, replace(offer, category=offer.bundled, brand=ask.brand, attributes={})
    if offer.category in _near(ask) and not notice(0.75):
        return ask, replace(offer, category=ask.categories[0])  # as good for the purpose
    if offer.host == (ask.hosts or ask.categories)[0] and not notice(0.85):
        return replace(ask, hosts=()), replace(offer, host=None)  # an add-on is just another thing
    if offer.bundled and not notice(0.9):
        return ask, replace(offer, category=offer.bundled, host=offer.category)
    return ask, offer


def structured_analysis(ask: Ask, offer: Offer, kind: str, misspelt: bool, notice: Notice) -> tuple[Ask, Offer]:
    """See as an annotator with a table: words against words, without rules for add-ons, broader values or needs."""
    if kind == "use_case" and not notice(0.7):
        return replace(ask, categories=(UNNAMED,), hosts=()), replace(offer, host=None)
    if offer.host in ask.categories and not notice(0.6):
        # The device's name in an add-on's title is taken for the product.
        fitting = ask.model if ask.model in offer.fits_models else (offer.fits_models or (None,))[0]
        family = ask.family if fitting and ask.family and fitting.startswith(ask.family) else None
        offer = replace(offer, category=offer.host, brand=offer.fits_brand or offer.brand, model=fitting, family=family)
    elif offer.bundled in ask.categories and not notice(0.5):
        offer = replace(offer, category=offer.bundled, brand=ask.brand or offer.brand)
    elif ask.brand and ask.brand == offer.brand and not notice(0.85):
        offer = replace(offer, category=ask.categories[0])  # the maker matches, and the type is not looked at twice
    elif not notice(0.45):
        ask, offer = replace(ask, hosts=()), replace(offer, host=None)
    if misspelt and ask.brand and not notice(0.75):
        ask = replace(ask, brand=f"{ask.brand} as misspelt")
    if not notice(0.8):
        ask = replace(ask, fits_brand=None, fits_model=None)
    attributes = {name: value if notice(0.5) else value[:1] for name, value in offer.attributes.items()}
    for name in ask.attributes:
        if (name not in attributes or name in offer.implied) and not notice(0.75):
            attributes[name] = (NO_VALUE,)
    return ask, replace(offer, attributes=attributes)


def business_rule(ask: Ask, offer: Offer, kind: str, misspelt: bool, notice: Notice) -> tuple[Ask, Offer]:
    """See as a policy: main item or add-on, binding maker and version; details are forgiven, needs are not read."""
    if kind == "use_case" and not notice(0.75):
        return replace(ask, categories=(UNNAMED,), hosts=()), replace(offer, host=None)
    if kind == "ambiguous" and not notice(0.75):
        ask = replace(ask, categories=ask.categories[:1])
    if offer.host and offer.category not in ask.categories and not notice(0.6):
        offer = replace(offer, host=ask.categories[0])  # any add-on is one to it
    if offer.bundled and not notice(0.92):
        offer = replace(offer, category=offer.bundled, host=offer.category)  # a bundle is filed as its smaller part
    if misspelt and ask.brand and not notice(0.8):
        ask = replace(ask, brand=None)
    if not notice(0.88):
        ask = replace(ask, model=None, family=None, fits_model=None)
    kept = {name: value for name, value in ask.attributes.items() if notice(0.8 if name in CONTRACTUAL else 0.4)}
    ask = replace(ask, attributes=kept, excluded={n: v for n, v in ask.excluded.items() if notice(0.6)})
    return ask, replace(offer, attributes={n: v for n, v in offer.attributes.items() if n not in offer.implied})


VIEWS = dict(zip(PERSPECTIVES, (user_intent, structured_analysis, business_rule), strict=True))


def obscured(ask: Ask, offer: Offer) -> tuple[Ask, Offer]:
    """Hide what decides the pair: the difference, or, where there is none, that the product is the one asked for."""
    aspect = decide(ask, offer).aspect
    if aspect == "all":
        known = dict.fromkeys(ask.attributes, (NO_VALUE,))
        return (ask, replace(offer, attributes=known)) if known else (ask, replace(offer, category=UNNAMED))
    if aspect == "accessory":
        return replace(ask, hosts=()), replace(offer, host=None, bundled=None)
    if aspect == "category":
        return ask, replace(offer, category=ask.categories[0], brand=ask.brand or offer.brand)
    if aspect in ("brand", "model", "fit"):
        return replace(ask, brand=None, family=None, model=None, fits_brand=None, fits_model=None), offer
    attributes = {name: value for name, value in ask.attributes.items() if name != aspect}
    return replace(ask, attributes=attributes, excluded={}), offer


def judge(
    ask: Ask, offer: Offer, kind: str, misspelt: bool, perspective: str, pair_id: str, sample: int = 0, seed: int = 0
) -> tuple[Decision, Ask, Offer]:
    """Decide on what a perspective sees of a pair; also return what it saw."""
    first = random.Random(f"{seed} {pair_id} {perspective}")
    again = random.Random(f"{seed} {pair_id} {perspective} {sample}")
    if random.Random(f"{seed} {pair_id}").random() < OBSCURE:
        ask, offer = obscured(ask, offer)

    def notice(probability: float) -> bool:
        draw, other = first.random(), again.random()
        if sample and again.random() < SECOND_LOOK:
            draw = other
        return draw < probability

    seen = VIEWS[perspective](ask, offer, kind, misspelt, notice)
    return decide(*seen), *seen


def _near(ask: Ask) -> list[str]:
    """List the kinds of product that a shopper might take instead."""
    catalogue = load_catalogue()
    return [near for category in ask.categories for near in catalogue.categories[category].near]
