"""The card of a rationale dataset: what a person states, what was measured and recorded, and the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_cards.facts import LANGUAGE, NO_LANGUAGES, CardError
from hub_cards.render import Markdown, card, code, render

if TYPE_CHECKING:
    from datasets import DatasetInfo
    from huggingface_hub import DatasetCardData


@dataclass(frozen=True)
class DatasetStatement:
    """What only a person can state of a dataset, from the YAML file of `--facts`.

    Attributes:
        pretty_name: Title of the card.
        authors: Who publishes it.
        license: As the Hub writes it (`apache-2.0`, `cc-by-4.0` ...).
        synthetic: Whether a program made the pairs: then the card says so before anything else.
        summary: What it is, in a paragraph of markdown.
        source: Where queries and titles come from (markdown).
        labels_made: Who or what judged the pairs, and by which rules (markdown).
        source_datasets: `original`, or `extended|NAME` of a dataset on the Hub.
        annotations_creators: As the Hub lists them: machine-generated, expert-generated ...
        languages: Locale -> ISO 639 code of its language, for every locale of the pairs.
        tags: For the Hub's search.
        task_categories: As the Hub lists them.
        intended_use: What it is for.
        out_of_scope_use: What it is not for.
        limits: Known limits, one a line of the list.
        business_rules: Which business rules shaped labels and reasoning, and whom they may disadvantage.
        citation: BibTeX.
        steps: The commands that made it, where a stage left no report of its own.
        teacher: Who wrote the rationales and how, where the completions lack model, sampling or prompt_hash.
    """

    pretty_name: str
    authors: list[str]
    license: str
    synthetic: bool
    summary: str
    source: str
    labels_made: str
    source_datasets: list[str]
    annotations_creators: list[str]
    languages: dict[str, str]
    tags: list[str]
    task_categories: list[str]
    intended_use: str
    out_of_scope_use: str
    limits: list[str]
    business_rules: str
    citation: str
    steps: list[str] | None = None
    teacher: str | None = None

    def check(self, source: str | Path) -> None:
        """Refuse what a card cannot state.

        Args:
            source: The file it was read from, for the message.

        Raises:
            CardError: A fact is empty, or a language is none.
        """
        for fact in fields(self):
            value = getattr(self, fact.name)
            parts = [value] if isinstance(value, str) else value
            if not isinstance(value, bool | None) and not (parts and all(part.strip() for part in parts)):
                raise CardError(f"{source}: {fact.name!r} is empty. Write it there: no run can know it.")
        for locale, language in self.languages.items():
            if language in NO_LANGUAGES or not LANGUAGE.fullmatch(language):
                raise CardError(f"{source}: 'languages', {locale}: {language!r} is no ISO 639 code, such as 'en'.")


@dataclass(frozen=True)
class DatasetFacts:
    """What the card of a dataset states.

    Attributes:
        repo_id: Where it will be on the Hub.
        statement: What a person states.
        languages: ISO codes of the pairs' languages.
        infos: Configuration -> features and sizes, as `datasets` knows them.
        configurations: Configuration -> `one_row` (what a row is) and `columns` (name, type, meaning).
        labels: Name, gain and definition of each class.
        measured: What `recipes.publish.dataset_statistics.statistics` returns.
        plots: File in figures/ -> what it shows.
        example: `query`, `product_title`, `locale`, `label`, `rationales` (perspective, text, verdict) of one pair.
        selection: Sentences on which completions are published; empty where `steps` of the statement say it.
        teacher: Who wrote the rationales: rows of perspective, model, sampling, hash of the prompt; or a text.
        encoder: Name of the frozen encoder of rationales.
        encoder_revision: Its commit, or the digest of its weights.
        embedding_size: Numbers an embedding.
        steps: Commands that made it, in their order.
        code_commit: Of the checkout that packaged it.
        inputs: File -> sha256 of what it was made of.
    """

    repo_id: str
    statement: DatasetStatement
    languages: Sequence[str]
    infos: Mapping[str, DatasetInfo]
    configurations: Mapping[str, Mapping[str, Any]]
    labels: Sequence[tuple[str, float, str]]
    measured: Mapping[str, Any]
    plots: Mapping[str, str]
    example: Mapping[str, Any]
    selection: Sequence[str]
    teacher: Sequence[tuple[str, ...]] | str
    encoder: str
    encoder_revision: str
    embedding_size: int
    steps: Sequence[str]
    code_commit: str
    inputs: Mapping[str, str]


def dataset_card(facts: DatasetFacts) -> str:
    """Render the card of a dataset.

    Raises:
        CardError: The metadata is not what the Hub takes.
    """
    return card(_metadata(facts), render("dataset.md.jinja", facts=facts, statement=facts.statement, **_tables(facts)))


def _tables(facts: DatasetFacts) -> dict[str, Any]:
    """Lay out the rows of the card's tables."""
    measured, agreement, example = facts.measured, facts.measured["agreement"], facts.example

    def counts(table: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
        return [[name, *(f"{count:,}" for count in row.values())] for name, row in table.items()]

    def percent(*shares: Mapping[str, float]) -> list[str]:
        return [f"{100 * share:.1f}" for group in shares for share in group.values()]

    rows = {name: {s.name: s.num_examples for s in info.splits.values()} for name, info in facts.infos.items()}
    return {
        "splits": list(measured["splits"]),
        "configuration_rows": [
            [code(name), told["one_row"], *(f"{rows[name][split]:,}" for split in measured["splits"])]
            for name, told in facts.configurations.items()
        ],
        "example_rows": [
            *((name, example[name]) for name in ("query", "product_title", "locale", "label")),
            *((name, f"{text} → {verdict or 'no verdict'}") for name, text, verdict in example["rationales"]),
        ],
        # Columns that several configurations share are shown once.
        "columns": {
            Markdown(", ".join(map(code, names))): [(code(name), *rest) for name, *rest in columns]
            for columns, names in _same_columns(facts.configurations).items()
        },
        "split_rows": counts(measured["splits"]),
        "label_rows": counts(measured["labels"]),
        "locale_rows": counts(measured["locales"]),
        "length_rows": [[name, *map("{:g}".format, row.values())] for name, row in measured["lengths"].items()],
        "right_rows": [
            *(
                [name, *percent(right, agreement["accuracy_by_label"][name])]
                for name, right in agreement["right_by_label"].items()
            ),
            ["all pairs", *percent(agreement["right"], agreement["accuracy"])],
        ],
        "kappa_rows": [
            [name, *("–" if kappa[name] is None else f"{kappa[name]:.2f}" for kappa in agreement["kappa"].values())]
            for name in ("overall", *measured["labels"])
        ],
        "another_label": f"{100 * measured['predict_another_label'] / measured['rationales']:.1f}",
        "input_rows": [(name, code(digest)) for name, digest in facts.inputs.items()],
    }


def _same_columns(configurations: Mapping[str, Mapping[str, Any]]) -> dict[tuple[tuple[str, ...], ...], list[str]]:
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for name, told in configurations.items():
        groups.setdefault(tuple(told["columns"]), []).append(name)
    return groups


def _metadata(facts: DatasetFacts) -> DatasetCardData:
    """Declare configurations, features and sizes as `datasets` itself does."""
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    statement = facts.statement
    data = DatasetCardData(
        pretty_name=statement.pretty_name,
        license=statement.license,
        language=list(facts.languages),
        task_categories=statement.task_categories,
        size_categories=size_category(sum(counts["pairs"] for counts in facts.measured["splits"].values())),
        annotations_creators=statement.annotations_creators,
        source_datasets=statement.source_datasets,
        tags=[*statement.tags, *(["synthetic"] if statement.synthetic else [])],
    )
    DatasetInfosDict(facts.infos).to_dataset_card_data(data)
    files: dict[str, dict[str, Any]] = {
        name: {"data_files": [{"split": split, "path": f"{name}/{split}.parquet"} for split in info.splits]}
        for name, info in facts.infos.items()
    }
    files["pairs"]["default"] = True
    MetadataConfigs(files).to_dataset_card_data(data)
    return data


def size_category(rows: int) -> str:
    """Return the Hub's name for a size.

    Example:
        >>> size_category(999), size_category(20_000), size_category(2_000_000)
        ('n<1K', '10K<n<100K', '1M<n<10M')
    """
    names = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    return next((name for bound, name in names.items() if rows < bound), "10M<n<100M")
