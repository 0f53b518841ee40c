"""Business rules and few-shot examples: YAML that a search team edits, read strictly.

A key that is not known, a key given twice, a missing one, or a label outside the schema is an error that names the file
and the entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from recipes.arguments import UserError, build, check_keys
from recipes.schemas import PERSPECTIVES, LabelSchema

T = TypeVar("T")
RECIPES = Path(__file__).parents[1]
RULES_FOLDER = RECIPES / "rules"
EXAMPLES_FOLDER = RECIPES / "prompts" / "examples"


@dataclass
class Rule:
    """One business rule: "if `when`, then `then` (`label`)".

    Attributes:
        name: Short and unique; the model refers to it.
        when: The condition, read after "if".
        then: The consequence, read after "then".
        label: The label that follows; None where the rule only says how to read a text.
        locales: Only pairs of these locales see it; empty: all do.
    """

    name: str
    when: str
    then: str
    label: str | None = None
    locales: list[str] = field(default_factory=list)


@dataclass
class Case:
    """One few-shot example: the same judgement in several locales.

    Attributes:
        label: What is right.
        pairs: Locale -> `query` and `product_title`.
        rationales: Perspective -> why, for each of the three perspectives.
    """

    label: str
    pairs: dict[str, dict[str, str]]
    rationales: dict[str, str]


@dataclass
class _RulesFile:
    labels: str
    rules: list[Any]


@dataclass
class _ExamplesFile:
    labels: str
    default_locale: str
    cases: list[Any]


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error: a forgotten "- " would lose a rule without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_rules(name_or_path: str, schema: LabelSchema) -> tuple[Rule, ...]:
    """Load business rules by their name in `recipes/rules` or by the path of a YAML file.

    Raises:
        UserError: No such file, or it is not a rules file for this label schema.
    """
    path = _find(name_or_path, RULES_FOLDER, "business rules")
    content = _entry(_RulesFile, _read(path), path)
    _check_schema(content.labels, schema, path)
    rules = [_entry(Rule, values, f"{path}: rule {number}") for number, values in enumerate(content.rules, 1)]
    if not rules:
        raise UserError(f"{path}: `rules` is empty; expected at least one.")
    for number, rule in enumerate(rules, 1):
        if rule.label is not None:
            rule.label = _label(rule.label, schema, f"{path}: rule {number} ({rule.name})")
        if rule.name in [other.name for other in rules[: number - 1]]:
            raise UserError(f"{path}: rule {number}: the name {rule.name!r} is taken; give each rule its own.")
    return tuple(rules)


def load_cases(name_or_path: str, schema: LabelSchema) -> tuple[tuple[Case, ...], str]:
    """Load few-shot examples by their name in `recipes/prompts/examples` or by the path of a YAML file.

    Returns:
        The cases, and the locale whose texts are shown for locales that have none.

    Raises:
        UserError: No such file, or it is not an examples file for this label schema.
    """
    path = _find(name_or_path, EXAMPLES_FOLDER, "few-shot examples")
    content = _entry(_ExamplesFile, _read(path), path)
    _check_schema(content.labels, schema, path)
    cases = [_entry(Case, values, f"{path}: case {number}") for number, values in enumerate(content.cases, 1)]
    for number, case in enumerate(cases, 1):
        place = f"{path}: case {number}"
        case.label = _label(case.label, schema, place)
        if set(case.rationales) != set(PERSPECTIVES):
            raise UserError(
                f"{place}: `rationales` has {', '.join(case.rationales)}; expected {', '.join(PERSPECTIVES)}."
            )
        for locale, texts in case.pairs.items():
            if set(texts) != {"query", "product_title"}:
                raise UserError(f"{place}, {locale}: found {', '.join(texts)}; expected query and product_title.")
        if content.default_locale not in case.pairs:
            raise UserError(f"{place}: no pair for the default locale {content.default_locale!r}.")
    if not cases:
        raise UserError(f"{path}: `cases` is empty; expected at least one, or pass no examples.")
    return tuple(cases), content.default_locale


def _find(name_or_path: str, folder: Path, what: str) -> Path:
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else folder / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"{what} {name_or_path!r}: no such file. Known: {known}, or the path of a YAML file.")
    return path


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _entry(cls: type[T], values: Any, source: str | Path) -> T:
    """Build a dataclass from a mapping whose keys are its fields, no more and no fewer."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: expected `key: value` lines, found a {type(values).__name__}.")
    check_keys(cls, values, source)
    for name in [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]:
        if name not in values:
            raise UserError(f"{source}: the key {name!r} is missing.")
        if isinstance(values[name], str) and not values[name].strip():
            raise UserError(f"{source}: {name!r} is blank; expected some text.")
    return build(cls, values, source)


def _check_schema(labels: str, schema: LabelSchema, path: Path) -> None:
    if labels != schema.name:
        raise UserError(
            f"{path}: written for the label schema {labels!r}, used with {schema.name!r}. Pass another file."
        )


def _label(spelling: str, schema: LabelSchema, place: str) -> str:
    name = schema.canonical(spelling)
    if name is None:
        raise UserError(f"{place}: label {spelling!r} is not in the schema {schema.name!r}: {', '.join(schema.names)}.")
    return name
