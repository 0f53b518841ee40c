"""Make a dataset for the Hub of pairs, their rationales in three perspectives, and the embeddings of these.

    python -m recipes.publish.dataset --config recipes/configs/publish/bazaar_dataset.yaml
    python -m recipes.publish.dataset --config recipes/configs/tiny/dataset.yaml

Reads: pairs (recipes.data), completions (recipes.teacher), embedded rationales (recipes.rationales), each with the
report that its stage left beside it, and a YAML file of what no run can record (`Description`). Writes: parquet files,
one folder a configuration (pairs, one a perspective, embeddings, and structures where given), statistics, plots, and
the card. Nothing is written if a row is wrong, a fact is missing, or a query or title is in two splits. The same
inputs give the same bytes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, build, parse, read_yaml, run
from recipes.record import environment, sha256, write_json
from recipes.schemas import PERSPECTIVES, SPLITS, load_labels, make_folder

if TYPE_CHECKING:
    from hub_cards.dataset import DatasetFacts
    from recipes.publish.dataset_checks import Source


@dataclass
class DatasetArguments:
    """What `recipes.publish.dataset` can be told."""

    pairs: str = field(metadata={"help": "Folder of pairs, one parquet a split."})
    completions: list[str] = field(metadata={"help": "The teacher's completions (parquet), which name the teacher."})
    rationales: list[str] = field(metadata={"help": "Rationales with embeddings (parquet), of all three splits."})
    description: str = field(metadata={"help": "YAML file of facts: licence, source, languages, limits, citation ..."})
    repo_id: str = field(metadata={"help": "OWNER/NAME on the Hub; the card's snippet loads it."})
    output: str = field(metadata={"help": "Folder to write: exactly what will be uploaded."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels/, or a YAML file."})
    structures: str | None = field(default=None, metadata={"help": "A bazaar's structures.parquet, to be published."})


@dataclass
class Description:
    """What a card says that no run can record; each is required but `steps` and `teacher`.

    Attributes:
        pretty_name: Title of the card.
        license: Identifier as the Hub lists them: apache-2.0, cc-by-4.0 ...
        synthetic: Whether the pairs were made by a program: then the card says so before anything else.
        summary: What it is, in a paragraph.
        source: Where queries, titles and labels come from.
        source_datasets: `original`, or `extended|NAME` of a dataset on the Hub.
        annotations_creators: As the Hub lists them: machine-generated, expert-generated ...
        languages: Locale -> its language's ISO code, for every locale of the pairs.
        labels_made: Who or what judged the pairs, and by which rules.
        uses: What it is for.
        out_of_scope: What it is not for.
        bias: What it may teach that is not so.
        limits: What is known to be missing or uneven.
        citation: BibTeX.
        tags: For the Hub's search.
        task_categories: As the Hub lists them.
        steps: The commands that made it, where a stage left no report.
        teacher: Who wrote the rationales and how, where completions lack model, sampling or prompt_hash.
    """

    pretty_name: str
    license: str
    synthetic: bool
    summary: str
    source: str
    source_datasets: list[str]
    annotations_creators: list[str]
    languages: dict[str, str]
    labels_made: str
    uses: list[str]
    out_of_scope: list[str]
    bias: str
    limits: list[str]
    citation: str
    tags: list[str]
    task_categories: list[str] = field(default_factory=lambda: ["text-classification", "text-ranking"])
    steps: list[str] | None = None
    teacher: str | None = None


def main() -> None:
    """Run the verb."""
    arguments = parse(DatasetArguments, __doc__)
    output = Path(arguments.output)
    if output.exists():
        raise UserError(f"{output}: exists already. Delete it, or choose another output.")
    make_folder(output.parent)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_dataset(arguments, temporary)
    temporary.replace(output)
    print(f"wrote {output}: {sum(path.is_file() for path in output.rglob('*'))} files; look at {output / 'README.md'}")
    print(f"next: python -m recipes.publish.push --package {output}")


def write_dataset(arguments: DatasetArguments, folder: Path) -> DatasetFacts:
    """Check everything, then write a dataset repository into the new folder `folder`.

    Returns:
        What the card states.

    Raises:
        UserError: A row is wrong, a fact is missing, or files do not belong together; nothing is written then.
    """
    from hub_cards.dataset import DatasetFacts, render_dataset_card
    from recipes.publish.dataset_checks import read_source
    from recipes.publish.dataset_files import front_matter, one_example, write_configurations
    from recipes.publish.dataset_statistics import plot, statistics

    description = read_description(arguments.description)
    check_repo_id(arguments.repo_id)
    labels = load_labels(arguments.labels)
    steps, selection = recorded_steps(arguments, description)
    source = read_source(arguments.pairs, arguments.completions, arguments.rationales, arguments.structures, labels)
    languages = languages_of(source, description, arguments.description)
    teacher = teacher_of(source, description)
    recorded = environment()
    if recorded["code_commit"] is None:
        raise UserError("code commit: this is not a git checkout, so the card cannot say which code made the dataset.")
    inputs = [Path(arguments.pairs) / f"{split}.parquet" for split in SPLITS]
    inputs += [Path(file) for file in (*arguments.completions, *arguments.rationales, arguments.structures) if file]

    measured = statistics(source, labels)
    folder.mkdir(parents=True)
    configurations, infos = write_configurations(source, folder)
    plots = plot(source, measured, labels, folder / "figures")
    write_json(folder / "statistics.json", measured)
    facts = DatasetFacts(
        front_matter=front_matter(description, languages, len(source.pairs), infos),
        repo_id=arguments.repo_id,
        **{name: getattr(description, name) for name in DatasetFacts.DESCRIBED},
        labels=[(label.name, label.gain, label.definition) for label in labels.labels],
        configurations=configurations,
        measured=measured,
        plots=plots,
        example=one_example(source),
        selection=selection,
        teacher=teacher,
        encoder=source.rationales["encoder"].iloc[0],
        encoder_revision=source.rationales["encoder_revision"].iloc[0],
        embedding_size=source.vectors.shape[1],
        steps=steps,
        code_commit=recorded["code_commit"],
        inputs={path.name: sha256(path) for path in inputs},
    )
    (folder / "README.md").write_text(render_dataset_card(facts), encoding="utf-8")
    return facts


def read_description(path: str) -> Description:
    """Read the facts that a person gives.

    Raises:
        UserError: The file is not there, or a fact is missing, empty, unknown, or of another type.
    """
    values = read_yaml(Description, path)
    for fact in fields(Description):
        required = fact.default is MISSING and fact.default_factory is MISSING
        if required and values.get(fact.name) in (None, "", [], {}):
            raise UserError(f"{path}: the fact {fact.name!r} is missing or empty, and the card needs it.")
    return build(Description, values, path)


def check_repo_id(repo_id: str) -> None:
    """Refuse what is not OWNER/NAME.

    Raises:
        UserError: See above.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id: {error}") from None
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id: {repo_id!r}: expected OWNER/NAME.")


