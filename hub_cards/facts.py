"""What a card may state, and where each fact comes from.

Two sources only: records that runs write (`training.json`, `metrics.json`), read with `need`, and a `Statement`, the
YAML file of a person for what no run can know. Nothing has a default that would be a claim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# huggingface_hub's own pattern also takes names without an owner; nothing of ours is published without one.
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual")
# Locales of marketplaces that are no language codes: the mistake is easily made.
NO_LANGUAGES = {"us": "en", "uk": "en", "jp": "ja", "kr": "ko", "br": "pt", "cn": "zh"}


class CardError(ValueError):
    """A card cannot be made from these facts; the message says what to do."""


class MissingFact(CardError):
    """A fact that a card states is in no record.

    Args:
        fact: Its name in the record, e.g. `environment.cpu`.
        file: The file it should have come from.
        command: What records it.
    """

    def __init__(self, fact: str, file: str | Path, command: str) -> None:
        super().__init__(f"{file}: lacks {fact!r}, which the card states. {command} records it.")


def need(record: Mapping[str, Any], fact: str, file: str | Path, command: str) -> Any:
    """Return a fact of a record.

    Args:
        record: The content of `file`.
        fact: Keys with dots between them.
        file: For the message.
        command: What records the fact, for the message.

    Raises:
        MissingFact: It is not there, or null.
    """
    value: Any = record
    for key in fact.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            raise MissingFact(fact, file, command)
    return value


@dataclass(frozen=True)
class Statement:
    """What only a person can state, from the YAML file of `--facts` (example: recipes/configs/publish/).

    Attributes:
        authors: Who publishes it.
        license: Licence of what is published, as the Hub writes it (`apache-2.0`, `cc-by-4.0`, `other`...).
        languages: ISO 639 codes (`en`, `ja`), not locales of a marketplace (`us`, `jp`).
        dataset_name: Name of the data, for readers.
        intended_use: What it is for.
        out_of_scope_use: What it is not for.
        limits: Known limits, one a line of the list.
        business_rules: Which business rules shaped labels and reasoning, and whom they may disadvantage.
        citation: BibTeX.
        example_query: A query for the usage snippets.
        example_products: Two or more product titles for it.
        dataset_id: Hub id of the data, where it is there.
        dataset_revision: Commit of it on the Hub.
        base_model: Hub id of the base model, where the run was given a local folder.
        base_revision: Commit of it that the folder is a copy of (an adapter's card states it).
        code_url: Where the code of `code_commit` is.
    """

    authors: list[str]
    license: str
    languages: list[str]
    dataset_name: str
    intended_use: str
    out_of_scope_use: str
    limits: list[str]
    business_rules: str
    citation: str
    example_query: str
    example_products: list[str]
    dataset_id: str | None = None
    dataset_revision: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    code_url: str | None = None

    def check(self, source: str | Path) -> None:
        """Refuse what a card cannot state.

        Args:
            source: The file it was read from, for the message.

        Raises:
            CardError: A text or list is empty, a language is none, an id is none.
        """
        for name in ("authors", "license", "languages", "dataset_name", "intended_use", "out_of_scope_use", "limits",
                     "business_rules", "citation", "example_query"):  # fmt: skip
            value = getattr(self, name)
            if not value or not all(part.strip() for part in ([value] if isinstance(value, str) else value)):
                raise CardError(f"{source}: {name!r} is empty. Write it there: no run can know it.")
        if len(self.example_products) < 2:
            raise CardError(f"{source}: 'example_products': expected two titles or more, for the snippets.")
        for language in self.languages:
            if language in NO_LANGUAGES or not LANGUAGE.fullmatch(language):
                hint = f" Did you mean {NO_LANGUAGES[language]!r}?" if language in NO_LANGUAGES else ""
                raise CardError(f"{source}: 'languages': {language!r} is no ISO 639 code, such as 'en'.{hint}")
        for name in ("dataset_id", "base_model"):
            value = getattr(self, name)
            if value is not None and not REPO_ID.fullmatch(value):
                raise CardError(f"{source}: {name!r}: {value!r} is no Hub id, such as 'org/name'.")
        if self.code_url is not None and not re.fullmatch(r"https://[^\s<>()\[\]\"]+", self.code_url):
            raise CardError(f"{source}: 'code_url': {self.code_url!r} is no https address.")


@dataclass(frozen=True)
class BaseModel:
    """The pretrained model that was tuned: its Hub id, and the commit or the digest of its weights."""

    id: str
    revision: str | None
    weights_sha256: str | None


@dataclass(frozen=True)
class Hardware:
    """Where a run ran, from `recipes.record.environment`."""

    device: str
    threads: int
    python: str
    packages: Mapping[str, str]

    @classmethod
    def read(cls, environment: Mapping[str, Any], file: str | Path, command: str) -> Hardware:
        """Read the record of an environment.

        Raises:
            MissingFact: It was written before it held what a card states.
        """
        cpu = need(environment, "cpu", f"{file}: environment", command)
        return cls(
            device=environment.get("accelerator") or cpu,
            threads=need(environment, "cpu_threads", f"{file}: environment", command),
            python=need(environment, "python", f"{file}: environment", command),
            packages=need(environment, "packages", f"{file}: environment", command),
        )


@dataclass(frozen=True)
class Score:
    """One metric of one slice, as a share; `interval` where there is one to speak of."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Slice:
    """Overall, one locale, or one perspective."""

    name: str
    rows: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        split: Of the data.
        pairs_sha256: Digest of the file of that split.
        date: When, ISO 8601.
        slices: Overall first.
        conventions: Metric -> how it is computed.
        draws: Bootstrap draws of the intervals; None: there are none.
        seed: Of the draws.
        per_class: Class -> precision, recall, f1, support.
        figures: Path in the repository -> what it shows.
    """

    split: str
    pairs_sha256: str
    date: str
    slices: Sequence[Slice]
    conventions: Mapping[str, str]
    draws: int | None = None
    seed: int | None = None
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)

    @property
    def majority(self) -> tuple[str, float] | None:
        """The most frequent class and the accuracy of always answering it."""
        if not self.per_class:
            return None
        name = max(self.per_class, key=lambda label: self.per_class[label]["support"])
        return name, self.per_class[name]["support"] / sum(values["support"] for values in self.per_class.values())


@dataclass(frozen=True)
class BiasAudit:
    """What an audit by brand found.

    Attributes:
        split: Of the data.
        filtered: What counts as filtered.
        swaps: Brands that were exchanged in titles whose query names none.
        swapped_pairs: In so many pairs.
        change: Of the expected gain by a swap, in size.
        decision_flips: Swaps after which a product is filtered that was not, or the reverse.
        filtered_wrongly: Share of relevant products that are filtered.
        brands: How many brands had enough relevant products to be compared with the others.
        differing: Those that differ, p below 0.05 after Holm: brand -> share filtered.
        third_party: Relevant third-party accessories filtered minus first-party ones filtered; None: too few.
    """

    split: str
    filtered: str
    swaps: int
    swapped_pairs: int
    change: Score | None
    decision_flips: Score | None
    filtered_wrongly: Score
    brands: int
    differing: Mapping[str, float]
    third_party: Score | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What the cards of a student and of an adapter share.

    Attributes:
        repo_id: Where it will be on the Hub.
        statement: What a person states.
        base: What was tuned.
        data_sha256: File -> digest of what it was trained on.
        settings: Option of the training command -> value.
        code_commit: Of the checkout that trained it.
        hardware: That trained it.
        train_seconds: How long that took.
        evaluation: What it scores.
    """

    repo_id: str
    statement: Statement
    base: BaseModel
    data_sha256: Mapping[str, str]
    settings: Mapping[str, Any]
    code_commit: str
    hardware: Hardware
    train_seconds: float
    evaluation: Evaluation

    @property
    def name(self) -> str:
        """The repository's own name."""
        return self.repo_id.partition("/")[2]


@dataclass(frozen=True)
class Calibration:
    """How a student was calibrated.

    Attributes:
        method: `temperature` or `vector`.
        ece_before: Expected calibration error on test, before.
        ece_after: The same after.
        confidence: At which validation keeps the targets.
        boundaries: Threshold, target, and the share of relevant products below it on validation and on test.
    """

    method: str
    ece_before: float
    ece_after: float
    confidence: float
    boundaries: Sequence[tuple[float, float, float | None, float | None]]


@dataclass(frozen=True)
class StudentFacts(ModelFacts):
    """A student.

    Attributes:
        parameters: Number of weights.
        extractor_type: Of the configuration.
        labels: Class names in the order of the logits.
        gains: Gain of each class.
        train_rows: Pairs it was trained on.
        guided_rows: Of those, pairs with an embedded rationale.
        pairs_per_second: In the evaluation.
        scoring: What the evaluation ran on.
        tasks: Pipelines that it brings.
        has_ranking_view: It can show one score a pair, for `CrossEncoder.rank`.
        has_calibration: calibration.json is in the repository.
        calibration: What it records, where recipes.evaluate.calibrate wrote it for these weights.
        logit_adjustment: τ by which recipes.evaluate.adjust took the classes' shares off its logits; None: it did not.
        separate_layers: Of the configuration: layers that read query and product apart.
        onnx: ONNX files in the repository.
        bias: What an audit by brand found, where there was one.
    """

    parameters: int
    extractor_type: str
    labels: Sequence[str]
    gains: Sequence[float]
    train_rows: int
    guided_rows: int
    pairs_per_second: float
    scoring: Hardware
    tasks: Sequence[str] = ()
    has_ranking_view: bool = False
    has_calibration: bool = False
    calibration: Calibration | None = None
    logit_adjustment: float | None = None
    separate_layers: int = 0
    onnx: Sequence[str] = ()
    bias: BiasAudit | None = None


@dataclass(frozen=True)
class AdapterFacts(ModelFacts):
    """A teacher's LoRA adapter.

    Attributes:
        lora: Field of `adapter_config.json` -> value: rank, alpha, dropout, target modules.
        messages: A chat as it was trained on, for the snippet.
    """

    lora: Mapping[str, Any]
    messages: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class MetricFacts:
    """The metric module.

    Attributes:
        repo_id: Of the Space it will be in.
        statement: What a person states.
        inputs: Its documented inputs and outputs, as the module itself states them.
        description: What the module says it is.
        code_commit: Of the checkout it comes from.
        requirements: Lines of requirements.txt.
    """

    repo_id: str
    statement: Statement
    inputs: str
    description: str
    code_commit: str
    requirements: Sequence[str]

    @property
    def name(self) -> str:
        """The name that `evaluate.load` looks for."""
        return self.repo_id.partition("/")[2]
