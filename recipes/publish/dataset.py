"""What the repository of a dataset holds: pairs, rationales in three perspectives, their embeddings; and its card.

Inputs: pairs (recipes.data), completions (recipes.teacher) and embedded rationales (recipes.rationales), each with the
report that its stage left beside it. Nothing is written if a row is wrong, a fact is missing, or a query or title is in
two splits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.publish.dataset_checks import Source, read_source
from recipes.publish.folder import read_facts, read_record, to_json
from recipes.record import code_commit, sha256
from recipes.schemas import PERSPECTIVES, SPLITS, load_labels

if TYPE_CHECKING:
    from hub_cards.dataset import DatasetStatement
    from recipes.publish.package import Files, PackageArguments

TEACHER = ("model", "sampling", "prompt_hash")


def package_dataset(arguments: PackageArguments) -> Files:
    """Check everything, then collect parquet files, statistics, plots and card.

    Raises:
        UserError: A row is wrong, a command is not recorded, or files do not belong together.
        CardError: A fact is missing or cannot be.
    """
    from hub_cards.dataset import DatasetFacts, DatasetStatement, dataset_card
    from recipes.publish.dataset_files import configurations, describe, one_example, to_parquet
    from recipes.publish.dataset_statistics import PLOTS, plots, statistics

    statement = read_facts(arguments.facts, "dataset", DatasetStatement)
    pairs = require(arguments)
    labels = load_labels(arguments.labels or "")
    steps, selection = recorded_steps(arguments, statement)
    commit = code_commit()
    if commit is None:
        raise UserError("code commit: this is not a git checkout, so the card cannot say which code made the dataset.")
    structures = pairs / "structures.parquet" if (pairs / "structures.parquet").is_file() else None
    source = read_source(pairs, arguments.completions, arguments.rationales, structures, labels)
    languages = languages_of(source, statement, arguments.facts)
    teacher = teacher_of(source, statement)
    inputs = [pairs / f"{split}.parquet" for split in SPLITS]
    inputs += [Path(file) for file in (*arguments.completions, *arguments.rationales, structures) if file]

    tables = configurations(source)
    files, infos = to_parquet(tables)
    measured = statistics(source, labels)
    drawn = plots(source, measured, labels)
    facts = DatasetFacts(
        repo_id=arguments.repo_id,
        statement=statement,
        languages=languages,
        infos=infos,
        configurations=describe(tables),
        labels=[(label.name, label.gain, label.definition) for label in labels.labels],
        measured=measured,
        plots=PLOTS,
        example=one_example(source),
        selection=selection,
        teacher=teacher,
        encoder=source.rationales["encoder"].iloc[0],
        encoder_revision=source.rationales["encoder_revision"].iloc[0],
        embedding_size=source.vectors.shape[1],
        steps=steps,
        code_commit=commit,
        inputs={path.name: sha256(path) for path in inputs},
    )
    return {
        **files,
        **{f"figures/{name}": content for name, content in drawn.items()},
        "statistics.json": to_json(measured),
        "README.md": dataset_card(facts).encode(),
    }


def require(arguments: PackageArguments) -> Path:
    """Return the folder of pairs.

    Raises:
        UserError: An option that a dataset needs is not given.
    """
    for name, made_by in (
        ("source", "the folder of pairs, made by recipes.data.bazaar or recipes.data.prepare"),
        ("completions", "made by recipes.teacher.scripted or recipes.teacher.generate"),
        ("rationales", "made by recipes.rationales.build and embedded by recipes.rationales.embed"),
        ("labels", "the label schema: a name in recipes/labels/, or a YAML file"),
    ):
        if not getattr(arguments, name):
            raise UserError(f"--{name}: a dataset needs it: {made_by}.")
    return Path(arguments.source or "")


def recorded_steps(arguments: PackageArguments, statement: DatasetStatement) -> tuple[list[str], list[str]]:
    """Collect the commands that the stages recorded, and what the choice of rationales was.

    Returns:
        Commands in their order (the statement's `steps` where it has some), and sentences on the choice.

    Raises:
        UserError: A stage left no report, and the statement has no `steps`.
    """
    if statement.steps:
        return statement.steps, []

    def command(report: dict[str, Any], path: Path) -> str:
        if "command" not in report:
            raise UserError(
                f"{path}: the command that made the data is not recorded there. Make them again with this version, or "
                f"list the commands as `steps` in {arguments.facts}."
            )
        return report["command"]

    def report(path: Path) -> dict[str, Any]:
        return read_record(path, "its stage") if path.is_file() else {}

    files = [Path(arguments.source or "") / "report.json"]
    files += [Path(f"{file}.report.json") for file in arguments.completions]
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
    which = {"first": "the first", "all": "each"}[settings["samples"]]
    kept = {"all": "whatever it predicts", "consistent": "if it predicts the gold label"}[settings["keep"]]
    verdict = (
        "The verdict is taken out of the text, so that an embedding does not give the label away"
        if settings["strip_label_names"]
        else "The text is as the teacher wrote it, the verdict included"
    )
    return f"Of the completions of a pair and perspective, {which} is kept, {kept}. {verdict}."


def languages_of(source: Source, statement: DatasetStatement, path: str | None) -> list[str]:
    """Return the languages of the pairs.

    Raises:
        UserError: A locale of the pairs is not in the statement's `languages`.
    """
    locales = sorted(source.pairs["locale"].unique())
    for locale in locales:
        if locale not in statement.languages:
            raise UserError(f"{path}: 'languages' lacks the locale {locale!r} of the pairs; add its ISO 639 code.")
    return sorted({statement.languages[locale] for locale in locales})


def teacher_of(source: Source, statement: DatasetStatement) -> str | list[tuple[str, ...]]:
    """Return who wrote the rationales: the statement's own words, or rows of perspective, model, sampling, prompt.

    Raises:
        UserError: A column does not say, nor does the statement.
    """
    if statement.teacher:
        return statement.teacher
    for name in TEACHER:
        if name not in source.completions or source.completions[name].isna().any():
            raise UserError(
                f"completions: column {name!r} is missing or has nulls: the card has to say how the teacher was asked. "
                "Make them with recipes.teacher, or describe it as `teacher` in the YAML of --facts."
            )
    distinct = source.completions[["perspective", *TEACHER]].drop_duplicates()
    return [
        (perspective, *(", ".join(sorted(rows[name].unique())) for name in TEACHER))
        for perspective, rows in ((name, distinct[distinct["perspective"] == name]) for name in PERSPECTIVES)
    ]