def recorded_steps(arguments: DatasetArguments, description: Description) -> tuple[list[str], list[str]]:
    """Collect the commands that the stages recorded, and what the choice of rationales was.

    Returns:
        Commands in their order (the description's `steps` where it has some), and sentences on the choice.

    Raises:
        UserError: A stage left no report and the description has no `steps`.
    """
    if description.steps:
        return description.steps, []

    def report(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def command(recorded: dict[str, Any], path: Path) -> str:
        if "command" not in recorded:
            raise UserError(
                f"{path}: the command that made the data is not recorded there. Make them again with this version, or "
                f"list the commands as `steps` in {arguments.description}."
            )
        return recorded["command"]

    files = [Path(arguments.pairs) / "report.json", *(Path(f"{file}.report.json") for file in arguments.completions)]
    steps = [command(report(file), file) for file in files]
    selection = []
    for file in (Path(f"{file}.report.json") for file in arguments.rationales):
        embedded = report(file)
        built = embedded.get("rationales") or {}
        steps += [command(built, file), command(embedded, file)]
        selection.append(_selection(built["arguments"]))
    return list(dict.fromkeys(steps)), list(dict.fromkeys(selection))


def _selection(settings: dict[str, Any]) -> str:
    """Say what `recipes.rationales.build` was told."""
    kept = {"all": "whatever they predict", "consistent": "if they predict the gold label (eq. 1)"}[settings["keep"]]
    which = {"first": "the first", "all": "every"}[settings["samples"]]
    verdict = (
        "The verdict is taken out of the text, so that an embedding does not give the label away"
        if settings["strip_label_names"]
        else "The text is as the teacher wrote it, the verdict included"
    )
    return f"Of the completions of a pair and perspective, {which} is kept, {kept}. {verdict}."


def languages_of(source: Source, description: Description, path: str) -> list[str]:
    """Return the languages of the pairs.

    Raises:
        UserError: A locale of the pairs is not in the description's `languages`.
    """
    locales = sorted(source.pairs["locale"].unique())
    for locale in locales:
        if locale not in description.languages:
            raise UserError(f"{path}: the fact 'languages' lacks the locale {locale!r} of the pairs; add its ISO code.")
    return sorted({description.languages[locale] for locale in locales})


def teacher_of(source: Source, description: Description) -> str | list[tuple[str, str, str, str]]:
    """Return who wrote the rationales: the description's own words, or rows of perspective, model, sampling, prompt.

    Raises:
        UserError: A column does not say, nor does the description.
    """
    if description.teacher:
        return description.teacher
    columns = ["model", "sampling", "prompt_hash"]
    for name in columns:
        if name not in source.completions or source.completions[name].isna().any():
            raise UserError(
                f"completions: column {name!r} is missing or has nulls: the card has to say how the teacher was asked. "
                "Describe it as `teacher` in the description."
            )
    distinct = source.completions[["perspective", *columns]].drop_duplicates()
    return [
        (perspective, *(", ".join(sorted(rows[name].unique())) for name in columns))
        for perspective, rows in ((name, distinct[distinct["perspective"] == name]) for name in PERSPECTIVES)
    ]


if __name__ == "__main__":
    run(main)
