"""What a rationale claims of its pair, and which of it stands in neither query nor title.

Four kinds of claims are concrete enough to be checked, in any of the catalogue's languages:

- `number`: digits ("12", "2.5"); the same number in words ("two", "doce", "三") counts as well;
- `quoted`: words in quotation marks; an ellipsis within stands for anything;
- `brand`: one of the brands of the data;
- `attribute`: a colour or material of the catalogue's glossary. "black" is grounded by ブラック, and blue by navy.

What follows without being said (that a kettle is electric) is no claim here, so the rate is a lower bound of what is
made up, and knowledge of the world that happens to be right is counted against the rationale: it is not of this pair.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from recipes.data.bazaar_catalogue import load_catalogue
from recipes.data.perturb_words import find_word, stated, words_of
from recipes.data.text import normalise
from recipes.rationales.strip import strip_label_names
from recipes.schemas import LabelSchema

if TYPE_CHECKING:
    from recipes.data.bazaar_rules import Ask, Offer

KINDS = ("number", "quoted", "brand", "attribute")
_NUMBER = re.compile(r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?")
_QUOTED = re.compile(r"(?<![\d\w])[\"“「『«]([^\"“”「」『』«»]{1,80})[\"”」』»]")  # 12" is no quotation
_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve",
    "uno dos tres cuatro cinco seis siete ocho nueve diez once doce",
    "um dois três quatro cinco seis sete oito nove dez onze doze",
    "un deux trois quatre cinq six sept huit neuf dix onze douze",
    "一 二 三 四 五 六 七 八 九 十",
)
_NUMBER_WORDS = {word: str(n) for line in _WORDS for n, word in enumerate(line.split(), 1)} | {"dozen": "12"}
_ATTRIBUTES = ("colour", "material")
_AMBIGUOUS = {"down"}  # "scaled down" is no material
# The other gender and number than the glossary's: negra, negros for negro; preto for preta; noir, noirs for noire.
_FORMS = {
    "en": (r"(?<=\w\w\w)(?:es|s)\b", ""),  # glasses
    "es": (r"(?:a|as|os)\b", "o"),
    "pt": (r"(?:o|os|as)\b", "a"),
    "fr": (r"(?<=[^e\W])s?\b", "e"),
}


@dataclass(frozen=True)
class Claim:
    """One concrete thing that a rationale says.

    Attributes:
        kind: One of `KINDS`.
        text: As it is compared: a number's digits, a quotation or brand as written, an attribute's English name.
        grounded: Whether query or title, or what is known of the product, has it.
    """

    kind: str
    text: str
    grounded: bool


@dataclass(frozen=True)
class Source:
    """What a rationale may draw on.

    Attributes:
        query: As typed.
        title: As written.
        locale: Whose words they are in.
        brand: Of the product, where the data knows it.
        facts: More that is known: for the bazaar every value of the structures behind the pair.
    """

    query: str
    title: str
    locale: str
    brand: str | None = None
    facts: Sequence[str] = field(default=())

    @property
    def text(self) -> str:
        """Everything together."""
        return "\n".join(filter(None, [self.query, self.title, self.brand, *self.facts]))


def claims(rationale: str, source: Source, brands: Collection[str] = ()) -> list[Claim]:
    """List the claims of a rationale, each once.

    Args:
        rationale: In whatever language.
        source: The pair.
        brands: The brands that could be named, as written; the caller leaves out those that are ordinary words.

    >>> pair = Source("aro 12 case", "Funda negra para Aro 12", "es")
    >>> [(c.text, c.grounded) for c in claims("A black case for the Aro 12, not the “Aro 13”.", pair)]
    [('12', True), ('13', False), ('Aro 13', False), ('black', True)]
    """
    text = unicodedata.normalize("NFKC", rationale)
    own = unicodedata.normalize("NFKC", source.text)
    numbers, own_key = _numbers(own) | _worded(own), f" {normalise(own)} "
    found = [Claim("number", number, number in numbers) for number in sorted(_numbers(text), key=text.find)]
    for quotation in dict.fromkeys(_QUOTED.findall(text)):
        parts = [normalise(part) for part in re.split(r"\.\.\.|…", quotation)]
        found.append(Claim("quoted", quotation, all(part in own_key for part in parts if part)))
    # Words first: a look at each of thousands of brands would take a second a rationale.
    spans = _spans(text)
    for brand in sorted(spans & set(brands)):
        found.append(Claim("brand", brand, _bare(brand) in _bare(own)))
    found += _attributes(text, source, own)
    return found


def facts_of(ask: Ask, offer: Offer) -> tuple[str, ...]:
    """List what the structures behind a pair of the bazaar know, in the words that its teacher uses.

    >>> from recipes.data.bazaar_rules import Ask, Offer
    >>> facts_of(Ask(("tent",), excluded={"colour": "red"}), Offer("tarp", attributes={"persons": ("2",)}))
    ('tent', 'red', 'tarp', '2')
    """
    wanted = (*ask.categories, *ask.hosts, ask.brand, ask.family, ask.model, ask.fits_brand, ask.fits_model)
    held = (offer.category, offer.host, offer.brand, offer.family, offer.model, offer.fits_brand, offer.bundled)
    values = (*wanted, *ask.attributes.values(), *ask.excluded.values(), *held, *offer.fits_models)
    return tuple(value for value in (*values, *(v for vs in offer.attributes.values() for v in vs)) if value)


def named_verdicts(rationale: str, schema: LabelSchema, own_words: str = "") -> list[str]:
    """List the classes that a rationale names as a verdict, as `recipes.rationales.strip` understands it.

    >>> from recipes.schemas import load_labels
    >>> named_verdicts("The exact size is met. So it is a Substitute.", load_labels("esci"))
    ['Substitute']
    """
    alone = [LabelSchema(label.name, [label], []) for label in schema.labels]
    text = rationale.strip()
    return [one.name for one in alone if _mentions(text, one) and strip_label_names(text, one, own_words) != text]


def _mentions(text: str, schema: LabelSchema) -> bool:
    """Say whether a spelling of a class is in a text at all: a quick look before the slow one."""
    spellings = [spelling for label in schema.labels for spelling in (label.name, *label.aliases)]
    letters = {spelling for spelling in spellings if len(spelling) == 1}
    folded = text.casefold()
    return bool(letters & set(re.findall(r"\b\w\b", text))) or any(
        spelling.casefold() in folded for spelling in spellings if spelling not in letters
    )


def proper_brands(brands: Iterable[str], rationales: Iterable[str]) -> set[str]:
    """Leave out the brands that are ordinary words: those that rationales also write in small letters.

    >>> sorted(proper_brands(["Acme", "Original", "3M"], ["An Original Acme, as original as can be."]))
    ['Acme']
    """
    written: set[str] = set()
    for rationale in rationales:
        written |= _spans(rationale)
    cased = {brand for brand in brands if len(brand) > 2 and brand != brand.casefold()}
    return {brand for brand in cased if brand.casefold() not in written}


def _spans(text: str, longest: int = 4) -> set[str]:
    """Return every run of up to `longest` words, as written."""
    words = [word.strip(".,;:!?()[]\"“”'’「」") for word in re.sub(r"['’]s\b", "", text).split()]
    return {" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)}


def _bare(text: str) -> str:
    """Leave out case, accents and all that is no letter or digit: TRESemmé is tresemme, BiteNot is bite not."""
    letters = unicodedata.normalize("NFD", text.casefold())
    return "".join(letter for letter in letters if letter.isalnum())


def _numbers(text: str) -> set[str]:
    """Return the numbers of a text, 1,500 and 1500 and 1500.0 as one."""
    plain = (number.replace(",", "") for number in _NUMBER.findall(text))
    return {re.sub(r"\.0+$", "", number).lstrip("0") or "0" for number in plain}


def _worded(text: str) -> set[str]:
    folded = text.casefold()
    return {number for word, number in _NUMBER_WORDS.items() if find_word(folded, word)}


def _attributes(text: str, source: Source, own: str) -> list[Claim]:
    languages = dict.fromkeys(["en", words_of(source.locale) or "en"])

    def meanings(of: str) -> set[tuple[str, str]]:
        found = {meaning for language in languages for _, meaning in stated(of, language)}
        return {(value, kind) for value, kind in found if kind in _ATTRIBUTES and value not in _AMBIGUOUS}

    own = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", own)  # DarkGray
    for language, form in _FORMS.items():
        if language in languages:
            own = f"{own}\n{re.sub(*form, own)}"
    catalogue = load_catalogue()
    known = {(value, kind) for narrow, kind in meanings(own) for value in catalogue.broader(kind, narrow)}
    known |= {(fact, kind) for fact in source.facts for kind in _ATTRIBUTES}
    return [Claim("attribute", value, (value, kind) in known) for value, kind in sorted(meanings(text))]
