"""What the bazaar's shoppers want and what it then shows them: random structures from the catalogue."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from recipes.data.bazaar_catalogue import Catalogue, Category, alternatives
from recipes.data.bazaar_rules import Ask, Offer

# Kind of query -> its weight. Small kinds run out of new texts in large datasets; the others take their place.
KINDS = {
    "plain": 40,
    "accessory": 20,
    "long_tail": 14,
    "model_only": 8,
    "ambiguous": 7,
    "use_case": 6,
    "brand_only": 5,
}
# How a product is drawn for a query, and its weight where the query leaves room for it. The label does not follow
# from this but from the rules: a product drawn to differ in its brand may turn out to be another model, too.
TARGETS = {"same": 10, "brand": 26, "model": 32, "attribute": 26, "accessory": 15, "category": 16}


@dataclass(frozen=True)
class Market:
    """Draws wishes and products.

    Attributes:
        catalogue: Where they are drawn from.
        rng: The only source of chance.
    """

    catalogue: Catalogue
    rng: random.Random

    def ask(self, kind: str, locale: str) -> tuple[Ask, str | None]:
        """Draw what a shopper wants: part of what one product is. Also return how it is called (see `Writer.query`)."""
        rng, catalogue = self.rng, self.catalogue
        if kind == "brand_only":
            brand = rng.choice(list(catalogue.sells))
            return Ask(tuple(catalogue.sells[brand]), brand=brand), None
        if kind == "ambiguous":
            shared = rng.choice(catalogue.words["shared"])
            ideal = self._draw(catalogue.categories[rng.choice(shared["categories"])])
            both = set.intersection(*(set(catalogue.categories[key].attributes) for key in shared["categories"]))
            ask = Ask(tuple(shared["categories"]), attributes=self._wishes(ideal, rng.choice([0, 1, 1, 2]), both))
            return ask, rng.choice(alternatives(shared["names"][locale]))
        if kind == "accessory":
            category = catalogue.categories[
                rng.choice([key for key in catalogue.categories if key not in catalogue.main])
            ]
            ideal = self._draw(category)
            return (
                Ask(
                    (category.key,),
                    hosts=(category.host,),
                    brand=ideal.brand if rng.random() < 0.35 else None,
                    fits_brand=ideal.fits_brand,
                    fits_model=ideal.fits_models[0] if ideal.fits_models else None,
                    attributes=self._wishes(ideal, rng.choice([0, 1, 1, 2])),
                ),
                None,
            )
        main = [key for key in catalogue.main if kind != "model_only" or any(catalogue.categories[key].brands.values())]
        category = catalogue.categories[rng.choice(main)]
        ideal = self._draw(category)
        if kind == "use_case":
            ask = Ask((category.key,), attributes=self._wishes(ideal, rng.choice([0, 0, 1, 2])))
            return ask, rng.choice(alternatives(category.uses[locale]))
        if kind == "model_only":
            ask = Ask((category.key,), brand=ideal.brand, model=ideal.model)
            return replace(ask, attributes=self._wishes(ideal, rng.choice([0, 1, 1]))), None
        long_tail = kind == "long_tail"
        ask = Ask((category.key,), attributes=self._wishes(ideal, rng.choice([2, 3] if long_tail else [0, 1, 1, 2])))
        if long_tail and rng.random() < 0.3:
            ask = replace(ask, excluded=self._aversion(category, ask, ideal))
        if rng.random() < 0.75:
            ask = replace(ask, brand=ideal.brand)
            if ideal.model and rng.random() < 0.85:
                ask = replace(ask, model=ideal.model) if rng.random() < 0.7 else replace(ask, family=ideal.family)
        return ask, None

    def offers(self, ask: Ask, count: int) -> list[Offer]:
        """Draw a result list: at least one product that should answer the query, then near misses and strangers."""
        possible = ["same", "accessory", "category"]
        possible += ["brand"] * bool(ask.brand)
        possible += ["model"] * bool(ask.model or ask.family or ask.fits_brand)
        possible += ["attribute"] * bool(ask.attributes or ask.excluded)
        targets = self.rng.choices(possible, [TARGETS[target] for target in possible], k=count - 1)
        return [self.offer(ask, target) for target in ["same", *targets]]

    def offer(self, ask: Ask, target: str) -> Offer:
        """Draw a product that relates to the query as `target` says, as far as the catalogue allows."""
        rng, categories = self.rng, self.catalogue.categories
        category = categories[rng.choice(ask.categories)]
        fits = (ask.fits_brand, ask.fits_model)
        exact = target in ("same", "attribute") or rng.random() < 0.6
        values = self._answers(category, ask) if exact else {}
        if target == "accessory" and ask.hosts:
            host = categories[ask.hosts[0]]
            bundled = rng.choice(ask.categories) if rng.random() < 0.6 else None
            return replace(self._show(self._draw(host, ask.fits_brand, ask.fits_model), ask), bundled=bundled)
        if target == "accessory":
            accessory = categories[rng.choice(category.accessories)]
            maker = ask.brand if rng.random() < 0.3 else None
            own = {name: value for name, value in values.items() if value in accessory.attributes.get(name, ())}
            return self._show(self._draw(accessory, maker, fits=(ask.brand, ask.model), values=own), ask)
        if target == "category":
            return self._show(self._stranger(category, ask, values), ask)
        brand, model = ask.brand, ask.model or ask.family
        if target == "brand":
            brand, model = rng.choice([name for name in self._brands(category) if name != ask.brand]), None
        elif target == "model":
            fits, model = self._other_device(category, ask), self._other_model(category, ask)
        offer = self._draw(category, brand, model, fits, values)
        if target == "attribute":
            offer = self._contradict(category, ask, offer)
        offer = self._show(offer, ask)
        if category.accessories and rng.random() < 0.2:
            offer = replace(offer, bundled=rng.choice(category.accessories))
        return offer

    def _brands(self, category: Category) -> list[str]:
        if not category.host:
            return list(category.brands)
        makers = self.catalogue.words["accessory_brands"]
        return [*makers, *(brand for brand in self.catalogue.categories[category.host].brands if brand not in makers)]

    def _draw(
        self,
        category: Category,
        brand: str | None = None,
        model: str | None = None,
        fits: tuple[str | None, str | None] = (None, None),
        values: dict[str, str] | None = None,
    ) -> Offer:
        """Draw a product with every attribute of its category; what is given is kept where the category has it."""
        rng = self.rng
        if brand not in self._brands(category):
            brand, model = rng.choice(self._brands(category)), None
        models = category.brands.get(brand, [])
        models = [pair for pair in models if model in pair] or models
        family, model = rng.choice(models) if models else (None, None)
        attributes = {name: rng.choice(choices) for name, choices in category.attributes.items()} | (values or {})
        implied = {**category.implied.get(family, {}), **category.implied.get(model, {})}
        fits_brand, fits_models = self._fits(category, brand, *fits)
        return Offer(
            category=category.key,
            host=category.host,
            brand=brand,
            family=family,
            model=model,
            fits_brand=fits_brand,
            fits_models=fits_models,
            attributes={name: self.catalogue.broader(name, value) for name, value in {**attributes, **implied}.items()},
            implied=tuple(implied),
        )

    def _fits(
        self, category: Category, maker: str, brand: str | None, model: str | None
    ) -> tuple[str | None, tuple[str, ...]]:
        """Draw the devices of an accessory: universal, one brand's, one model, or two neighbouring models."""
        host = self.catalogue.categories.get(category.host)
        if host is None or not any(host.brands.values()) or (not brand and self.rng.random() < 0.15):
            return None, ()
        if maker in host.brands:
            brand = maker  # a brand makes accessories for its own devices
        if brand not in host.brands:
            brand = self.rng.choice(list(host.brands))
        models = [name for _, name in host.brands[brand]]
        if not models or self.rng.random() < 0.12:
            return brand, ()
        first = models.index(model) if model in models else self.rng.randrange(len(models))
        return brand, tuple(models[first : first + self.rng.choice([1, 1, 2])])

    def _wishes(self, ideal: Offer, count: int, names: set[str] | None = None) -> dict[str, str]:
        """Ask for some of a product's attributes, sometimes by the broader value."""
        possible = [name for name in ideal.attributes if names is None or name in names]
        chosen = self.rng.sample(possible, min(count, len(possible)))
        return {name: self.rng.choice(ideal.attributes[name]) for name in chosen}

    def _aversion(self, category: Category, ask: Ask, ideal: Offer) -> dict[str, str]:
        """Exclude a material or a colour that the wished product does not have and that is not asked for."""
        for name in ("material", "colour"):
            choices = [value for value in category.attributes.get(name, []) if value not in ideal.attributes[name]]
            if choices and name not in ask.attributes:
                return {name: self.rng.choice(choices)}
        return {}

    def _answers(self, category: Category, ask: Ask) -> dict[str, str]:
        """Choose values that satisfy the query: the one asked for or a narrower one, none that is excluded."""
        answers = {}
        for name, wanted in ask.attributes.items():
            choices = [v for v in category.attributes.get(name, []) if wanted in self.catalogue.broader(name, v)]
            if choices:
                answers[name] = self.rng.choice(choices)
        for name, unwanted in ask.excluded.items():
            choices = [v for v in category.attributes.get(name, []) if unwanted not in self.catalogue.broader(name, v)]
            if choices:
                answers[name] = self.rng.choice(choices)
        return answers

    def _contradict(self, category: Category, ask: Ask, offer: Offer) -> Offer:
        """Give one attribute of the query a value that it does not want."""
        name = self.rng.choice([*ask.attributes, *ask.excluded])
        if name in offer.implied:
            return offer
        wanted = ask.attributes.get(name)
        if wanted is None:
            choices = [ask.excluded[name]]
        else:
            choices = [
                value
                for value in category.attributes.get(name, [])
                if wanted not in self.catalogue.broader(name, value)
            ]
        if not choices:
            return offer
        value = self.catalogue.broader(name, self.rng.choice(choices))
        return replace(offer, attributes={**offer.attributes, name: value})

    def _show(self, offer: Offer, ask: Ask) -> Offer:
        """Keep the attributes that the title states or the model implies: nearly all that were asked for, few others.

        An implied attribute is sometimes written out as well.
        """
        named = {*ask.attributes, *ask.excluded}
        shown = {
            name: value
            for name, value in offer.attributes.items()
            if name in offer.implied or self.rng.random() < (0.85 if name in named else 0.35)
        }
        return replace(
            offer, attributes=shown, implied=tuple(name for name in offer.implied if self.rng.random() < 0.75)
        )

    def _other_model(self, category: Category, ask: Ask) -> str | None:
        """Choose another model of the brand asked for: of the same family if one model was asked for."""
        models = category.brands.get(ask.brand, [])
        if ask.model is None:
            others = [family for family, _ in models if family != ask.family]
        else:
            family = next(family for family, name in models if name == ask.model)
            others = [name for _, name in models if name != ask.model]
            others = [name for name in others if name.startswith(f"{family} ")] or others
        return self.rng.choice(others) if others else None

    def _other_device(self, category: Category, ask: Ask) -> tuple[str | None, str | None]:
        """Choose another device for an accessory: mostly a sibling of the one named."""
        if not ask.fits_brand:
            return None, None
        brands = self.catalogue.categories[category.host].brands
        siblings = [name for _, name in brands[ask.fits_brand] if name != ask.fits_model]
        if ask.fits_model and siblings and self.rng.random() < 0.7:
            return ask.fits_brand, self.rng.choice(siblings)
        return self.rng.choice([brand for brand in brands if brand != ask.fits_brand]), None

    def _stranger(self, category: Category, ask: Ask, values: dict[str, str]) -> Offer:
        """Draw another kind of product: mostly one that is easily confused, often of the brand asked for."""
        rng, catalogue = self.rng, self.catalogue
        near = catalogue.categories[category.host].near if category.host else category.near
        if category.host and rng.random() < 0.6:
            others = [catalogue.categories[key] for key in catalogue.categories[category.host].accessories]
        elif rng.random() < 0.7:
            others = [catalogue.categories[key] for key in near]
        else:
            others = [catalogue.categories[key] for key in catalogue.sells.get(ask.brand, catalogue.main)]
        others = [other for other in others if other.key not in ask.categories]
        other = rng.choice(others or [catalogue.categories[key] for key in catalogue.main if key not in ask.categories])
        if not other.host and rng.random() < (0.7 if category.host else 0.15):
            other = catalogue.categories[rng.choice(other.accessories)]
        own = {name: value for name, value in values.items() if value in other.attributes.get(name, ())}
        return self._draw(other, ask.brand, fits=(ask.fits_brand, ask.fits_model), values=own)
