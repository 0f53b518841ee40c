"""Render cards: facts in, the text of README.md out.

Everything that a template prints is escaped for markdown and HTML unless a filter here has made it `Markdown`: a
title, a label or a name can never become a heading, a link, a tag or a table cell of its own.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_cards.facts import AdapterFacts, CardError, Evaluation, MetricFacts, Score, StudentFacts

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment

PAPER = "2601.21611"
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1", "ndcg": "nDCG", "ece": "ECE"}
# The Hub's names of the same.
_HUB_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "ndcg": "ndcg", "ece": "ece"}
# What markdown acts on anywhere; what it acts on at the start of a line; what it turns into links by itself.
_ANYWHERE = re.compile(r"([\\`*_\[\]|~$]|:(?=//)|(?<=\bwww)\.)", re.IGNORECASE)
_AT_START = re.compile(r"^(\d*)([.)+#=-])(?=[\s#=-]|$)")


class Markdown(str):
    """Text that is markdown already and is printed as it is."""

    __slots__ = ()


def escape(text: Any) -> Markdown:
    r"""Return text that reads the same when rendered, whatever it holds; white space becomes one space.

    Example:
        >>> escape("<b>USB|C</b>\n# 5")
        '&lt;b&gt;USB\\|C&lt;/b&gt; # 5'
    """
    if isinstance(text, Markdown):
        return text
    line = _ANYWHERE.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
    return Markdown(_AT_START.sub(r"\1\\\2", line))


def paragraphs(text: str) -> Markdown:
    """Escape a longer text, blank lines kept as breaks between paragraphs."""
    return Markdown("\n\n".join(escape(part) for part in re.split(r"\n\s*\n", text.strip())))


def code(text: Any) -> Markdown:
    """Show a name or number in code type; what could leave the code span is escaped as text instead."""
    return Markdown(f"`{text}`") if re.fullmatch(r"[\w ./:@=+,%-]+", str(text)) else escape(text)


def fence(text: str, language: str = "") -> Markdown:
    """Show a text as a block that no line of it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return Markdown(f"{ticks}{language}\n{text.strip()}\n{ticks}")


