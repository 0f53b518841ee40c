"""The card of a rationale dataset: the facts that it states, and its text."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True)
class DatasetFacts:
    """What the card of a rationale dataset states; a fact that is missing is an error that names it.

    Attributes:
        front_matter: YAML that declares the dataset to the Hub, without the dashes around it.
        repo_id: OWNER/NAME.
        pretty_name: Title.
        license: Identifier as the Hub lists them.
        synthetic: Whether the pairs were made by a program.
        summary: What it is.
        source: Where queries, titles and labels come from.
        labels_made: Who judged the pairs, and how.
        uses: What it is for.
        out_of_scope: What it is not for.
        bias: What it may teach that is not so.
        limits: What is known to be missing or uneven.
        citation: BibTeX.
        labels: Name, gain and definition of each class.
        configurations: `name`, `one_row`, `rows` (split -> number) and `columns` (name, type, meaning) of each.
        measured: What `recipes.publish.dataset_statistics.statistics` returns.
        plots: File in figures/ -> what it shows.
        example: `query`, `product_title`, `locale`, `label`, and `rationales` (perspective, text, verdict) of one pair.
        selection: Sentences on which of the completions are published; empty where the commands say it.
        teacher: Who wrote the rationales: a text, or rows of perspective, model, sampling and hash of the prompt.
        encoder: Name of the frozen encoder of rationales.
        encoder_revision: Its commit, or the hash of its weights.
        embedding_size: Numbers an embedding.
        steps: Commands that made it, in their order.
        code_commit: Commit of the code that wrote it.
        inputs: File name -> sha256 of what it was made of.
    """

    front_matter: str
    repo_id: str
    pretty_name: str
    license: str
    synthetic: bool
    summary: str
    source: str
    labels_made: str
    uses: Sequence[str]
    out_of_scope: Sequence[str]
    bias: str
    limits: Sequence[str]
    citation: str
    labels: Sequence[tuple[str, float, str]]
    configurations: Sequence[Mapping[str, Any]]
    measured: Mapping[str, Any]
    plots: Mapping[str, str]
    example: Mapping[str, Any]
    selection: Sequence[str]
    teacher: str | Sequence[tuple[str, str, str, str]]
    encoder: str
    encoder_revision: str
    embedding_size: int
    steps: Sequence[str]
    code_commit: str
    inputs: Mapping[str, str]

    # What a person says of the data, not a run.
    DESCRIBED: ClassVar = (
        "pretty_name", "license", "synthetic", "summary", "source", "labels_made", "uses", "out_of_scope", "bias",
        "limits", "citation",
    )  # fmt: skip
    MAY_BE_EMPTY: ClassVar = ("synthetic", "selection")

    def __post_init__(self) -> None:
        for fact in fields(self):
            if fact.name not in self.MAY_BE_EMPTY and not getattr(self, fact.name):
                raise ValueError(f"the fact {fact.name!r} is missing, and the card of a dataset needs it")


def render_dataset_card(facts: DatasetFacts) -> str:
    """Render README.md of a dataset repository."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"md": markdown, "html": in_html, "count": "{:,}".format, "percent": _percent}
    content = {fact.name: getattr(facts, fact.name) for fact in fields(facts)}
    return environment.get_template("dataset.md.jinja").render(content)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def one_line(text: str) -> str:
    r"""Put a text of the data on one line: white space collapsed, no control characters, no change of direction.

    >>> one_line("a\n\n# b\u202e\x00c")
    'a # bc'
    """
    visible = "".join(c for c in text if c.isspace() or (unicodedata.category(c) != "Cc" and c not in _DIRECTION))
    return " ".join(visible.split())


# Embeddings, overrides and isolates of the bidirectional algorithm: they would turn round what follows.
_DIRECTION = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def markdown(text: object) -> str:
    r"""Escape a text for a line or a table cell of markdown.

    >>> print(markdown("a|b <i> [x](y) *z*"))
    a\|b &lt;i&gt; \[x\](y) \*z\*
    """
    return html.escape(re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", one_line(str(text))), quote=False)


def in_html(text: object) -> str:
    """Escape a text for HTML inside markdown: on one line, because a blank line ends an HTML block.

    >>> in_html("<script> **x**")
    '&lt;script&gt; **x**'
    """
    return html.escape(one_line(str(text)))
