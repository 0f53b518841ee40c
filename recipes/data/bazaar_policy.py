"""Read the bazaar by a rules file: which label follows from what was found, as a search team would have it.

`recipes.data.bazaar_rules.decide` says which comparison decides a pair (the kind of product, the maker, a size). Which
label follows is written in a rules file (recipes/rules/aliexpress6.yaml, or an edited copy): each situation here has
the name of the rule that speaks of it, and the rule's label holds. With the rules as they come, nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes.data.bazaar_rules import Ask, Decision, Offer

if TYPE_CHECKING:
    from recipes.teacher.books import Rule

# What decided -> the rules that speak of it; the first that is in the file, for the locale and with a label, holds.
_ACCESSORY = "accessory or main product"
RULES_OF = {
    "accessory": (_ACCESSORY,),
    "compatible accessory": ("compatible accessory", _ACCESSORY),
    "category": ("another kind",),
    "brand": ("binding brand",),
    "model": ("binding model",),
    "fit": ("compatible with",),
    "excluded": ("negation",),
    "size": ("counts and sizes",),
    "audience": ("gender and age",),
    "all": ("silence",),
}
SIZES = ("count", "storage", "memory", "screen size", "volume", "clothing size", "shoe size", "persons", "weight",
         "wattage", "length", "diameter", "wheel size", "bed size")  # fmt: skip


def situation(decision: Decision, ask: Ask, offer: Offer) -> str:
    """Name what decided a pair: a key of `RULES_OF`, or the name of an attribute that no rule speaks of.

    >>> from recipes.data.bazaar_rules import decide
    >>> phone = Ask(("smartphone",), brand="Norvani", model="Aro 12")
    >>> case = Offer("phone case", host="smartphone", fits_brand="Norvani", fits_models=("Aro 12",))
    >>> situation(decide(phone, case), phone, case)
    'compatible accessory'
    """
    if decision.aspect == "accessory" and offer.host in ask.categories:
        # Nothing that the query asks for of the device says that it would not fit.
        fits_brand = not ask.brand or offer.fits_brand in (None, ask.brand)
        fits_model = not ask.model or not offer.fits_models or ask.model in offer.fits_models
        return "compatible accessory" if fits_brand and fits_model else "accessory"
    if decision.aspect in ask.excluded and decision.asked.startswith("not "):
        return "excluded"
    return "size" if decision.aspect in SIZES else decision.aspect


def follow(decision: Decision, ask: Ask, offer: Offer, rules: Sequence[Rule], locale: str) -> Decision:
    """Return the decision with the label that the rules give it.

    Where that is another label than before, the aspect becomes `rule`, and `asked` the rule's name.

    Args:
        decision: What `recipes.data.bazaar_rules.decide` found.
        ask: What it was found for.
        offer: The product.
        rules: Of a rules file for aliexpress6.
        locale: Rules of other locales are passed over.
    """
    found = {rule.name: rule for rule in rules if rule.label and (not rule.locales or locale in rule.locales)}
    for name in RULES_OF.get(situation(decision, ask, offer), ()):
        if name in found:
            label = found[name].label
            if label is None or label == decision.label:
                return decision
            return Decision(label, "rule", name, offer.category)
    return decision