def python(value: Any) -> Markdown:
    """Write a value as a Python literal of one line that cannot close the code block."""
    return Markdown(json.dumps(value, ensure_ascii=False).replace("`", "\\u0060"))


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Markdown:
    """Lay out a table, every cell escaped."""
    lines = [[escape(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, [Markdown("---")] * len(header))
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def results(evaluation: Evaluation, first: str) -> Markdown:
    """Lay out the scores of every slice × 100, the interval behind each that has one."""
    names = [name for name in METRICS if any(name in part.scores for part in evaluation.slices)]
    rows = [
        [part.name, f"{part.rows:,}", *(_cell(part.scores.get(name)) for name in names)] for part in evaluation.slices
    ]
    return table([first, "pairs", *(METRICS[name] for name in names)], rows)


def _cell(score: Score | None) -> Markdown:
    if score is None:
        return Markdown("–")
    ends = "" if score.interval is None else f" [{100 * score.interval[0]:.1f}, {100 * score.interval[1]:.1f}]"
    return Markdown(f"{100 * score.value:.1f}{ends}")


def duration(seconds: float) -> str:
    """Write a time as a person would.

    Example:
        >>> duration(42.4), duration(754), duration(9000)
        ('42 s', '12.6 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code,
        "fence": fence,
        "paragraphs": paragraphs,
        "python": python,
        "raw": Markdown,
        "score": _cell,
    }
    environment.globals |= {"table": table, "results": results, "paper": PAPER}
    return environment


def render(template: str, **values: Any) -> str:
    """Render a template of this package; a name that it does not get is an error.

    Raises:
        jinja2.UndefinedError: The template uses a value that is not given.
    """
    text = _environment().get_template(template).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def student_card(facts: StudentFacts) -> str:
    """Render the card of a student.

    Raises:
        CardError: The metadata is not what the Hub takes.
    """
    guided = facts.guided_rows > 0
    tags = ["lrkd", "cross-encoder", "e-commerce", "relevance", "text-ranking"]
    data = _metadata(
        facts,
        pipeline_tag="text-classification",
        library_name="transformers",
        relation="finetune",
        tags=tags + (["knowledge-distillation", "chain-of-thought"] if guided else []),
        task=("text-classification", "Query-product relevance"),
    )
    body = render(
        "student.md.jinja",
        facts=facts,
        statement=facts.statement,
        guided=guided,
        class_gains=list(zip(facts.labels, facts.gains, strict=True)),
        calibrated_tiers=_calibrated_tiers(facts),
        slice_title="locale",
        **_tables(
            facts,
            [
                ("parameters", f"{facts.parameters:,}"),
                ("pairs", f"{facts.train_rows:,}, of them {facts.guided_rows:,} with embedded reasoning"),
            ],
        ),
    )
    return card(data, body)


def _calibrated_tiers(facts: StudentFacts) -> list[tuple[str, ...]]:
    """Return a row a boundary between tiers: what lies below, its expected gain, the target, and what is lost."""
    boundaries = facts.calibration.boundaries if facts.calibration else ()

    def share(value: float | None) -> str:
        return "none is relevant" if value is None else f"{100 * value:.2f} %"

    return [
        (f"0 to {number}" if number else "0", f"{threshold:.4f}", *map(share, shares))
        for number, (threshold, *shares) in enumerate(boundaries)
    ]


def adapter_card(facts: AdapterFacts) -> str:
    """Render the card of a teacher's LoRA adapter.

    Raises:
        CardError: The metadata is not what the Hub takes.
    """
    data = _metadata(
        facts,
        pipeline_tag="text-generation",
        library_name="peft",
        relation="adapter",
        tags=["lrkd", "lora", "e-commerce", "relevance", "chain-of-thought"],
        task=("text-generation", "Query-product relevance, with reasoning"),
    )
    body = render(
        "adapter.md.jinja",
        facts=facts,
        statement=facts.statement,
        slice_title="perspective",
        **_tables(facts, []),
    )
    return card(data, body)


def metric_card(facts: MetricFacts) -> str:
    """Render the card of the metric module: the README of a Space, as modules of `evaluate` have."""
    from huggingface_hub import SpaceCardData

    data = SpaceCardData(
        title=facts.name,
        emoji="⚖️",
        colorFrom="indigo",
        colorTo="green",
        sdk="static",
        app_file="index.html",
        license=facts.statement.license,
        pinned=False,
        tags=["evaluate", "metric"],
        short_description="Accuracy, macro-F1, nDCG and ECE of relevance",  # the Hub takes 60 characters
    )
    return card(data, render("metric.md.jinja", facts=facts, statement=facts.statement))


def metric_page(facts: MetricFacts) -> str:
    """Render the page that the metric's Space shows."""
    name, repo_id = html.escape(facts.name), html.escape(facts.repo_id)
    description = html.escape(" ".join(facts.description.split()))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        "<style>body{font:16px/1.5 system-ui;max-width:50rem;margin:2rem auto;padding:0 1rem}"
        "pre{overflow:auto}</style>\n"
        f"<h1>{name}</h1>\n<p>{description}</p>\n"
        f'<pre>import evaluate\n\nmetric = evaluate.load("{repo_id}")</pre>\n'
        f"<pre>{html.escape(facts.inputs.strip())}</pre>\n</html>\n"
    )


def _tables(facts: StudentFacts | AdapterFacts, more: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the rows of the tables that both model cards have."""
    statement, base, hardware = facts.statement, facts.base, facts.hardware
    base_facts = [("revision", base.revision), ("sha256 of its weights", base.weights_sha256)]
    data = statement.dataset_name
    if statement.dataset_id is not None:
        data += f" ({statement.dataset_id}{f' at {statement.dataset_revision}' if statement.dataset_revision else ''})"
    versions = ", ".join(f"{name} {version}" for name, version in hardware.packages.items())
    where = "" if statement.code_url is None else f" of {statement.code_url}"
    return {
        "class_scores": [
            [name, *(f"{100 * values[key]:.1f}" for key in ("precision", "recall", "f1")), f"{values['support']:,}"]
            for name, values in facts.evaluation.per_class.items()
        ],
        "training_table": [
            ("base model", base.id),
            *((f"base model, {name}", code(value)) for name, value in base_facts if value is not None),
            ("data", data),
            *((f"sha256 of {name}", code(digest)) for name, digest in facts.data_sha256.items()),
            (f"sha256 of the {facts.evaluation.split} split", code(facts.evaluation.pairs_sha256)),
            *more,
            ("code commit", f"{facts.code_commit}{where}"),
            ("hardware", f"{hardware.device}, threads: {hardware.threads}"),
            ("training time", duration(facts.train_seconds)),
            ("software", f"Python {hardware.python}, {versions}"),
            ("evaluated", facts.evaluation.date),
        ],
        "settings_table": [(code(name), code(value)) for name, value in sorted(facts.settings.items())],
    }


def _metadata(
    facts: StudentFacts | AdapterFacts,
    pipeline_tag: str,
    library_name: str,
    relation: str,
    tags: list[str],
    task: tuple[str, str],
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    statement = facts.statement
    return ModelCardData(
        language=sorted(statement.languages),
        license=statement.license,
        library_name=library_name,
        pipeline_tag=pipeline_tag,
        base_model=facts.base.id,
        base_model_relation=relation,
        datasets=None if statement.dataset_id is None else [statement.dataset_id],
        metrics=[_HUB_METRICS[name] for name in METRICS if name in facts.evaluation.slices[0].scores],
        tags=tags,
        model_name=facts.name,
        eval_results=list(_eval_results(facts, *task)),
    )


def _eval_results(facts: StudentFacts | AdapterFacts, task_type: str, task_name: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    statement, evaluation = facts.statement, facts.evaluation
    found = []
    for name, score in evaluation.slices[0].scores.items():
        ends = "" if score.interval is None else f" (95 % interval {score.interval[0]:.3f} to {score.interval[1]:.3f})"
        found.append(
            EvalResult(
                task_type=task_type,
                task_name=task_name,
                # The Hub wants an id; data that is not there goes by its name.
                dataset_type=statement.dataset_id
                or re.sub(r"[^a-z0-9]+", "-", statement.dataset_name.lower()).strip("-"),
                dataset_name=statement.dataset_name,
                dataset_split=evaluation.split,
                dataset_revision=statement.dataset_revision,
                metric_type=_HUB_METRICS[name],
                metric_value=round(score.value, 4),
                metric_name=f"{METRICS[name]}{ends}",
                metric_args={"average": "macro"} if name == "macro_f1" else None,
            )
        )
    return found


def card(data: Any, body: str) -> str:
    """Put metadata and text together, and read them back as the Hub's clients do."""
    from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData, SpaceCard, SpaceCardData

    text = f"---\n{data.to_yaml().strip()}\n---\n\n{body}"
    kinds = {ModelCardData: ModelCard, DatasetCardData: DatasetCard, SpaceCardData: SpaceCard}
    try:
        read = kinds[type(data)](text)
    except (ValueError, TypeError) as error:
        raise CardError(f"the card's metadata cannot be read back: {error}") from None
    if read.data.to_dict() != data.to_dict():
        raise CardError("the card's metadata changes when it is read back.")
    return text
