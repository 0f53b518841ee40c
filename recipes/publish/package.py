"""Make the folder that is uploaded, exactly: files, card, plots; and beside it the record that push checks it by.

    python -m recipes.publish.package --kind student --source runs/demo/students/lrkd-gat-0 \
        --evaluation runs/demo/students/lrkd-gat-0/evaluation-test \
        --facts recipes/configs/publish/facts_bazaar.yaml --repo_id ORG/lrkd-gat --output runs/publish/student
    python -m recipes.publish.package --kind adapter --source runs/teacher/dpo --evaluation runs/teacher/evaluation \
        --messages MESSAGES.json --facts FACTS.yaml --repo_id ORG/teacher --output runs/publish/adapter
    python -m recipes.publish.package --config recipes/configs/publish/bazaar_dataset.yaml
    python -m recipes.publish.package --kind metric --facts FACTS.yaml --repo_id ORG/lrkd_relevance \
        --output runs/publish/lrkd_relevance
    python -m recipes.publish.package --kind space --models ORG/lrkd-gat --repo_id ORG/relevance \
        --output runs/publish/space

With `--dry_run` it lists paths and sizes and writes nothing. The same input gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recipes.arguments import UserError, parse, run

Files = Mapping[str, "Path | bytes"]
REPO_TYPES = {"student": "model", "adapter": "model", "dataset": "dataset", "metric": "space", "space": "space"}


@dataclass
class PackageArguments:
    """Options of `recipes.publish.package`."""

    kind: Literal["student", "adapter", "dataset", "metric", "space"] = field(metadata={"help": "What is published."})
    repo_id: str = field(metadata={"help": "Where it will be on the Hub: owner/name."})
    output: str = field(metadata={"help": "Folder to make; OUTPUT.package.json beside it records its files."})
    source: str | None = field(
        default=None,
        metadata={"help": "Folder of the student, adapter or data. Metric and Space have one of their own."},
    )
    evaluation: str | None = field(
        default=None, metadata={"help": "Student, adapter: folder with metrics.json of its evaluation."}
    )
    facts: str | None = field(
        default=None,
        metadata={"help": "YAML of what only a person can state: licence, languages, intended use, authors..."},
    )
    completions: list[str] = field(
        default_factory=list, metadata={"help": "Dataset: the teacher's completions (parquet), which name the teacher."}
    )
    rationales: list[str] = field(
        default_factory=list, metadata={"help": "Dataset: embedded rationales of all three splits (parquet)."}
    )
    labels: str | None = field(
        default=None, metadata={"help": "Dataset: label schema, a name in recipes/labels/ or a YAML file."}
    )
    models: list[str] = field(
        default_factory=list, metadata={"help": "Space: Hub ids of its students, or ID@REVISION; the first is preset."}
    )
    messages: str | None = field(
        default=None,
        metadata={"help": "Adapter: JSON list of chat messages (role, content) as it was trained on, for the snippet."},
    )
    dry_run: bool = field(default=False, metadata={"help": "List what would be there, and write nothing."})


def collect(arguments: PackageArguments) -> Files:
    """Return what the repository will hold: path -> file on this machine, or content.

    Raises:
        UserError: Something is missing, contradicts something else, or must not be published.
    """
    from hub_cards.facts import CardError
    from recipes.publish.folder import check_repo_id, refuse_private_content

    check_repo_id(arguments.repo_id)
    try:
        if arguments.kind == "student":
            from recipes.publish.student import package_student as collect_kind
        elif arguments.kind == "adapter":
            from recipes.publish.adapter import package_adapter as collect_kind
        elif arguments.kind == "dataset":
            from recipes.publish.dataset import package_dataset as collect_kind
        elif arguments.kind == "metric":
            from recipes.publish.metric import package_metric as collect_kind
        else:
            from recipes.publish.space import package_space as collect_kind
        files = collect_kind(arguments)
    except CardError as error:
        raise UserError(str(error)) from None
    refuse_private_content(files)
    return dict(sorted(files.items()))


def package(arguments: PackageArguments) -> Path:
    """Write the package of `collect` and its record, whole or not at all; return the record's path.

    Raises:
        UserError: As `collect`; the output is something else than a package; the disk refuses.
    """
    from recipes.publish.folder import check_output, write_package

    output = Path(os.path.abspath(arguments.output))  # "." has no name to put the record under
    check_output(output)  # before any work
    record = {"kind": arguments.kind, "repo_type": REPO_TYPES[arguments.kind], "repo_id": arguments.repo_id}
    return write_package(output, collect(arguments), record)


def main() -> None:
    """Package from the command line."""
    arguments = parse(PackageArguments, __doc__)
    if arguments.dry_run:
        files = collect(arguments)
        for path, content in files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>15,}  {path}")
        print(f"{len(files)} files for the {REPO_TYPES[arguments.kind]} {arguments.repo_id}. Nothing was written.")
        print("Next: the same command without --dry_run.")
        return
    record = package(arguments)
    print(f"Wrote {arguments.output} and {record}. Read {arguments.output}/README.md before it is public.")
    print(f"Next: python -m recipes.publish.push --folder {arguments.output} --repo_id {arguments.repo_id}")


if __name__ == "__main__":
    run(main)
